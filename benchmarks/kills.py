"""Kills under a ray_dr job on a local cluster, and what its journal says of each: the measuring side of `recovery`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray

from benchmarks import program
from benchmarks.figures import say
from ray_dr.actors import cluster as names
from ray_dr.actors.launch import submit
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.actions import FormGroup
from ray_dr.model.events import NodeLost, WorkerLost, WorkerRaised, WorkerStopped
from ray_dr.model.job import Job, StoreTier, Workers
from ray_dr.model.journal import Decided, Marked, PartSaved, Record, Restored, Stepped, Where
from ray_dr.model.recovery import Group, Running
from ray_dr.stores.open import open_store
from ray_dr.telemetry.journal import Reader
from ray_dr.telemetry.timeline import status

PYTHONPATH = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
"""With it the cluster's processes can import this package."""
JOB = "bench"
NODES = 2
BATCH = 8
SETTLED_STEPS = 10
JITTER_STEPS = 10
TIMEOUT_S = 120.0
POLL_S = 0.05
LOSSES = NodeLost | WorkerLost | WorkerRaised | WorkerStopped


@dataclass(frozen=True, slots=True)
class Case:
    """What is killed, how often, and the state's size. `spare`: there is a node that the job does not use; `standby`: one more
    node, or process on each node, stands by for the job."""

    name: str
    kind: Literal["worker", "node"]
    spare: bool
    depth: int
    kills: int
    standby: bool = False

    @property
    def workers(self) -> Workers:
        """The job's workers."""
        nodes, processes = (self.standby and self.kind == kind for kind in ("node", "worker"))
        return Workers(NODES, NODES, 1, standby_nodes=int(nodes), standby_processes=int(processes))

    @property
    def settings(self) -> dict[str, str | int | float | bool]:
        """The program's settings."""
        return {"width": program.WIDTH, "depth": self.depth, "batch": BATCH, "steps": 10**7}

    @property
    def state_bytes(self) -> int:
        """Bytes of state, in all."""
        return program.state_bytes(program.WIDTH, self.depth)


@dataclass(slots=True)
class Measured:
    """One list entry per kill, seconds after the kill (`back`: see README). `phases`: where the seconds went."""

    case: Case
    detected: list[float] = field(default_factory=list)
    first_step: list[float] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)
    back: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    failed: str = ""
    """Why the case ended before its last kill."""

    def add(self, *, detected_s: float, first_step_s: float, steps_lost: int, **phases: float) -> None:
        """One kill."""
        self.detected.append(detected_s)
        self.first_step.append(first_step_s)
        self.steps_lost.append(steps_lost)
        self.phases.append(phases)
        told = " ".join(f"{name}={value:.2f}" for name, value in phases.items())
        say(f"  detected {detected_s:.2f} s, first step {first_step_s:.2f} s, lost {steps_lost} steps; {told}")


@contextlib.contextmanager
def local_cluster(case: Case) -> Iterator[LocalCluster]:
    """A head and two worker nodes of one CPU each, three with a spare."""
    with LocalCluster(autoscaling=False, dashboard=False, env={"PYTHONPATH": PYTHONPATH}) as cluster:
        for _ in range(NODES + max(case.spare, case.workers.standby_nodes)):
            cluster.add_node()
        yield cluster


