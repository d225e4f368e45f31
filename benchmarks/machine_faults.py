"""More kinds of faults of the campaign: of the machine below the processes, its disks and its network, and several at once.

They take root: a small file system is mounted as a directory of the job's, and nodes run in network namespaces.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import BROKEN, HANG, IN_SAVE, IN_STEP, LOST, NODE, NOW, Kind
from benchmarks.namespaces import Network, Place
from benchmarks.scene import NotOver, Scene, Unseen
from ray_dr.actors import cluster as names
from ray_dr.model.events import FirstStep, Hung, NodeLost, WorkerLost, WorkerRaised
from ray_dr.model.journal import JobOpened, VersionSaved, Where
from ray_dr.model.signal import WorkerPhase

DISK = "4m"
FULL_STEPS = 15
CHUNK = b"\0" * 65536


# ------------------------------------------------------------------------------------------------------------------ disk


def fill_stores_disk(scene: Scene) -> None:
    """The file system of the store has no byte left, for some steps."""
    home = Path(scene.spec.store.url.removeprefix("file://"))
    with _small_disk(scene, home) as ballast:
        scene.start()
        scene.until_ready()
        _no_space_left(scene, home, ballast)
        ballast.unlink()
    _until_saved(scene, Where.STORE)


def fill_nodes_disk(scene: Scene) -> None:
    """The file system of the nodes' own disks has no byte left, for some steps."""
    assert scene.spec.disk is not None, "the kind asks for it"
    home = Path(scene.spec.disk.url.removeprefix("file://"))
    with _small_disk(scene, home) as ballast:
        scene.start()
        scene.until_ready()
        _no_space_left(scene, home, ballast)
        ballast.unlink()
    scene.until_step(2)


@contextlib.contextmanager
def _small_disk(scene: Scene, home: Path) -> Iterator[Path]:
    """A file system of its own at `home` until the case is over; gives a file that can take all of it."""
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "ray-dr-campaign", str(home)], check=True)
    scene.undo.callback(subprocess.run, ["umount", "-l", str(home)], check=True)
    yield home / "ballast"


def _no_space_left(scene: Scene, home: Path, ballast: Path) -> None:
    """FULL_STEPS steps while every free page is taken as soon as there is one."""
    last = scene.running.snapshot()["step"] + FULL_STEPS
    scene.strike()
    with ballast.open("ab", buffering=0) as file:

        def full_for_long() -> bool:
            with contextlib.suppress(OSError):
                while True:
                    file.write(CHUNK)
            return bool(scene.running.snapshot()["step"] >= last)

        scene.until(full_for_long, f"{FULL_STEPS} steps with a full disk", NotOver)
    if os.statvfs(home).f_bavail:
        raise Unseen(f"{home} has space left")
    try:
        (home / "proof").write_bytes(CHUNK)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        scene.strike(f"no space left on {DISK} of {home.name} for {FULL_STEPS} steps")
    else:
        raise Unseen(f"{home} has space left")
    finally:
        (home / "proof").unlink(missing_ok=True)


def _until_saved(scene: Scene, where: Where) -> None:
    """A version is whole there that was saved after the fault."""
    step = scene.running.snapshot()["step"]
    scene.until(lambda: [r for r in scene.records() if isinstance(r, VersionSaved) and r.where is where
                         and r.version.step >= step], "a version after the fault", NotOver)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- network


def cut_node_off(scene: Scene) -> None:
    """The link of one node is down for good: neither peers nor the head reach it, no connection is closed."""
    network, places = _apart(scene)
    scene.start()
    scene.until_ready()
    node = scene.chance.choice(sorted(places))
    scene.strike()
    network.cut_off(places[node])
    scene.strike(f"the link of {places[node].ip} is down")
    scene.until_event(NodeLost)
    scene.until_recovered()
    scene.cluster.kill_node(node)


def cut_from_peers(scene: Scene) -> None:
    """Two nodes do not reach each other, the head reaches both; until it was noticed."""
    network, places = _apart(scene)
    scene.start()
    scene.until_ready()
    one, other = places.values()
    scene.strike()
    network.part(one, other)
    scene.strike(f"no route between {one.ip} and {other.ip}")
    scene.until_event((Hung, NodeLost, WorkerLost, WorkerRaised))
    network.join(one, other)
    scene.until_recovered()


