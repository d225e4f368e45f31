"""What the world holds its supervisor to: checked from the outside, with the truth at hand.

The numbers are those of the architecture's list of invariants.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.data import share
from ray_dr.model.recovery import Failed, Finished, Finishing, Group, Running
from ray_dr.recovery.fleet import usable_nodes
from ray_dr.recovery.preemption import Choice, choose
from ray_dr.recovery.quarantine import usable
from ray_dr.simulator.breach import must
from ray_dr.simulator.detection import rates
from ray_dr.simulator.things import Agent, Node, Worker
from ray_dr.simulator.training import Doing

if TYPE_CHECKING:
    from ray_dr.simulator.host import Supervisor
    from ray_dr.simulator.world import World

EVER_S = 1e6
BATCH = 97
"""Samples in a step: prime, so that no number of ranks divides it."""
AT_WORK_S = 60.0
"""What a supervisor may have begun just before a notice takes no longer."""


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
    _uses_each_once(group)
    world.tally.begins(group, world.run, world.clock.now)
    world.write_down(host, group.attempt)


def _uses_each_once(group: Group) -> None:
    """I7, by the shares that the ranks of this attempt take of its first step: they go on where the version's ended, and none is
    left out or used twice."""
    world, step = len(group.members), group.restore.step if group.restore else 0
    batch = BATCH if world <= BATCH else 2 * world + 1
    at = step * batch
    for rank in range(world):
        piece = share(step, global_batch=batch, rank=rank, world=world)
        must(piece.first == at, f"I7: rank {rank} of {world} begins at sample {piece.first}, not at {at}")
        at = piece.last
    must(at == (step + 1) * batch, f"I7: a step of {world} ranks ends at sample {at}, not at {(step + 1) * batch}")


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
        gone = [agent for agent in armed.keepers if agent not in agents or not agent.alive or not agent.holds(armed)]
        copies = min(world.swarm.job.memory.copies, len(armed.keepers))
        must(len(gone) >= copies,
             f"I6: {armed.id} had {copies} copies, {len(gone)} nodes are gone, and {restore} is restored")  # fmt: skip
    found = world.version(restore)
    rescued = found is not None and found.staged_by and not found.armed(world.clock.now) and restore not in host.stored
    if not (rescued and armed is not None and armed.armed(world.clock.now)):
        world.armed = None  # else it stays until what was rescued has its copies


@dataclass(frozen=True, slots=True)
class InTime:
    """A notice that came early enough, when nothing else was wrong; `disturbed`, `lost_steps`: the world's counts then."""

    disturbed: int
    lost_steps: int


def notice_given(world: World, node: Node) -> InTime | None:
    """What is promised about a node that is to be taken away; None: nothing."""
    run, host, swarm = world.run, world.supervisor, world.swarm
    if node.leaves_at is None or run is None or run.doing is not Doing.GOING or host is None:
        return None
    well = all(other.answers and other.slow == 1.0 for other in world.nodes.values())
    alone = sum(other.leaves_at is not None for other in world.nodes.values()) == 1
    calm = well and alone and not world.bucket.down and world.bucket.slow == 1.0 and not swarm.call_lost and not swarm.poison
    if not calm or not isinstance(host.state.phase, Running) or run.group != host.state.phase.group:
        return None
    stays = usable_nodes(host.state) - (node in run.nodes)
    enough = stays >= host.policy.min_nodes_to_run
    plan = choose(node.leaves_at - world.clock.now - AT_WORK_S, rates(swarm), enough_stay=enough, alone=True)
    return None if plan.choice is Choice.NOTHING else InTime(world.disturbed, world.tally.lost_steps)


def left_in_time(world: World, node: Node, promised: InTime | None) -> None:
    """What must hold at the end of a node that was promised to be left in time. Raises Breach."""
    run, host = world.run, world.supervisor
    if promised is None or promised.disturbed != world.disturbed or world.over or run is None or host is None:
        return
    kept = world.tally.lost_steps == promised.lost_steps
    must(kept, f"I6: steps were lost although {node.id} said in time that it would leave")
    if isinstance(host.state.phase, Finishing | Finished | Failed):
        return
    inside = node in run.nodes and run.doing in (Doing.GOING, Doing.JOINING)
    must(not inside, f"attempt {run.attempt} is at work on {node.id}, which said in time that it would leave")
    restorable = max([*host.stored, *(v.id for v in world.versions() if v.available(_others(world, node), world.clock.now))],
                     default=None)  # fmt: skip
    here = run.steps(world.clock.now) if node in run.nodes else 0
    must(not here or (restorable is not None and restorable.step >= here), f"I6: step {here} is nowhere but on {node.id}")


def _others(world: World, node: Node) -> dict[Agent, None]:
    return {agent: None for agent in world.agents() if agent.node is not node and agent.node.answers}


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
