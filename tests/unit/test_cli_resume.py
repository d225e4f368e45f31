"""`resume` and `guard` as they are called, on a store in a directory; and the guard's loop, on a cluster that is a fake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ray_dr.actors.guard import Guard, Orders
from ray_dr.cli.main import BAD_INPUT, DO_NOT_RESUBMIT, FAILED, main
from ray_dr.errors import ClusterError
from ray_dr.model.lease import Guarding, Lease, Program
from ray_dr.recovery.guarding import GuardPolicy, Leave, Resubmit, Wait
from ray_dr.repository.lease import read_guarding, write_guarding, write_lease
from ray_dr.repository.program import digest_of, write_program
from ray_dr.stores.disk import FileStore

JOB = "night"
ALIVE = Lease(2, 7, 100.0, 3.0, "host:1", 40, "Running")
PROGRAM = Program({"name": JOB, "store": {"url": "file:///nowhere"}}, digest_of(b"code"), "3.11", "2.60")
POLICY = GuardPolicy(stale_s=20.0, start_s=100.0, backoff_s=10.0)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    opened = FileStore(tmp_path / "store")
    write_lease(opened, JOB, ALIVE)
    return opened


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def resume(store: FileStore, *more: str) -> Result:
    return call("resume", JOB, "--store", store.url, *more)


def test_a_job_that_has_finished_is_not_resumed(store: FileStore) -> None:
    write_lease(store, JOB, replace(ALIVE, over="finished"))
    result = resume(store, "--force")
    assert result.exit_code == BAD_INPUT
    assert "has finished, after step 40" in result.stderr


def test_a_job_that_would_fail_again_is_resumed_only_by_force(store: FileStore) -> None:
    write_lease(store, JOB, replace(ALIVE, over="failed", reason="ValueError: bad", resubmit=False))
    result = resume(store)
    assert result.exit_code == DO_NOT_RESUBMIT
    assert "ValueError: bad (do not resubmit" in result.stderr
    assert "no program" in resume(store, "--force").stderr


def test_a_job_of_which_the_store_has_no_program_needs_one(store: FileStore) -> None:
    result = resume(store)
    assert result.exit_code == BAD_INPUT
    assert "job.yaml in JOB's place" in result.stderr


def test_a_job_that_nobody_ran_is_named_with_those_there_are(store: FileStore) -> None:
    result = call("resume", "day", "--store", store.url)
    assert result.exit_code == BAD_INPUT
    assert "it knows night" in result.stderr


def test_variables_that_a_readable_store_does_not_keep_are_asked_for(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LAB_TOKEN", raising=False)
    write_program(store, JOB, replace(PROGRAM, names=("LAB_TOKEN",)), {PROGRAM.train: b"code"})
    for result in (resume(store), call("guard", JOB, "--store", store.url, "--address", "http://nowhere:1")):
        assert result.exit_code == BAD_INPUT
        assert "LAB_TOKEN" in result.stderr
        assert "set them" in result.stderr


@pytest.mark.parametrize(
    ("lease", "status"),
    [
        (replace(ALIVE, over="finished"), 0),
        (replace(ALIVE, over="drained"), 0),
        (replace(ALIVE, over="failed", reason="ValueError", resubmit=False), DO_NOT_RESUBMIT),
    ],
    ids=["finished", "drained", "failed for good"],
)
def test_a_guard_ends_with_its_jobs_and_says_how(store: FileStore, lease: Lease, status: int) -> None:
    write_lease(store, JOB, lease)
    result = call("guard", JOB, "--store", store.url, "--address", "http://nowhere:1", "--json")
    assert result.exit_code == status, result.output
    assert json.loads(result.stdout.splitlines()[-1])["jobs"][JOB]["well"] == (status == 0)


def test_a_guard_that_has_given_up_says_so_by_its_exit_status(store: FileStore) -> None:
    write_lease(store, JOB, replace(ALIVE, over="failed", reason="no progress"))
    write_guarding(store, JOB, Guarding(5, 1.0, 2, 40))
    result = call("guard", JOB, "--store", store.url, "--address", "http://nowhere:1")
    assert result.exit_code == FAILED, result.output
    assert "given up" in result.stdout


# ------------------------------------------------------------------------------------------------------------- the loop


class Cluster:
    """What a Submitter does, of a cluster that is only said to be there."""

    def __init__(self, away: str = "") -> None:
        self.away, self.submitted, self.broken = away, [], ""

    def reachable(self) -> str:
        return self.away

    def resume(self, job: str, store: str, name: str, environment: dict[str, str]) -> None:
        if self.away:
            raise ClusterError(self.away)
        self.submitted.append((job, store, name, dict(environment)))

    def failed(self, name: str) -> str:
        return self.broken


def guard(store: FileStore, cluster: Cluster, on_loss: str = "") -> Guard:
    orders = Orders(store.url, POLICY, on_loss, {"PATH": "/usr/bin:/bin"})
    return Guard({JOB: store}, cluster, orders, lambda job: {"A": "1"}, lambda line: None)  # type: ignore[arg-type]


def watch(one: Guard, begin: int, end: int) -> list[type]:
    """What it made of looks every 5 s."""
    return [type(one.look(JOB, float(at))) for at in range(begin, end, 5)]


def test_a_lost_job_is_submitted_once_by_a_name_that_every_guard_would_use(store: FileStore) -> None:
    cluster = Cluster()
    assert watch(guard(store, cluster), 1000, 1090) == [Wait] * 4 + [Resubmit] + [Wait] * 13
    assert cluster.submitted == [(JOB, store.url, "ray-dr-night-2-1", {"A": "1"})]
    assert read_guarding(store, JOB) == Guarding(1, 1020.0, 2, 40)


def test_a_guard_that_was_started_again_does_not_submit_a_second_time(store: FileStore) -> None:
    cluster = Cluster()
    watch(guard(store, cluster), 1000, 1025)
    assert set(watch(guard(store, cluster), 1030, 1100)) == {Wait}
    assert len(cluster.submitted) == 1


def test_of_two_guards_one_submits(store: FileStore) -> None:
    cluster, looks = Cluster(), range(1000, 1060, 5)
    both = [guard(store, cluster), guard(store, cluster)]
    for at in looks:
        for one in both:
            one.look(JOB, float(at))
    assert len(cluster.submitted) == 1


def test_a_cluster_that_is_away_is_brought_up(store: FileStore, tmp_path: Path) -> None:
    cluster, told = Cluster("connection refused"), tmp_path / "told"
    watch(guard(store, cluster, f'echo "$RAY_DR_JOB" > {told}'), 1000, 1025)
    assert told.read_text() == f"{JOB}\n"
    assert cluster.submitted == []
    assert read_guarding(store, JOB).refused


def test_a_cluster_that_comes_later_is_submitted_to_when_it_is_there(store: FileStore) -> None:
    cluster = Cluster("connection refused")
    one = guard(store, cluster)
    watch(one, 1000, 1060)
    cluster.away = ""
    assert Leave not in watch(one, 1060, 1090)
    assert [name for _, _, name, _ in cluster.submitted] == ["ray-dr-night-2-1"]


def test_a_submission_that_fails_is_told_and_tried_again_under_another_name(store: FileStore) -> None:
    cluster = Cluster()
    one = guard(store, cluster)
    watch(one, 1000, 1025)
    cluster.broken = "ModuleNotFoundError"
    watch(one, 1025, 1030)
    cluster.broken = ""
    watch(one, 1030, 1060)
    assert [name for _, _, name, _ in cluster.submitted] == ["ray-dr-night-2-1", "ray-dr-night-2-2"]


def test_what_stands_in_the_store_while_it_cannot_be_read_is_not_submitted(store: FileStore, tmp_path: Path) -> None:
    cluster = Cluster()
    one = guard(store, cluster)
    watch(one, 1000, 1015)
    (tmp_path / "store" / "jobs" / JOB / "lease" / "000002.json").write_text("{")
    assert set(watch(one, 1015, 1100)) == {Wait}
    assert cluster.submitted == []
