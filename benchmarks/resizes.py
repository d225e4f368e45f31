"""How long does a job stand still when a node is added to it? ray_dr and Ray Train, on the same model and cluster.

A job of one node grows to two when a second one joins; then that node is killed, which is not measured, and it begins again.
Seconds without a step: from the last step of the small group to the first that every rank of the larger one has done.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray

from benchmarks import kills, program, ray_train_peer
from benchmarks.figures import say
from benchmarks.kills import Case, Story
from ray_dr.actors import cluster as names
from ray_dr.actors.launch import submit
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.job import Job, StoreTier, Workers
from ray_dr.model.journal import Decided
from ray_dr.model.recovery import Running

SETTLED_STEPS = 12
LONG_ENOUGH_S = 10.0
"""A node is killed so long after it joined: Ray Train must have had the time to take it in."""


def ours(depth: int, times: int) -> list[float]:
    """Seconds without a step, per growth, under ray_dr."""
    case = Case("resize", "node", False, depth, times)
    with tempfile.TemporaryDirectory(prefix="rdb-") as folder, _small_cluster() as cluster:
        ray.init(address=cluster.address, namespace=names.NAMESPACE, log_to_driver=False)
        job = Job(kills.JOB, StoreTier(f"file://{folder}"), Workers(1, 2, 1), settings=case.settings)
        submit(program.train, job)
        story, found = Story(job), list[float]()
        for _ in range(times):
            story.until(lambda: _works(story, 1), "one worker at work")
            before = story.group.attempt
            node = cluster.add_node()
            story.until(lambda attempt=before: story.first_step(attempt, 2) is not None, "a step of two workers")
            first, last = story.first_step(before, 2), max(story.steps_done(before).values())
            assert first is not None
            found.append(first - last)
            say(f"  {found[-1]:.2f} s without a step")
            story.until(lambda: _works(story, 2), "two workers at work")
            cluster.kill_node(node.node_id)
        ray.shutdown()
    return found


def theirs(depth: int, times: int) -> list[float]:
    """The same under Ray Train's elastic trainer."""
    case, found = Case("resize", "node", False, depth, times), list[float]()
    with (
        tempfile.TemporaryDirectory(prefix="rts-") as folder,
        _small_cluster() as cluster,
        ray_train_peer.job(cluster, case, Path(folder)) as story,
    ):
        for _ in range(times):
            since = time.time()
            story.until(lambda lines, since=since: _count(lines, 1, since) >= SETTLED_STEPS, "one worker at work")
            joined, node = time.time(), cluster.add_node()
            lines = story.until(
                lambda lines, since=joined: ray_train_peer.first_whole_step(lines, since, 2) is not None, "a step of two workers"
            )
            first = ray_train_peer.first_whole_step(lines, joined, 2)
            assert first is not None
            small = [line["at"] for line in lines if line["kind"] == "step" and line["world"] == 1]
            found.append(first[1] - max(at for at in small if at < first[1]))
            say(f"  Ray Train: {found[-1]:.2f} s without a step")
            time.sleep(max(0.0, joined + LONG_ENOUGH_S - time.time()))
            cluster.kill_node(node.node_id)
    return found


@contextlib.contextmanager
def _small_cluster() -> Iterator[LocalCluster]:
    """A head, and one node of one CPU."""
    with LocalCluster(autoscaling=False, dashboard=False, env={"PYTHONPATH": kills.PYTHONPATH}) as cluster:
        cluster.add_node()
        yield cluster


def _works(story: Story, size: int) -> bool:
    phase = next((r.state.phase for r in reversed(story.records) if isinstance(r, Decided)), None)
    if not isinstance(phase, Running) or len(phase.group.members) != size:
        return False
    return len(story.steps_done(phase.group.attempt)) >= SETTLED_STEPS


def _count(lines: list[dict[str, object]], world: int, since: float) -> int:
    tail = itertools.takewhile(lambda line: line["world"] == world, reversed(lines))
    return sum(line["kind"] == "step" and float(str(line["at"])) > since for line in tail)
