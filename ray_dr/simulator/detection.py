"""How the simulated supervisor comes to know what is wrong: the one place to replace when it learns to see more.

As a real supervisor today: a closed connection tells at once, silence after `silent_s`, and Ray tells when a process it
was to start did not come up. It does not see a worker that hangs in a running group: somebody's patience ends that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_dr.simulator.things import Agent, Worker

if TYPE_CHECKING:
    from ray_dr.simulator.world import World

POWER_CUT = 0.5
"""Of nodes that die, the share that closes no connection."""
PATIENCE_S = 240.0
"""After so long somebody kills a worker that hangs."""


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

    def _silent_s(self) -> float:
        return self._world.swarm.job.recovery.silent_s + self._world.delay()

    def _silent(self, agent: Agent, since: float) -> None:
        if agent.alive and agent.node.troubled_at == since and not agent.node.answers:
            self._lost(agent, "silent")

    def _lost(self, agent: Agent, how: str) -> None:
        supervisor = self._world.supervisor
        if supervisor is not None and agent.watcher is supervisor:
            supervisor.agent_lost(agent, how)
