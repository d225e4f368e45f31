"""How the simulated supervisor comes to know what is wrong: the one place to replace when it learns to see more.

As a real supervisor today: a closed connection tells at once, silence after `silent_s`, and Ray tells when a process it
was to start did not come up. It does not see a worker that hangs in a running group: somebody's patience ends that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ray_dr.model.departure import Rates
from ray_dr.model.events import NodeLeaving
from ray_dr.simulator.swarm import Swarm
from ray_dr.simulator.things import Agent, Node, Worker

if TYPE_CHECKING:
    from ray_dr.simulator.world import World

RESUME_S = 5.0
"""Until a group's first step begins, its members' stops, calls and restores together."""
POWER_CUT = 0.5
"""Of nodes that die, the share that closes no connection."""
PATIENCE_S = 240.0
"""After so long somebody kills a worker that hangs."""
ASKED_S = 0.25
"""Ray is asked that often who is to leave."""


def rates(swarm: Swarm) -> Rates:
    """What a job would have measured in such a world."""
    copied_s = swarm.seal_s + swarm.copy_s
    return Rates(
        step_s=swarm.step_s, staged_s=swarm.seal_s, copied_s=copied_s, delta_s=swarm.write_s, full_s=swarm.write_s,
        resume_s=RESUME_S + swarm.seal_s + swarm.step_s, copies=swarm.job.memory.copies > 1,
    )  # fmt: skip


class Detection:
    """Told what happens to things; tells the supervisor of the time what it would notice, when it would."""

    def __init__(self, world: World) -> None:
        self._world = world

    def node_died(self, agent: Agent) -> None:
        """An agent's process has ended: with its machine, or by itself."""
        world = self._world
        silent = not agent.node.alive and world.dice.random() < POWER_CUT
        world.clock.after(self._silent_s() if silent else world.delay(), self._lost, agent, "silent" if silent else "closed")

    def node_troubled(self, agent: Agent) -> None:
        """An agent's node is frozen or cut off: no report comes as long as it is."""
        self._world.clock.after(self._silent_s(), self._silent, agent, agent.node.troubled_at)

    def worker_hangs(self, worker: Worker) -> None:
        """A worker in a running group does nothing any more."""
        self._world.clock.after(PATIENCE_S, self._world.worker_dies, worker)

    def node_leaves(self, node: Node) -> None:
        """Somebody has said when a node will be taken away; Ray repeats it to each who asks."""
        if node.leaves_at is not None:
            self._world.clock.after(self._world.delay() + ASKED_S, self._leaves, node)

    def _leaves(self, node: Node) -> None:
        world = self._world
        if node.alive and node.leaves_at is not None and world.supervisor is not None:
            known = replace(rates(world.swarm), committed=world.bucket.newest is not None)
            world.supervisor.post(NodeLeaving(world.clock.now, node.id, node.leaves_at, "notice", known))

    def _silent_s(self) -> float:
        return self._world.swarm.job.recovery.silent_s + self._world.delay()

    def _silent(self, agent: Agent, since: float) -> None:
        if agent.alive and agent.node.troubled_at == since and not agent.node.answers:
            self._lost(agent, "silent")

    def _lost(self, agent: Agent, how: str) -> None:
        supervisor = self._world.supervisor
        if supervisor is not None and agent.watcher is supervisor:
            supervisor.agent_lost(agent, how)
