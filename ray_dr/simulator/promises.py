"""What the world holds its supervisor to: checked from the outside, with the truth at hand.

The numbers are those of the architecture's list of invariants.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.recovery import Group, Running
from ray_dr.recovery.quarantine import usable
from ray_dr.simulator.breach import must
from ray_dr.simulator.things import Agent, Worker
from ray_dr.simulator.training import Doing

if TYPE_CHECKING:
    from ray_dr.simulator.host import Supervisor
    from ray_dr.simulator.world import World

EVER_S = 1e6


def attempt_begins(world: World, host: Supervisor, group: Group) -> None:
    """What must hold when the machine forms a group. Raises Breach."""
    world.advance()
    agents = dict.fromkeys(host.perform.agents.values())
    _is_new(world, group.attempt)
    restore, found = group.restore, world.version(group.restore)
    there = restore in host.stored or (found is not None and found.available(agents, world.clock.now + EVER_S))
    fit = restore is None or usable(restore, host.state.rollbacks)
    must(fit, f"{restore} was saved after training went wrong")
    must(restore is None or there, f"the version to restore, {restore}, is nowhere")
    _keeps_word(world, host, restore, agents)
    world.tally.begins(group, world.run, world.clock.now)
    world.write_down(host, group.attempt)


def adopts(group: Group, workers: Collection[Worker]) -> None:
    """What must hold when a new supervisor takes a group over. Raises Breach."""
    ranks = max((len(worker.run.members) for worker in workers if worker.run and worker.run.attempt == group.attempt), default=0)
    must(len(group.members) == ranks, f"I8: attempt {group.attempt} has {ranks} ranks, {len(group.members)} are taken over")


def _is_new(world: World, attempt: int) -> None:
    near = {agent: None for agent in world.agents() if agent.node.answers}
    left = [version.id for version in world.versions() if any(True for _ in version.held(near, world.clock.now))]
    taken = max([0, *(version.attempt for version in (*left, *world.bucket.committed))])
    must(attempt > taken, f"I8: there are versions of attempt {taken}, and {attempt} begins")


def _keeps_word(world: World, host: Supervisor, restore: VersionId | None, agents: Collection[Agent]) -> None:
    """I6, by what there was when the version was looked for: none older than the committed one is restored, and one of which
    every copy was made is lost only with as many nodes as there are copies."""
    known, armed = host.perform.promised
    must(known is None or (restore is not None and restore >= known), f"I6: {restore} is older than the committed {known}")
    if armed is not None and (restore is None or restore < armed.id):
        gone = [agent for agent in armed.run.keepers if agent not in agents or not agent.alive or not agent.holds(armed)]
        copies = min(world.swarm.job.memory.copies, len(armed.run.keepers))
        must(len(gone) >= copies,
             f"I6: {armed.id} had {copies} copies, {len(gone)} nodes are gone, and {restore} is restored")  # fmt: skip
    world.armed = None


def expect_well(world: World, after: str) -> None:
    """What must hold of a job that had enough time without faults. Raises Breach."""
    supervisor, run = world.supervisor, world.run
    must(supervisor is not None and supervisor.opened, f"I9: no supervisor {after}")
    assert supervisor is not None, "just said"
    phase = supervisor.state.phase
    must(isinstance(phase, Running), f"I9: the job is {type(phase).__name__} {after}")
    assert isinstance(phase, Running), "just said"
    must(run is not None and run.doing is Doing.GOING and run.rate > 0, f"I9: the job is said to run, and makes no steps {after}")
    assert run is not None, "just said"
    must(run.group == phase.group, f"I8: attempt {run.attempt} runs, and {phase.group.attempt} is said to")
    ready = {worker for node in supervisor.state.nodes for worker in node.ready}
    must(ready >= {worker.id for worker in run.members}, "the members are known to be up")
    must(not leaks(world), f"I10: left over: {', '.join(leaks(world))}")


def leaks(world: World) -> list[str]:
    """Processes of the job that its supervisor does not know of."""
    if world.supervisor is None:
        return []
    known = world.supervisor.perform
    agents = [agent.node.id for agent in world.agents() if known.agents.get(agent.node.id) is not agent]
    return [*agents, *(worker for node in world.nodes.values() for worker in node.workers if worker not in known.workers)]
