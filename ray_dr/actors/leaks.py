"""What a job left behind on a cluster of this machine: actors, placement groups, shared memory, processes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.placement_group import placement_group_table

from ray_dr.actors import cluster
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.checkpoint.memory import MEMFD_NAME

ROLES = {"Supervisor": "supervisor", "NodeAgent": "agent", "Worker": "worker"}
"""Our actors' classes and what their names begin with: Ray titles their processes `ray::Worker` while they are idle and
`ray::worker:<job>:<worker>:Worker.start` while they work."""
SETTLE_S = 10.0
"""Killed actors have this long to disappear: a kill returns before the process has ended."""
PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Leaks:
    """What is left, in words, by kind."""

    actors: tuple[str, ...] = ()
    placement_groups: tuple[str, ...] = ()
    shared_memory: tuple[str, ...] = ()
    processes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """How many things are left."""
        return len(self.actors) + len(self.placement_groups) + len(self.shared_memory) + len(self.processes)


def find_leaks(local: LocalCluster, *, settle_s: float = SETTLE_S) -> Leaks:
    """What jobs that are over have left on a local cluster this process is connected to."""
    deadline = time.monotonic() + settle_s
    while (found := _look(local)).total and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
    return found


def worker_node(local: LocalCluster, among: Iterable[str]) -> str | None:
    """A node, of those named, with a worker and without a supervisor; one with a supervisor when there is no other."""
    wanted = set(among)
    roles = {node.node_id: _roles(node.pids) for node in local.nodes() if node.node_id in wanted}
    with_worker = sorted(node for node, found in roles.items() if "Worker" in found)
    return min(with_worker, key=lambda node: ("Supervisor" in roles[node], node), default=None)


def _look(local: LocalCluster) -> Leaks:
    pids = [pid for node in local.nodes() for pid in node.pids]
    return Leaks(
        actors=tuple(
            sorted(str(a["name"]) for a in ray.util.list_named_actors(all_namespaces=True)
                   if a["namespace"] == cluster.NAMESPACE)
        ),
        placement_groups=tuple(
            sorted(name for name, entry in placement_group_table().items() if entry.get("state") != "REMOVED")
        ),
        shared_memory=(*_memory_files(pids), *_named_segments()),
        processes=tuple(f"{pid} {title}" for pid in pids if _role(title := _title(pid))),
    )  # fmt: skip


def _roles(pids: Iterable[int]) -> set[str]:
    return {role for pid in pids if (role := _role(_title(pid)))}


def _role(title: str) -> str:
    """Which of our actors a process is; empty for any other."""
    if not title.startswith("ray::"):
        return ""
    name = title.removeprefix("ray::").split(" ")[0]
    return next((role for role, prefix in ROLES.items() if name == role or name.startswith(f"{prefix}:")), "")


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _memory_files(pids: Iterable[int]) -> list[str]:
    """Anonymous files of node agents that a process still holds."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(entry.path)
                    if target.startswith(f"/memfd:{MEMFD_NAME}"):
                        found.add(f"pid {pid}: {target}")
    return sorted(found)


def _named_segments() -> list[str]:
    """Files in shared memory under our name; there should be none at any time."""
    return sorted(str(path) for path in Path("/dev/shm").glob("*ray-dr*"))
