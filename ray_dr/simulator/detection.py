"""How the simulated supervisor comes to know what is wrong, as a real one does.

A closed connection tells at once, and Ray tells when a process it was to start did not come up. Of a node that says nothing,
and of a worker that hangs in a running group, the job's detectors tell (see `listening`); a silence of `silent_s` is enough by
itself, whatever they say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ray_dr.model.departure import Rates
from ray_dr.model.events import NodeLeaving
from ray_dr.simulator.listening import Listening, hung_in
from ray_dr.simulator.swarm import Swarm
from ray_dr.simulator.things import Agent, Node
from ray_dr.simulator.training import Run

if TYPE_CHECKING:
    from ray_dr.simulator.world import World

RESUME_S = 5.0
"""Until a group's first step begins, its members' stops, calls and restores together."""
POWER_CUT = 0.5
"""Of nodes that die, the share that closes no connection."""
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
        self._listening: Listening | None = None
        self._seen_from = 0, 0

    def node_died(self, agent: Agent) -> None:
        """An agent's process has ended: with its machine, or by itself."""
        world = self._world
        if not agent.node.alive and world.dice.random() < POWER_CUT:
            self._falls_silent(agent)
        else:
            world.clock.after(world.delay(), self._lost, agent, "closed")

    def node_troubled(self, agent: Agent) -> None:
        """An agent's node is frozen or cut off: no report comes as long as it is."""
        self._falls_silent(agent)

    def worker_hangs(self, run: Run) -> None:
        """A worker in a running group does nothing any more."""
        if (listening := self._listens()) is not None:
            attempt, step = self._seen_from
            listening.hangs(run, step if attempt == run.attempt else run.steps(self._world.clock.now))

    def begins(self, attempt: int, step: int) -> None:
        """The supervisor of the time sees the steps of an attempt from this one on."""
        self._seen_from = attempt, step

    def node_leaves(self, node: Node) -> None:
        """Somebody has said when a node will be taken away; Ray repeats it to each who asks."""
        if node.leaves_at is not None:
            self._world.clock.after(self._world.delay() + ASKED_S, self._leaves, node)

    def _leaves(self, node: Node) -> None:
        world = self._world
        if node.alive and node.leaves_at is not None and world.supervisor is not None:
            known = replace(rates(world.swarm), committed=world.bucket.newest is not None)
            world.supervisor.post(NodeLeaving(world.clock.now, node.id, node.leaves_at, "notice", known))

    def taken_over(self) -> None:
        """A new supervisor has taken the job over, and knows nothing of before."""
        run = self._world.run
        if run is not None:
            self.begins(run.attempt, run.steps(self._world.clock.now))
            if hung_in(run):
                self.worker_hangs(run)

    def _listens(self, first: Agent | None = None) -> Listening | None:
        """The stretch of listening that there is, or a new one; None while there is no supervisor that is open."""
        supervisor = self._world.supervisor
        if supervisor is None or not supervisor.opened:
            return None
        if self._listening is None or self._listening.over or self._listening.supervisor is not supervisor:
            self._listening = Listening(self._world, supervisor, first)
        return self._listening

    def _falls_silent(self, agent: Agent) -> None:
        since, limit_s = agent.node.troubled_at, self._world.swarm.job.recovery.silent_s
        self._world.clock.after(limit_s + self._world.delay(), self._still_silent, agent, since)
        if agent.watcher is not None and (listening := self._listens(agent)) is not None:
            listening.silent(agent)

    def _still_silent(self, agent: Agent, since: float) -> None:
        if not agent.node.alive or (agent.alive and agent.node.troubled_at == since and not agent.node.answers):
            self._lost(agent, "silent")

    def _lost(self, agent: Agent, how: str) -> None:
        supervisor = self._world.supervisor
        if supervisor is not None and agent.watcher is supervisor:
            supervisor.agent_lost(agent, how)
