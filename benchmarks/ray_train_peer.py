"""Ray Train V2 in the best configuration found, on the same model and cluster: node kills, measured as for ray_dr.

Its driver is a process of its own (`python -m benchmarks.ray_train_peer`). The training function writes what it does,
with wall clock times, to one file that this module reads.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import median, say
from benchmarks.kills import Case, Measured, local_cluster
from ray_dr.actors.local_cluster import LocalCluster

WORKERS = 2
CHECKPOINT_EVERY = 5
RESIZE_MONITOR_S = 5.0
SETTLED_STEPS = 8
TIMEOUT_S = 180.0
POLL_S = 0.05

# Found to be the fastest (defaults: 2 s between polls, 10 min until a worker that does not answer counts as dead).
TUNED = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "5",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def train_loop(config: dict[str, Any]) -> None:
    """The training function: as benchmarks.program.train, with Ray Train's checkpoints."""
    import ray
    import ray.train
    import torch

    from benchmarks.program import Samples, build, learn

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    entered, node = time.time(), ray.get_runtime_context().get_node_id()

    def note(kind: str, step: int) -> None:
        line = {"kind": kind, "at": time.time(), "entered": entered, "rank": rank, "world": world, "step": step,
                "node": node}  # fmt: skip
        with Path(config["out"]).open("a") as out:  # one write: whole lines, whoever else writes
            out.write(json.dumps(line) + "\n")

    note("entered", 0)
    torch.set_num_threads(1)
    model, optimizer = build(config["width"], config["depth"])
    data, begun = Samples(config["width"]), 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            kept = torch.load(Path(folder) / "state.pt", mmap=True, weights_only=True)
            model.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            begun = kept["step"]
    note("restored", begun)
    share = config["batch"] // world
    for step in range(begun, config["steps"]):
        first = (step * config["batch"] + rank * share) % (len(data) - share)
        learn(model, optimizer, data.rows[first : first + share])
        note("step", step + 1)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            _checkpoint(model, optimizer, step + 1, rank)


def _checkpoint(model: Any, optimizer: Any, step: int, rank: int) -> None:
    import ray.train
    import torch
    from ray.train import CheckpointUploadMode

    if rank != 0:
        ray.train.report({"step": step}, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        return
    folder = tempfile.mkdtemp(prefix="rtc-")
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(kept, Path(folder) / "state.pt")
    checkpoint = ray.train.Checkpoint.from_directory(folder)
    ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)


