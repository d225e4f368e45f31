"""What a new supervisor finds alive of its job: agents, workers, and the group they form."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_dr.actors import cluster
from ray_dr.actors.forming import AgentRef, Forming, WorkerRef
from ray_dr.errors import StoreError
from ray_dr.model import codec
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Event, NodeJoined, WorkerReady
from ray_dr.model.recovery import Group
from ray_dr.recovery.adoption import Living, living_group, who_left

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

CALL_S = 10.0


@dataclass(frozen=True, slots=True)
class Found:
    """What a restarted supervisor finds alive."""

    events: tuple[Event, ...]
    attempt: int
    """The highest that any of them has anything of."""
    group: Group | None
    step: int
    left: tuple[str, ...] = ()
    """Its members, where nobody is in `train` any more."""


def find_living(host: Host, agents: dict[str, AgentRef], workers: dict[str, WorkerRef],
                join: Callable[[str, Any, dict[str, Any]], None], forming: Forming) -> Found:  # fmt: skip
    """Agents and workers that outlived a supervisor, as events; and the group they form, if they do."""
    living, there = _living(host.job.name, "agent"), _living(host.job.name, "worker")
    for said, handle in living:
        try:
            join(said["node"], handle, said)
        except StoreError as error:
            host.note("agent.failed", node=said["node"], error=repr(error))
            cluster.kill(handle)  # nobody would hear of it again
    for said, handle in there:
        if said["node"] in agents:
            workers[said["worker"]] = WorkerRef(
                said["worker"], said["node"], handle, said["rendezvous"], said["attempt"], said["step"],
                said["running"], said["rank"],
                codec.from_json(VersionId, said["restore"]) if said["restore"] else None, said["world"], said["reserves"],
            )  # fmt: skip
        else:
            cluster.kill(handle)
    refs = tuple(workers.values())
    now = time.time()
    ready = [WorkerReady(now, ref.worker, ref.node) for ref in refs]
    found = [Living(r.worker, r.attempt, r.rank, r.step, r.running, r.restore, r.world) for r in refs]
    group, step = living_group(found)
    at_work = {ref.node for ref in refs if group is not None and ref.worker in group.members}
    nodes = sorted(agents, key=lambda node: (node not in at_work, node))  # one too many is none of the group's
    joined = [NodeJoined(now, node, tuple(ref.worker for ref in refs if ref.node == node)) for node in nodes]
    forming.peers = forming.expected_peers()
    attempt = max([0, *(ref.attempt for ref in refs), *(said["attempt"] for said, _ in living)])
    return Found((*joined, *ready), attempt, group, step, who_left(found, group) if group else ())


def _living(job: str, kind: str) -> list[tuple[dict[str, Any], Any]]:
    handles = [
        handle for name in cluster.actors_of(job)
        if name.startswith(f"{kind}:") and (handle := cluster.actor(name)) is not None
    ]  # fmt: skip
    answers = cluster.gather([handle.describe.remote() for handle in handles], CALL_S)
    out = []
    for handle, answer in zip(handles, answers, strict=True):
        if isinstance(answer, Exception):
            cluster.kill(handle)
        else:
            out.append((answer, handle))
    return out