def measure(case: Case, seed: int = 0) -> Measured:
    """Kill again and again under one job, each time from full size."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="rdb-") as folder, local_cluster(case) as cluster:
        ray.init(address=cluster.address, namespace=names.NAMESPACE, log_to_driver=False)
        job = Job(JOB, StoreTier(f"file://{folder}"), case.workers, settings=case.settings)
        submit(program.train, job)
        story, measured = Story(job), Measured(case)
        try:
            for number in range(case.kills):
                _kill_once(cluster, story, measured, number, chance)
        except RuntimeError as error:
            measured.failed = str(error)
            say(f"  ended early: {measured.failed[:2000]}")
        ray.shutdown()
        return measured


def _kill_once(cluster: LocalCluster, story: Story, measured: Measured, number: int, chance: random.Random) -> None:
    case, settle = measured.case, SETTLED_STEPS + chance.randrange(JITTER_STEPS)
    wanted = case.workers
    waiting = wanted.standby_nodes + NODES * wanted.standby_processes
    story.until(lambda: story.settled(settle, waiting), "two workers at work, with a copy in memory")
    group = story.group
    members = members_of(group)
    rank = number % NODES
    if case.kind == "node" and hosts_supervisor(cluster, members[rank]["node"]):
        rank = (rank + 1) % NODES  # two losses at once are another case
    killed = time.time()
    _kill(cluster, case, members[rank])
    least = NODES if case.standby else 1
    story.until(lambda: story.first_step(group.attempt, least) is not None, "a step after the kill")
    _take_down(story, measured, group, killed)
    joined = killed
    if case.kind == "node":
        cluster.add_node()
        joined = killed if case.spare or case.standby else time.time()
    story.until(lambda: story.first_step(group.attempt, NODES) is not None, "two workers after the kill")
    full = story.first_step(group.attempt, NODES)
    assert full is not None
    measured.back.append(max(0.0, full - joined))
    say(f"  back at two workers after {measured.back[-1]:.2f} s; a step took {measured.step_s[-1]:.3f} s")


def _take_down(story: Story, measured: Measured, group: Group, killed: float) -> None:
    first = story.first_step(group.attempt, 1)
    assert first is not None
    formed = next(g for g in story.groups if story.steps_done(g.attempt) and g.attempt > group.attempt)
    decided = [record for record in story.records if isinstance(record, Decided) and record.at > killed]
    detected = min(record.at for record in decided if isinstance(record.event, LOSSES))
    done = story.steps_done(group.attempt)
    before = max((step for step, at in done.items() if at <= killed), default=0)
    base = formed.restore.step if formed.restore else 0
    measured.step_s.append(story.step_s(group.attempt))
    measured.add(
        detected_s=detected - killed, first_step_s=first - killed, steps_lost=max(0, before - base),
        **story.phases(formed.attempt, killed),
    )  # fmt: skip


class Story:
    """A job's journal, read as it grows."""

    def __init__(self, job: Job) -> None:
        self._reader = Reader(open_store(job.store.url), job.name)
        self.records: list[Record] = []

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Read on until it `holds`. Raises RuntimeError when that takes too long."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            self.records.extend(self._reader.more())
            if holds():
                return
            if time.monotonic() > deadline:
                last = [record for record in self.records if isinstance(record, Decided)][-3:]
                raise RuntimeError(f"waited {TIMEOUT_S:g} s for {what}; the last decisions: {last}")
            time.sleep(POLL_S)

    @property
    def groups(self) -> list[Group]:
        """Every group formed."""
        decided = [record for record in self.records if isinstance(record, Decided)]
        return [action.group for record in decided for action in record.actions if isinstance(action, FormGroup)]

    @property
    def group(self) -> Group:
        """The newest."""
        return self.groups[-1]

    def steps_done(self, attempt: int) -> dict[int, float]:
        """Step -> when the last of the attempt's ranks had done it."""
        done: dict[int, dict[int, float]] = {}
        world = 0
        for record in self.records:
            if isinstance(record, Stepped) and record.record.attempt == attempt:
                world = record.record.world
                done.setdefault(record.record.step, {}).setdefault(record.record.rank, record.at)
        return {step: max(ranks.values()) for step, ranks in done.items() if len(ranks) == world}

    def first_step(self, after_attempt: int, members: int) -> float | None:
        """When a group of at least `members`, newer than that attempt, had done its first step."""
        large = [g.attempt for g in self.groups if g.attempt > after_attempt and len(g.members) >= members]
        return min((min(done.values()) for attempt in large if (done := self.steps_done(attempt))), default=None)

    def settled(self, steps: int, waiting: int = 0) -> bool:
        """Whether the newest group has full size, did so many steps, and has a version on a second node; and as many workers
        are up beside it."""
        phase = next((r.state.phase for r in reversed(self.records) if isinstance(r, Decided)), None)
        if not isinstance(phase, Running) or len(phase.group.members) < NODES:
            return False
        if len(status(self.records).standbys) < waiting:
            return False
        attempt = phase.group.attempt
        copied = any(
            isinstance(r, PartSaved) and r.where is Where.PEER and r.version.attempt == attempt for r in self.records
        )
        return copied and len(self.steps_done(attempt)) >= steps

    def step_s(self, attempt: int) -> float:
        """Median time of the attempt's steps on a rank, in seconds."""
        times = sorted(r.record.took_s for r in self.records if isinstance(r, Stepped) and r.record.attempt == attempt)
        return times[len(times) // 2]

    def phases(self, attempt: int, killed: float) -> dict[str, float]:
        """Seconds from the kill until each moment of the attempt that got over it, the last rank's."""
        moments: dict[str, float] = {}
        for record in self.records:
            if isinstance(record, Decided) and any(
                isinstance(a, FormGroup) and a.group.attempt == attempt for a in record.actions
            ):
                moments["decided"] = record.at
            if isinstance(record, Marked) and record.attempt == attempt:
                moments[record.name] = max(record.at, moments.get(record.name, 0.0))
            if isinstance(record, Restored) and record.attempt == attempt:
                moments["restored"] = max(record.at, moments.get("restored", 0.0))
        ordered = sorted(moments.items(), key=lambda moment: moment[1])
        return {name: at - killed for name, at in ordered}


def members_of(group: Group) -> list[dict[str, Any]]:
    """Node and process of each member, in rank order."""
    handles = [ray.get_actor(f"worker:{JOB}:{member}", namespace=names.NAMESPACE) for member in group.members]
    return ray.get([handle.describe.remote() for handle in handles])


def _kill(cluster: LocalCluster, case: Case, member: dict[str, Any]) -> None:
    if case.kind == "node":
        cluster.kill_node(member["node"])
    else:
        os.kill(member["pid"], signal.SIGKILL)


def hosts_supervisor(cluster: LocalCluster, node_id: str) -> bool:
    node = next(node for node in cluster.nodes() if node.node_id == node_id)
    return any(b"Supervisor" in _command(pid) for pid in node.pids)


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