def fit(config: dict[str, Any]) -> None:
    """The driver: runs the job until it is killed."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=config["address"], log_to_driver=False)
    TorchTrainer(
        train_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=(1, WORKERS),
            resources_per_worker={"CPU": 1},
            elastic_resize_monitor_interval_s=RESIZE_MONITOR_S,
        ),
        run_config=RunConfig(
            name="peer",
            storage_path=config["storage"],
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def check_installed() -> None:
    """Ends the program, saying what is missing, when Ray Train cannot be imported."""
    try:
        import ray.train  # noqa: F401
    except ImportError as error:
        raise SystemExit(f'Ray Train cannot be measured: {error} (pip install "ray[train]", or --only ray_dr)') from error


def measure(case: Case) -> Measured:
    """Kill nodes under a Ray Train job and time how it gets over it."""
    with tempfile.TemporaryDirectory(prefix="rts-") as folder, local_cluster(case) as cluster:
        with job(cluster, case, Path(folder)) as story:
            measured = Measured(case)
            try:
                for number in range(case.kills):
                    _kill_once(cluster, case, story, measured, number)
            except RuntimeError as error:
                measured.failed = str(error)
                say(f"  ended early: {measured.failed[-2000:]}")
        return measured


@contextlib.contextmanager
def job(cluster: LocalCluster, case: Case, folder: Path) -> Iterator[Story]:
    config = {"address": cluster.address, "storage": str(folder / "storage"), "out": str(folder / "steps.jsonl"),
              **case.settings}  # fmt: skip
    environment = {**os.environ, **cluster.env, **TUNED}
    with (folder / "driver.out").open("wb") as sink:
        driver = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ray_train_peer", json.dumps(config)],
            env=environment, stdout=sink, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield Story(folder, driver)
        finally:
            driver.kill()
            driver.wait()


def _kill_once(cluster: LocalCluster, case: Case, story: Story, measured: Measured, number: int) -> None:
    lines = story.until(_settled, "two workers at work")
    newest = max(line["entered"] for line in lines)
    last = [line for line in lines if line["kind"] == "step"]
    victim = next(line["node"] for line in reversed(last) if line["rank"] == number % WORKERS)
    broken = [line for line in last if line["entered"] > newest - 30]
    killed = time.time()
    cluster.kill_node(victim)
    lines = story.until(lambda found: first_whole_step(found, killed, 1) is not None, "a step after the kill")
    after = first_whole_step(lines, killed, 1)
    assert after is not None
    restored = next(line["step"] for line in lines if line["kind"] == "restored" and line["entered"] > killed)
    entered = min(line["entered"] for line in lines if line["entered"] > killed)
    measured.step_s.append(_step_s([line for line in broken if line["rank"] == 0]))
    before = _done_by_all([line for line in broken if line["at"] <= killed])
    measured.add(
        detected_s=float("nan"), first_step_s=after[1] - killed, steps_lost=before - restored,
        entered_s=entered - killed, world=after[2],
    )  # fmt: skip
    if number + 1 == case.kills:
        return
    cluster.add_node()
    joined = killed if case.spare else time.time()
    lines = story.until(lambda found: first_whole_step(found, killed, WORKERS) is not None, "two workers after the kill")
    full = first_whole_step(lines, killed, WORKERS)
    assert full is not None
    measured.back.append(max(0.0, full[1] - joined))
    say(f"  back at two workers after {measured.back[-1]:.2f} s")


class Story:
    """What the training function has written so far."""

    def __init__(self, folder: Path, driver: subprocess.Popen[bytes]) -> None:
        self._folder, self._driver = folder, driver

    def lines(self) -> list[dict[str, Any]]:
        """All lines; the last one may still be on its way and is then left out."""
        path = self._folder / "steps.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in whole]

    def until(self, holds: Callable[[list[dict[str, Any]]], bool], what: str) -> list[dict[str, Any]]:
        """The lines once `holds`. Raises RuntimeError with the driver's output when it takes too long."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self._driver.poll() is None:
            if holds(lines := self.lines()):
                return lines
            time.sleep(POLL_S)
        output = (self._folder / "driver.out").read_text(errors="replace")[-4000:]
        raise RuntimeError(f"Ray Train: waited {TIMEOUT_S:g} s for {what}; the end of its output:\n{output}")


def _settled(lines: list[dict[str, Any]]) -> bool:
    """The newest group has two workers, and has done some steps and checkpoints."""
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps or steps[-1]["world"] < WORKERS:
        return False
    since = max(line["entered"] for line in lines)
    done = [line["step"] for line in steps if line["world"] == WORKERS and line["entered"] > since - 5]
    return bool(done) and max(done) - min(done) >= SETTLED_STEPS + CHECKPOINT_EVERY


def first_whole_step(lines: list[dict[str, Any]], killed: float, world: int) -> tuple[int, float, int] | None:
    """(step, when, workers) of the first step done by all ranks of a group of at least `world` begun after a kill."""
    done: dict[tuple[int, int], dict[int, float]] = {}
    for line in lines:
        if line["kind"] == "step" and line["entered"] > killed and line["world"] >= world:
            ranks = done.setdefault((line["step"], line["world"]), {})
            ranks.setdefault(line["rank"], line["at"])
    whole = [(max(ranks.values()), step, size) for (step, size), ranks in done.items() if len(ranks) == size]
    return (min(whole)[1], min(whole)[0], min(whole)[2]) if whole else None


def _step_s(lines: list[dict[str, Any]]) -> float:
    """Median seconds between one step's end and the next one's, on one rank of the newest group in `lines`."""
    times = [line["at"] for line in lines if line["entered"] == lines[-1]["entered"]]
    return median([later - earlier for earlier, later in itertools.pairwise(times)])


def _done_by_all(lines: list[dict[str, Any]]) -> int:
    ranks: dict[int, int] = {}
    for line in lines:
        ranks[line["rank"]] = max(line["step"], ranks.get(line["rank"], 0))
    return min(ranks.values())


if __name__ == "__main__":
    fit(json.loads(sys.argv[1]))
