"""Training itself went wrong: back to before it.

What was saved since is worth nothing, however new: no later recovery, also one by another supervisor, may go on from it
(`recovery.quarantine`). Where the samples did it, those between the version that is gone on from and the last step done do not
come again. This is the one kind of failure in which recovering could go on for ever and make things worse each time, so
there is a limit that new steps don't lift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ray_dr.model.actions import Action, Decision, KillWorker, ReleaseNode
from ray_dr.model.events import Corrupted, Diverged
from ray_dr.model.recovery import FailureKind, Group, Policy, Resizing, Rollback, Running, Starting, State
from ray_dr.recovery import incidents
from ray_dr.recovery.capacity import write_off
from ray_dr.recovery.fleet import drop, usable_nodes
from ray_dr.recovery.groups import group_of
from ray_dr.recovery.quarantine import windows
from ray_dr.recovery.words import count, ignored


def diverged(state: State, event: Diverged, policy: Policy) -> Decision:
    """Back to before the onset, and past the samples that led there; or the end, when that was done often enough."""
    group = _at_work(state, event.attempt)
    if group is None:
        return ignored(state, f"attempt {event.attempt} does not run")
    back = Rollback(event.attempt, max(0, event.onset - 1), event.step, event.batch, scratch=group.restore is None, why=event.how)
    if sum(earlier.diverged for earlier in state.rollbacks) >= policy.rollbacks:
        return incidents.fail(state, group.attempt, _inside(state, group), _report(state, back), resubmit=False)
    incident = incidents.next_incident(
        state, FailureKind.DIVERGED, f"attempt {group.attempt}", event.at, event.step, event.how
    )  # fmt: skip
    return incidents.begin(replace(state, rollbacks=(*state.rollbacks, back)), group, incident, policy)


def corrupted(state: State, event: Corrupted, policy: Policy) -> Decision:
    """Back to when the replicas were the same. Who is known to be wrong goes: with its node, where enough others are left."""
    group = _at_work(state, event.attempt)
    if group is None:
        return ignored(state, f"attempt {event.attempt} does not run")
    workers = tuple(worker for worker in group.members if worker in event.workers)
    back = Rollback(event.attempt, event.good, event.step, scratch=group.restore is None, diverged=False, why=event.how)
    subject = workers[0] if workers else f"attempt {group.attempt}"
    incident = incidents.next_incident(state, FailureKind.CORRUPTION, subject, event.at, event.step, event.how)
    after, ends = _without(replace(state, rollbacks=(*state.rollbacks, back)), workers, policy)
    decision = incidents.begin(after, group, incident, policy)
    return replace(decision, actions=(*ends, *decision.actions))


def nothing_left(state: State, back: Rollback) -> Decision:
    """No version is left from before what went wrong, and the attempt had begun from one."""
    reason = f"no checkpoint from before step {back.good + 1} is left to go back to: {back.why}"
    return incidents.fail(state, state.attempt, (), reason, resubmit=False)


def _without(state: State, workers: Sequence[str], policy: Policy) -> tuple[State, tuple[Action, ...]]:
    """The state without these workers, and their nodes as far as the others suffice."""
    nodes = [node for node in state.nodes if any(worker in workers for worker in node.ready)]
    released: list[Action] = []
    for node in nodes:
        if usable_nodes(drop(state, node.id)) >= policy.min_nodes_to_run:
            state = replace(drop(state, node.id), requested=0)
            released.append(ReleaseNode(node.id))
    rest = [worker for node in nodes if node in state.nodes for worker in node.ready if worker in workers]
    return write_off(state, rest), (*(KillWorker(worker) for worker in rest), *released)


def _at_work(state: State, attempt: int) -> Group | None:
    group = group_of(state)
    stands = isinstance(state.phase, Starting | Running | Resizing)
    return group if stands and group is not None and group.attempt == attempt else None


def _inside(state: State, group: Group) -> tuple[str, ...]:
    stopped = state.phase.stopped if isinstance(state.phase, Resizing) else ()
    absent = incidents.absent_members(state, group)
    return tuple(worker for worker in group.members if worker not in (*stopped, *state.done, *absent))


def _report(state: State, last: Rollback) -> str:
    """Why no further step back is made, with steps and samples."""
    earlier = [back for back in state.rollbacks if back.diverged]
    told = [f"steps {(back.base or 0) + 1} to {back.last} ({back.why})" for back in earlier]
    left_out = ", ".join(f"{first} to {end - 1}" for first, end in windows(state.rollbacks)) or "none"
    times = f"after {count(len(earlier), 'step')} back" if earlier else "and no step back is allowed"
    before = f"; before that: {'; '.join(told)}; samples left out: {left_out}" if earlier else ""
    return f"training went wrong again at step {last.good + 1}, {times}: {last.why}{before}"
