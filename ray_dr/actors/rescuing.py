"""Survivors stage what they still have of a broken attempt: who is told what, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ray_dr.actors import cluster
from ray_dr.model.actions import Rescue
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Rescued
from ray_dr.recovery.replicas import replicas

if TYPE_CHECKING:
    from ray_dr.actors.forming import AgentRef, Forming
    from ray_dr.actors.host import Host

POLL_S = 0.01


def rescue(action: Rescue, host: Host, forming: Forming, agents: Mapping[str, AgentRef]) -> None:
    """Have the writers stage their parts, each copied to the agents that keep copies of its node's now."""
    version, until = VersionId(action.attempt, action.step), time.monotonic() + host.policy.rescue_s
    living = dict(agents)  # nodes come and go meanwhile
    leaving = host.notices.leaving - {ref.node for ref in forming.refs(action.writers)}
    domains = {node: agent.domain for node, agent in living.items() if node not in leaving}
    keepers = replicas(domains, host.job.memory.copies)
    forming.peers = max(map(len, keepers.values()), default=0)
    ranks: dict[str, list[int]] = {}
    for rank, writer in enumerate(action.writers):
        ranks.setdefault(writer, []).append(rank)
    writers = forming.refs(ranks)
    failed = "" if len(writers) == len(ranks) and all(ref.node in living for ref in writers) else "a survivor is gone"
    if host.vigil.doubts(version):
        failed = "training may have gone wrong before it"
    calls = [] if failed else [
        ref.handle.rescue.remote(
            action.attempt, action.step, ranks[ref.worker], [living[node].address for node in keepers[ref.node] if node in living]
        )
        for ref in writers
    ]  # fmt: skip
    for ref, answer in zip(writers, cluster.gather(calls, host.policy.rescue_s), strict=not failed):
        if answer != "":
            failed = failed or f"worker {ref.worker}: {answer}"
    while not failed and not forming.holds(version):  # else the inventory would miss what is still being hashed
        failed = "it was not whole in time" if time.monotonic() > until else ""
        time.sleep(POLL_S)
    if failed:
        host.perform.tell_abandoned(version, living)
    host.post(Rescued(time.time(), action.attempt, action.step, failed[:300]))
