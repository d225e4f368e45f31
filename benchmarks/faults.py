"""The kinds of faults of the campaign, as data, and how each is brought about.

An injector returns once the fault has come, was seen to take effect, and, where there is something to get over, the job
has got over it. It raises `Unseen` when the fault can't be seen to have taken effect.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import ray

from benchmarks.scene import NotOver, Scene, Unseen
from ray_dr.checkpoint.memory import MEMFD_NAME
from ray_dr.model.events import ActionFailed, NodeLost, WorkerLost, WorkerRaised
from ray_dr.model.journal import JobOpened, Restored, VersionSaved, Where
from ray_dr.model.recovery import Draining, FailureKind, Resizing
from ray_dr.repository.commit import CommitLog
from ray_dr.stores.open import open_store

LOST, RAISED, NODE, HANG = FailureKind.WORKER_LOST, FailureKind.USER_ERROR, FailureKind.NODE_LOST, FailureKind.HANG
BROKEN = FailureKind.GROUP_BROKEN
PAUSED_S = 1.0
"""How long what goes on again is stopped."""
STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault.

    does, when   what is done to the job, and in which phase of its life
    incidents    what the job may take it for; none: training must go on in the same attempt
    ends         how the job must end
    settings, recovery   of the job, beside the usual ones
    s3           the job's store is the S3 server, not a directory
    disk         it saves to the nodes' own disks too
    untold       there may be no incident either, as those who would have told of one are gone
    """

    name: str
    does: str
    when: str
    inject: Callable[[Scene], None]
    incidents: frozenset[FailureKind] = frozenset()
    ends: Literal["finished", "do not resubmit"] = "finished"
    settings: Mapping[str, str | int | float] = field(default_factory=dict)
    recovery: Mapping[str, float] = field(default_factory=dict)
    s3: bool = False
    quick: bool = False
    disk: bool = False
    untold: bool = False


# ------------------------------------------------------------------------------------------------------------ processes


