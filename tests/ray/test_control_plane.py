"""The control plane is lost, in part or as a whole: training goes on meanwhile, or on another cluster from the store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.cli.main import BAD_INPUT, DO_NOT_RESUBMIT, FAILED
from ray_dr.model.journal import JobOpened, Stepped
from ray_dr.model.lease import Lease
from ray_dr.recovery.guarding import HEARD_S
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.lease import read_guarding, read_lease
from ray_dr.stores.open import open_store
from ray_dr.telemetry.journal import read_journal
from ray_dr.telemetry.timeline import incidents, status, verify_data
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
STEPS = 200
LONG = 800
"""Steps that nobody does at their pace within the minute that a cluster without its head has left."""
CLI = [sys.executable, "-m", "ray_dr.cli.main"]
PAUSED_S = 8.0
AGAIN_S = 120.0


def tell_steps(what: str, running: jobs.Running) -> None:
    """How much longer than usual a step took, at most; the first ones apart."""
    took = sorted(r.record.took_s for r in running.records() if isinstance(r, Stepped) and r.record.step > 10)
    usual = took[len(took) // 2]
    print(f"{what}: a step takes {usual:.3f} s, the longest took {took[-1]:.3f} s, {took[-1] / usual:.2f} x")


def nothing_was_done_again(running: jobs.Running) -> None:
    told = [r.record for r in running.records() if isinstance(r, Stepped)]
    done = {(record.rank, record.step, record.took_s) for record in told}  # one may be told twice: to each supervisor
    assert len(done) == 2 * STEPS, "a step was done twice"
    assert {record.attempt for record in told} == {1}, "the group was not disturbed"
    assert not incidents(running.records())


def finish(running: jobs.Running) -> None:
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)


def test_no_step_is_done_again_while_the_supervisor_is_away(cluster: LocalCluster, tmp_path: Path) -> None:
    running = jobs.start(replicated, jobs.job("away", f"file://{tmp_path}", STEPS))
    running.wait_for_step(30)
    jobs.sigkill(running.snapshot()["supervisor"]["pid"])
    finish(running)
    assert [r.term for r in running.records() if isinstance(r, JobOpened)] == [1, 2]
    nothing_was_done_again(running)
    tell_steps("supervisor killed", running)


def test_nothing_is_lost_or_started_again_while_the_gcs_stands_still(cluster: LocalCluster, tmp_path: Path) -> None:
    running = jobs.start(replicated, jobs.job("gcs-paused", f"file://{tmp_path}", STEPS))
    before = running.wait_for_step(30)
    pids = {said["worker"]: said["pid"] for said in running.workers()}
    gcs = gcs_pid(cluster)
    os.kill(gcs, signal.SIGSTOP)
    time.sleep(PAUSED_S)  # what is paused is real time
    os.kill(gcs, signal.SIGCONT)
    after = running.wait_for_step(before["step"] + 100)
    assert {said["worker"]: said["pid"] for said in running.workers()} == pids
    assert after["supervisor"] == before["supervisor"]
    finish(running)
    nothing_was_done_again(running)
    tell_steps(f"GCS paused for {PAUSED_S:g} s", running)


def gcs_pid(cluster: LocalCluster) -> int:
    """The head's control process."""
    head = next(node for node in cluster.nodes() if node.node_id == cluster.head_id)
    return next(pid for pid in head.pids if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/gcs_server"))


# ------------------------------------------------------------------------------------------------- the head is lost

PROGRAM = """
import time
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
import ray_dr

def train(ctx):
    import beside  # a module of the program's own: workers find it in its directory
    torch.manual_seed(beside.SEED)
    model = DDP(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = ctx.data([torch.full((4,), i / 64) for i in range(64)], global_batch=8)
    state = ctx.restore(model=model, optimizer=optimizer, data=data)
    for batch in ctx.steps(state, until=int(ctx.settings["steps"])):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.0 if Path(ctx.settings["gate"]).exists() else ctx.settings["pace"])

if __name__ == "__main__":
    ray_dr.run(train, "job.yaml")
"""


@dataclass(frozen=True)
class Program:
    """A program in a directory of its own, its job's name and its store."""

    folder: Path
    name: str
    store: str

    def records(self) -> list[Any]:
        return list(read_journal(open_store(self.store), self.name))

    def lease(self) -> Lease:
        return read_lease(open_store(self.store), self.name) or Lease(0, 0, 0.0, 3.0)

    def step(self) -> int:
        return self.lease().step

    def is_lost(self) -> bool:
        """Its lease says that the head is away, or is old."""
        lease = self.lease()
        return lease.headless_s > HEARD_S or time.time() - lease.at > 2 * lease.every_s

    def committed(self) -> int:
        newest = CommitLog(open_store(self.store), self.name).newest()
        return newest.version.step if newest else 0


def program(folder: Path, name: str) -> Program:
    home = folder / "program"
    home.mkdir()
    (home / "train.py").write_text(PROGRAM)
    (home / "beside.py").write_text("SEED = 3\n")
    (home / "job.yaml").write_text(
        f"job: {name}\nworkers: {{nodes: 2}}\nsettings: {{steps: {LONG}, pace: {jobs.PACE_S}, gate: {folder / 'gate'}}}\n"
        f"checkpoint: {{tiers: [{{kind: memory}}, {{kind: store, path: {folder / 'store'}, every: 1s}}]}}\n"
    )
    return Program(home, name, f"file://{folder / 'store'}")


@contextmanager
def clusters(count: int, **how: Any) -> Iterator[list[LocalCluster]]:
    """Clusters of a head and two nodes each; this process is in none of them."""
    with ExitStack() as stack:
        yield [_filled(stack.enter_context(LocalCluster(autoscaling=False, **how))) for _ in range(count)]


def _filled(cluster: LocalCluster) -> LocalCluster:
    for _ in range(2):
        cluster.add_node()
    return cluster


def begin(cluster: LocalCluster, *words: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """`ray-dr`, run by a user of the cluster."""
    environment = {**os.environ, **cluster.env, "PYTHONPATH": str(ROOT)}
    _begun.append(
        subprocess.Popen([*CLI, *words], env=environment, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    )
    return _begun[-1]


_begun: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _end_what_is_left() -> Iterator[None]:
    """No process of a failed test stays."""
    yield
    for process in _begun:
        process.kill()
        process.communicate()
    _begun.clear()


def end(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    """What it said, once it has ended as it should."""
    said, errors = process.communicate(timeout=AGAIN_S)
    assert process.returncode == status, errors
    return said, errors


def begun_again(done: Program) -> float:
    """When the first step of a later attempt was done, UTC seconds; from then on the job goes as fast as it can."""
    jobs.until(lambda: done.lease().term > 1 and done.lease().phase == "Running", "another attempt", AGAIN_S)

    def steps() -> list[float]:
        return [r.at for r in done.records() if isinstance(r, Stepped) and r.record.attempt > 1]

    at = min(jobs.until(steps, "a step of it in the journal", AGAIN_S))
    (done.folder.parent / "gate").touch()
    return at


def whole(done: Program) -> None:
    """It has done all of its steps, each sample once."""
    report = verify_data(done.records())
    assert report.ok, report
    assert report.steps == LONG
    assert status(done.records()).phase == "finished"


def test_a_job_whose_head_is_lost_is_resumed_on_another_cluster_from_its_store(tmp_path: Path) -> None:
    told = program(tmp_path, "head-lost")
    with clusters(2, dashboard=False) as (first, second):
        driver = begin(first, "run", "train.py", "job.yaml", "--quiet", cwd=told.folder)
        jobs.until(lambda: told.step() >= 30 and told.committed() >= 20, "thirty steps", AGAIN_S)
        _, refusal = end(begin(second, "resume", told.name, "--store", told.store), FAILED)
        assert "lives" in refusal
        first.kill_node(first.head_id)
        killed_at = time.time()
        driver.kill()
        driver.communicate()
        jobs.until(told.is_lost, "a sign that the head is lost")
        asked_at = time.time()
        resumed = begin(second, "resume", told.name, "--store", told.store, "--address", second.address, "--json")
        again_at = begun_again(told)
        opened_at = max(r.at for r in told.records() if isinstance(r, JobOpened))
        print(f"head killed: {asked_at - killed_at:.1f} s until it shows, {opened_at - asked_at:.1f} s from `resume` until the"
              f" supervisor begins, {again_at - asked_at:.1f} s until the next step")  # fmt: skip
        said, _ = end(resumed, 0)
        assert json.loads(said.splitlines()[-1]) == {"job": told.name, "outcome": "finished", "step": LONG}
        whole(told)
        _, over = end(begin(second, "resume", told.name, "--store", told.store), BAD_INPUT)
        assert "has finished" in over


def test_of_two_supervisors_on_two_clusters_the_older_one_is_fenced_off_and_ends(tmp_path: Path) -> None:
    told = program(tmp_path, "false-alarm")
    with clusters(2, dashboard=False) as (first, second):
        driver = begin(first, "run", "train.py", "job.yaml", "--quiet", cwd=told.folder)
        jobs.until(lambda: told.step() >= 30 and told.committed() >= 20, "thirty steps", AGAIN_S)
        resumed = begin(second, "resume", told.name, "--store", told.store, "--force", "--json")
        _, why = end(driver, DO_NOT_RESUBMIT)
        assert "a supervisor of term 2 owns the job" in why
        begun_again(told)
        end(resumed, 0)
        whole(told)


def test_a_guard_resubmits_what_was_lost_with_its_head_through_the_jobs_api(tmp_path: Path) -> None:
    told = program(tmp_path, "guarded")
    with clusters(2) as (first, second):
        submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait", "--working-dir", str(told.folder)]
        environment = {**os.environ, **first.env, "PYTHONPATH": str(ROOT)}
        subprocess.run([*submit, "--", sys.executable, "train.py"], env=environment, check=True, timeout=60, capture_output=True)
        jobs.until(lambda: told.step() >= 20 and told.committed() >= 10, "twenty steps", AGAIN_S)
        guard = begin(second, "guard", told.name, "--store", told.store, "--address", second.dashboard_url, "--stale", "10s",
                      "--python", sys.executable, "--json")  # fmt: skip
        first.kill_node(first.head_id)
        killed_at = time.time()
        print(f"head killed: {begun_again(told) - killed_at:.1f} s until the next step, by the guard")
        said, log = end(guard, 0)
        print(log)
        assert json.loads(said.splitlines()[-1])["jobs"][told.name]["well"]
        whole(told)
        assert read_guarding(open_store(told.store), told.name).tries == 1