def _apart(scene: Scene) -> tuple[Network, dict[str, Place]]:
    """Two nodes in namespaces of their own in place of those that there are."""
    cluster = scene.cluster
    for node in cluster.nodes()[1:]:
        cluster.kill_node(node.node_id)
    network = scene.undo.enter_context(Network())
    places = {}
    for place in (network.place(), network.place()):
        node_id = cluster.add_node(within=place.command, ip=place.ip).node_id
        scene.undo.callback(_end, scene, node_id)
        places[node_id] = place
    known = {cluster.head_id, *places}
    scene.until(lambda: {node.id for node in names.nodes()} | {cluster.head_id} == known, "nodes with a network of their own")
    return network, places


def _end(scene: Scene, node: str) -> None:
    if any(other.node_id == node for other in scene.cluster.nodes()):
        scene.cluster.kill_node(node)


# -------------------------------------------------------------------------------------------------------- several at once


def kill_saving(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    scene.kill_in_phase(scene.worker(scene.chance.randrange(2))["pid"], WorkerPhase.SAVE)
    scene.until_recovered()


def kill_worker_and_supervisor(scene: Scene) -> None:
    scene.start()
    scene.until_ready()
    worker = scene.worker(scene.chance.randrange(2))["pid"]
    scene.kill(worker, scene.running.snapshot()["supervisor"]["pid"])
    scene.until(lambda: [r for r in scene.records() if isinstance(r, JobOpened) and r.term == 2], "a supervisor", NotOver)
    scene.until_recovered()


def kill_supervisor_twice(scene: Scene) -> None:
    """The second one as soon as it says that it has begun."""
    scene.start()
    scene.until_ready()
    scene.kill(scene.running.snapshot()["supervisor"]["pid"])

    def second() -> int:
        with contextlib.suppress(Exception):  # nobody answers yet
            now = scene.running.snapshot()
            return int(now["supervisor"]["pid"]) if now["term"] == 2 else 0
        return 0

    scene.kill(scene.until(second, "a second supervisor", NotOver))
    scene.until(lambda: [r for r in scene.records() if isinstance(r, JobOpened) and r.term == 3], "a third one", NotOver)
    scene.until_step(5)


def kill_worker_and_other_agent(scene: Scene) -> None:
    """A worker, and the agent that holds the copies of what it had."""
    scene.start()
    scene.until_ready()
    victim, other = (scene.worker(rank) for rank in scene.chance.sample(range(2), 2))
    scene.kill(victim["pid"], scene.agent(other["node"])[1]["pid"])
    scene.until_recovered()


def kill_node_while_other_restores(scene: Scene) -> None:
    """A worker is killed; when the group is whole again and its last rank restores, the other node goes."""
    scene.start()
    scene.until_ready()
    scene.kill(scene.worker(1)["pid"])
    scene.until_recovered()
    scene.arm()
    scene.until_taken()
    broken = max(r.state.attempt for r in scene.decided())
    restoring = scene.worker(1)["node"]
    (doomed,) = set(scene.running.snapshot()["nodes"]) - {restoring}
    scene.kill_node(doomed)
    if any(event.attempt >= broken for event in scene.events(FirstStep)):
        raise Unseen("the restore was over before the node went")
    scene.until_event(NodeLost)
    scene.until_recovered(broken)


RESTORING = {"where": "restore", "deed": "wait", "world": 2}

KINDS = (
    Kind("store-disk-full", "the store's file system is full for 15 steps", "upload", fill_stores_disk),
    Kind("nodes-disk-full", "the file system of the nodes' disks is full for 15 steps", "a save", fill_nodes_disk, disk=True),
    Kind("network-cut", "a node's link is down, for good", IN_STEP, cut_node_off, frozenset({NODE})),
    Kind("peers-cut", "two nodes do not reach each other, the head reaches both", IN_STEP, cut_from_peers,
         frozenset({NODE, LOST, HANG, BROKEN}), recovery=NOW),
    Kind("killed-in-save-phase", "SIGKILL to a worker whose beacon says `save`", IN_SAVE, kill_saving, frozenset({LOST})),
    Kind("worker-and-supervisor", "SIGKILL to a worker and the supervisor at once", IN_STEP, kill_worker_and_supervisor,
         frozenset({LOST, BROKEN}), untold=True),
    Kind("supervisor-twice", "SIGKILL to the supervisor, and to the next one as it opens", IN_STEP, kill_supervisor_twice),
    Kind("worker-and-other-agent", "SIGKILL to a worker and to the other node's agent", IN_STEP, kill_worker_and_other_agent,
         frozenset({NODE, LOST})),
    Kind("node-while-other-restores", "a worker is killed, and a node while the regrown group restores", "a restore",
         kill_node_while_other_restores, frozenset({NODE, LOST}), settings=RESTORING),
)  # fmt: skip