def kill_worker(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    scene.kill(scene.worker(scene.chance.randrange(2))["pid"])
    scene.until_recovered()


def kill_both_workers(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    scene.kill(*(said["pid"] for said in scene.running.workers()))
    scene.until_recovered()


def kill_node(scene: Scene) -> None:
    scene.start()
    scene.kill_node(scene.chance.choice(scene.until_ready()["nodes"]))
    scene.until_recovered()


def kill_raylet(scene: Scene) -> None:
    scene.start()
    node = scene.chance.choice(scene.until_ready()["nodes"])
    (pid,) = (n.raylet_pid for n in scene.cluster.nodes() if n.node_id == node)
    scene.kill(pid)
    scene.until_recovered()


def kill_agent(scene: Scene) -> None:
    scene.start()
    _, said = scene.agent(scene.chance.choice(scene.until_ready()["nodes"]))
    scene.kill(said["pid"])
    scene.until_recovered()


def stop_worker(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    scene.stop(scene.worker(1)["pid"])
    scene.until_recovered()


def pause_worker(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    pid = scene.worker(1)["pid"]
    scene.stop(pid)
    time.sleep(PAUSED_S)
    scene.go_on(pid)
    scene.until_step(5)


def stop_agent(scene: Scene) -> None:
    scene.start()
    _, said = scene.agent(scene.chance.choice(scene.until_ready()["nodes"]))
    scene.stop(said["pid"])
    scene.until_recovered()


def stop_node(scene: Scene) -> None:
    scene.start()
    node = scene.chance.choice(scene.until_ready()["nodes"])
    pids = next(n.pids for n in scene.cluster.nodes() if n.node_id == node)
    scene.stop(*pids)
    scene.until_recovered()
    scene.cluster.kill_node(node)


def kill_supervisor(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    _lose_supervisor(scene, scene.running.snapshot()["supervisor"]["pid"])


def _lose_supervisor(scene: Scene, pid: int) -> None:
    scene.kill(pid)
    scene.until(lambda: [r for r in scene.records() if isinstance(r, JobOpened) and r.term == 2], "a supervisor", NotOver)
    scene.until_step(5)


def pause_supervisor(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    pid, before = scene.running.snapshot()["supervisor"]["pid"], scene.worker(0)["step"]
    scene.stop(pid)
    scene.until(lambda: scene.worker(0)["step"] >= before + 5, "steps while the supervisor is stopped")
    time.sleep(PAUSED_S)
    scene.go_on(pid)
    scene.until_step(5)


def kill_supervisors_node(scene: Scene) -> None:
    scene.start(off_head=True)
    now = scene.until_ready()
    home = now["supervisor"]["node"]
    if home not in now["nodes"]:
        raise Unseen("Ray did not put the supervisor on a node of the job")
    scene.kill_node(home)
    scene.until(lambda: [r for r in scene.records() if isinstance(r, JobOpened) and r.term == 2], "a supervisor", NotOver)
    scene.until_recovered()


def kill_driver(scene: Scene) -> None:
    driver = scene.start_by_driver()
    scene.until_ready()
    scene.kill(driver.pid)
    driver.wait()
    scene.until_step(5)


# -------------------------------------------------------------------------------------------------------------- program


def fail(scene: Scene) -> None:
    """What the settings plan, once."""
    scene.start()
    scene.until_ready()
    scene.arm()
    scene.until_taken()
    scene.until_recovered()


def slow_down(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    scene.arm()
    scene.until_taken()
    scene.until_step(10)


def fail_always(scene: Scene) -> None:
    scene.start()
    scene.until_event(WorkerRaised)
    first = scene.events(WorkerRaised)[0]
    scene.strike(f"raised at step {first.step}", first.at)


# --------------------------------------------------------------------------------------------------------------- stores


def refuse_requests(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    with scene.refusing("503", seen=8):
        scene.until_step(20)
    _until_stored(scene)


def fill_store(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    with scene.refusing("507 InsufficientStorage", seen=4):
        scene.until_step(20)
    _until_stored(scene)


def lose_answers(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    with scene.refusing("apply_then_drop", times=3, seen=1, contains="/log/"):
        pass
    _until_stored(scene)


def slow_store(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    with scene.refusing("delay", times=20, seen=10, amount=0.5):
        scene.until_step(20)
    _until_stored(scene)


def _until_stored(scene: Scene) -> None:
    """A version is committed that was saved after the fault."""
    step = scene.running.snapshot()["step"]
    scene.until(lambda: [r for r in scene.records() if isinstance(r, VersionSaved) and r.where is Where.STORE
                         and r.version.step >= step], "a commit after the fault", NotOver)  # fmt: skip


def lose_store(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    home = Path(scene.spec.store.url.removeprefix("file://"))
    scene.strike()
    home.rename(home.with_name("away"))
    scene.until(lambda: scene.running.snapshot()["journal_lag_s"] > 1.0, "the journal to lag")
    scene.until_step(10)
    shutil.rmtree(home, ignore_errors=True)
    home.with_name("away").rename(home)
    scene.until(lambda: scene.notes("store.unavailable", "journal.lagging"), "a word about the store")
    scene.strike("the store's directory was gone, and missed")


def damage_store(scene: Scene) -> None:
    """One bit of each chunk of the newest version, while nobody runs."""
    _drain(scene)
    newest = CommitLog(open_store(scene.spec.store.url), scene.spec.name).newest()
    assert newest is not None
    root = Path(scene.spec.store.url.removeprefix("file://")) / "jobs" / scene.spec.name / "chunks"
    chunks = [p for p in root.glob(f"{newest.version.attempt:06d}-{newest.version.step:012d}-*/*") if p.is_file()]
    if not chunks:
        raise Unseen("the newest version has no chunk of its own")
    scene.strike()
    for chunk in chunks:
        data = bytearray(chunk.read_bytes())
        data[scene.chance.randrange(len(data))] ^= 1
        chunk.write_bytes(data)
    scene.start()
    scene.until(lambda: scene.notes("chunk.corrupt"), "the damage to be found")
    scene.strike(f"{len(chunks)} chunks damaged, and found so")
    scene.until_recovered()


def damage_memory(scene: Scene) -> None:
    """All that one agent holds, a bit per page, while both workers are stopped; then the other node's worker is lost."""
    scene.start()
    scene.until_ready()
    survivor, victim = (scene.worker(rank) for rank in range(2))
    handle, said = scene.agent(survivor["node"])
    scene.stop(survivor["pid"], victim["pid"])
    ray.get(handle.held.remote(2.0))  # what was staged is sealed by now
    pages = _flip_pages(said["pid"], scene)
    scene.struck_at = 0.0
    scene.kill(victim["pid"])
    scene.go_on(survivor["pid"])
    scene.until_recovered()
    scene.until(lambda: scene.notes("chunk.corrupt"), "the damage to be found")
    scene.strike(f"{pages} pages damaged, and found so")
    if any(set(r.sources) & {"store"} for r in scene.records() if isinstance(r, Restored)):
        raise Unseen("the restore was from the store, not from memory")


def _flip_pages(pid: int, scene: Scene) -> int:
    """How many pages of an agent's pools have one bit more or less now."""
    pages = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        if not os.readlink(entry.path).startswith(f"/memfd:{MEMFD_NAME} "):
            continue
        descriptor = os.open(entry.path, os.O_RDWR)
        try:
            size = os.fstat(descriptor).st_size
            with mmap.mmap(descriptor, size) as held:
                for page in range(0, size, mmap.PAGESIZE):
                    held[page + scene.chance.randrange(16)] ^= 1
                    pages += 1
        finally:
            os.close(descriptor)
    if not pages:
        raise Unseen(f"agent {pid} holds no memory")
    return pages


# -------------------------------------------------------------------------------------------------- in a chosen moment


def kill_committing(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    pid = scene.running.snapshot()["supervisor"]["pid"]
    with scene.refusing("delay", times=1, amount=2.0, contains="/log/") as fault:
        scene.until(lambda: not fault.times, "a commit under way")
        scene.struck_at = 0.0
        _lose_supervisor(scene, pid)


def kill_restoring(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    scene.arm()
    scene.kill(scene.worker(1)["pid"])
    scene.until_taken()
    scene.until_event(WorkerLost, 2)
    scene.until_recovered()


def kill_resizing(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    survivor = scene.worker(0)["pid"]
    scene.kill(scene.worker(1)["pid"])
    broken = scene.until_recovered()
    scene.until_phase("Resizing")
    scene.kill(survivor)
    scene.until_event(WorkerLost, 2)
    _check_phase(scene, Resizing)
    scene.until_recovered(broken)


def kill_grown(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    scene.kill(scene.worker(1)["pid"])
    scene.until_recovered()
    scene.arm()
    scene.until_taken()
    scene.until_event(WorkerLost, 2)
    scene.until_recovered(max(r.state.attempt for r in scene.decided()))


def kill_draining(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    victim = scene.worker(1)["pid"]
    ray.get(scene.running.handle.stop.remote(STOP_S, "the campaign"))
    scene.until_phase("Draining")
    scene.kill(victim)
    _join(scene)
    _check_phase(scene, Draining)
    scene.start()
    scene.until_recovered()


def _check_phase(scene: Scene, phase: type) -> None:
    """Raises Unseen unless a worker's end was met in that phase."""
    decided = scene.decided()
    met = [now for before, now in itertools.pairwise(decided) if isinstance(before.state.phase, phase)
           and isinstance(now.event, WorkerLost | WorkerRaised | ActionFailed)]  # fmt: skip
    if not met:
        raise Unseen(f"no worker was lost in {phase.__name__}")
    scene.strike(f"{type(met[0].event).__name__} in {phase.__name__}")


def kill_node_then_worker(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    left, lost = scene.running.workers()
    scene.kill_node(lost["node"])
    broken = scene.attempt_at_strike()
    scene.until_formed(broken)
    scene.kill(left["pid"])
    scene.until_event(WorkerLost)
    scene.until_recovered(max(r.state.attempt for r in scene.decided()))


def kill_all_nodes(scene: Scene) -> None:
    scene.start()
    nodes = scene.until_ready()["nodes"]
    scene.until(lambda: [r for r in scene.records() if isinstance(r, VersionSaved) and r.where is Where.STORE], "a commit")
    for node in nodes:
        scene.kill_node(node)
    for _ in nodes:
        scene.cluster.add_node()
    scene.until_recovered()


def flap(scene: Scene) -> None:
    """One node's agent dies three times, and the node comes back each time."""
    scene.start()
    node = scene.chance.choice(scene.until_ready()["nodes"])
    for _ in range(3):
        now = scene.running.wait_for_world(2)
        scene.until_step(1)
        scene.kill(scene.agent(node)[1]["pid"])
        scene.until_recovered(now["attempt"])
    scene.until_event(NodeLost, 3)


def stop_and_resume(scene: Scene) -> None:
    _drain(scene)
    scene.strike("drained")
    scene.start()
    scene.until_recovered()


def _drain(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    scene.strike()
    ray.get(scene.running.handle.stop.remote(STOP_S, "the campaign"))
    _join(scene)


def _join(scene: Scene) -> None:
    scene.running.thread.join(STOP_S)
    outcome = scene.running.box.get("outcome")
    if outcome is None or not outcome.drained:
        raise Unseen(f"the job was not drained: {scene.running.box}")


# ---------------------------------------------------------------------------------------------------------------- kinds

IN_STEP, IN_SAVE, IN_RESTORE = "a step", "a save's staging", "a restore"


def _kinds(*kinds: FailureKind) -> frozenset[FailureKind]:
    return frozenset(kinds)


def _planned(where: str, deed: str, **more: int) -> dict[str, str | int | float]:
    return {"where": where, "deed": deed, **more}


NOW = {"hang_s": 0.0}
"""Who hangs for sure is ended at once."""

KINDS = (
    Kind("worker-killed", "SIGKILL to a worker", IN_STEP, kill_worker, _kinds(LOST), quick=True),
    Kind("both-workers-killed", "SIGKILL to both workers at once", IN_STEP, kill_both_workers, _kinds(LOST)),
    Kind("node-killed", "every process of a node ends, its memory goes", IN_STEP, kill_node, _kinds(NODE), quick=True),
    Kind("raylet-killed", "SIGKILL to a node's raylet", IN_STEP, kill_raylet, _kinds(NODE, LOST)),
    Kind("agent-killed", "SIGKILL to a node's agent", IN_STEP, kill_agent, _kinds(NODE, LOST), quick=True),
    Kind("worker-stopped", "SIGSTOP to a worker", IN_STEP, stop_worker, _kinds(HANG), recovery=NOW),
    Kind("worker-paused", f"SIGSTOP to a worker for {PAUSED_S:g} s", IN_STEP, pause_worker, recovery=NOW),
    Kind("agent-stopped", "SIGSTOP to a node's agent", IN_STEP, stop_agent, _kinds(NODE), recovery={"silent_s": 60.0}),
    Kind("node-stopped", "SIGSTOP to all of a node", IN_STEP, stop_node, _kinds(NODE), recovery={"silent_s": 60.0}),
    Kind("supervisor-killed", "SIGKILL to the supervisor", IN_STEP, kill_supervisor, quick=True),
    Kind("supervisor-paused", f"SIGSTOP to the supervisor for {PAUSED_S:g} s and more", IN_STEP, pause_supervisor),
    Kind("supervisors-node-killed", "the node of supervisor and worker ends", IN_STEP, kill_supervisors_node,
         _kinds(NODE, LOST, BROKEN)),
    Kind("driver-killed", "SIGKILL to the process that submitted the job", IN_STEP, kill_driver),
    Kind("raises-once", "the program raises on one rank", IN_STEP, fail, _kinds(RAISED),
         settings=_planned("step", "raise"), quick=True),
    Kind("raises-always", "the program raises at step 25, whenever it comes there", IN_STEP, fail_always, _kinds(RAISED),
         "do not resubmit", settings={"always": 25}, quick=True),
    Kind("exits", "os._exit(1) in a worker", IN_STEP, fail, _kinds(LOST), settings=_planned("step", "exit")),
    Kind("sys-exits", "sys.exit(1) in the program", IN_STEP, fail, _kinds(RAISED), settings=_planned("step", "sys-exit")),
    Kind("out-of-memory", "SIGKILL of itself, as the kernel does", IN_STEP, fail, _kinds(LOST),
         settings=_planned("step", "kill")),
    Kind("hangs-in-step", "one rank sleeps for good", IN_STEP, fail, _kinds(HANG), settings=_planned("step", "hang"),
         recovery=NOW, quick=True),
    Kind("hangs-in-loader", "one rank's dataset never gives its sample", "loading", fail, _kinds(HANG),
         settings=_planned("loader", "hang"), recovery=NOW),
    Kind("slow-rank", "one rank takes 0.3 s more per step for 20 steps", IN_STEP, slow_down, settings=_planned("step", "slow")),
    Kind("loader-killed", "SIGKILL of itself in the dataset", "loading", fail, _kinds(LOST), settings=_planned("loader", "kill")),
    Kind("store-refuses", "503 to every put, for 20 steps", "upload", refuse_requests, s3=True, quick=True),
    Kind("store-full", "507, no space left, to every put, for 20 steps", "upload", fill_store, s3=True),
    Kind("store-slow", "0.5 s more for 20 puts", "upload", slow_store, s3=True),
    Kind("commit-answer-lost", "a commit is applied, its connection closed", "commit", lose_answers, s3=True),
    Kind("store-gone", "the store's directory is away for some seconds", "upload", lose_store),
    Kind("store-damaged", "a bit of each chunk of the newest version, while nobody runs", "between runs", damage_store,
         _kinds(RAISED)),
    Kind("memory-damaged", "a bit of each page one agent holds, then the other node's worker is killed", IN_RESTORE,
         damage_memory, _kinds(LOST)),
    Kind("killed-staging", "SIGKILL of itself", IN_SAVE, fail, _kinds(LOST), settings=_planned("save", "kill"), quick=True),
    Kind("killed-committing", "SIGKILL to the supervisor", "commit", kill_committing, s3=True),
    Kind("killed-restoring", "a worker is killed, and the one that restores", IN_RESTORE, kill_restoring, _kinds(LOST),
         settings=_planned("restore", "kill"), quick=True),
    Kind("killed-resizing", "a worker is killed, and the other while the group stops to grow", "resize", kill_resizing,
         _kinds(LOST)),
    Kind("killed-grown", "a worker is killed, and one of the grown group as it restores", IN_RESTORE, kill_grown, _kinds(LOST),
         settings=_planned("restore", "kill", world=2)),
    Kind("killed-draining", "a worker is killed after the job was asked to stop", "drain", kill_draining),
    Kind("node-then-worker", "a node is killed, and the last worker as it goes on", "recovery", kill_node_then_worker,
         _kinds(NODE, LOST)),
    Kind("all-nodes-killed", "all nodes and all memory copies", IN_STEP, kill_all_nodes, _kinds(NODE)),
    Kind("flapping", "one node's agent is killed three times", "each time at full size", flap, _kinds(NODE, LOST)),
    Kind("stopped-and-resumed", "the job is drained, and run again", IN_STEP, stop_and_resume),
)  # fmt: skip
