"""What a job does about a node that will be taken away: what can be finished in time, and no more.

Theory of operation. A notice (`NodeLeaving`) makes a *departure*: the node counts no more as one the job has, another is
asked for at once, and no next group is formed with it. A running group with members there goes on from a common step:

    move         enough nodes stay: it stops, saves to memory, and the next group, without the node, begins from exactly there
    delta, full  too few stay: it stops and saves to every store, then waits for capacity and resumes
    nothing      the time is too short for that: the loss of the node will be as any other, but charged to no budget

The first that is certain to be done MARGIN_S before the deadline is taken; how long it takes comes with the notice. The node's
agent stays until the next group has done its first step, and so has read what it needs, or until all is in the store.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum

from ray_dr.model.actions import Action, CloseJob, Decision, ReleaseNode, SaveFinal, StopGroup
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.departure import Departure, Rates
from ray_dr.model.events import NodeLeaving, Saved
from ray_dr.model.recovery import (
    Draining,
    FailureKind,
    Finished,
    Finishing,
    Group,
    Incident,
    Policy,
    Recovering,
    Resizing,
    Running,
    State,
    Suspended,
)
from ray_dr.recovery.fleet import drop, find, request_missing, start_missing, usable_nodes
from ray_dr.recovery.groups import form, take_inventory
from ray_dr.recovery.words import also, count, ignored

AGREE_S = 0.5
"""Until a group has agreed on the step to stop at, beside the step it is in and the one before it stops."""
MARGIN_S = 1.0
"""So long before the deadline all must be done: clocks differ, and notices are rounded."""
EARLIER_S = 1.0
"""A further notice for the same node is news only when the node leaves so much earlier."""


class Choice(StrEnum):
    """What is done about a departure, the best first."""

    MOVE = "move"
    DELTA = "delta"
    FULL = "full"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done in the `left_s` seconds there are. `needs_s`: until nothing is lost with the node any more, as expected; of
    "nothing": what the best would have needed."""

    choice: Choice
    needs_s: float
    left_s: float


def choose(left_s: float, rates: Rates, *, enough_stay: bool, alone: bool) -> Plan:
    """The best of what can be finished in `left_s` seconds.

    enough_stay   the job can go on with the nodes that stay
    alone         one node leaves: the copies of its parts lie on nodes that stay
    A later deadline never gives a worse choice.
    """
    stop_s = AGREE_S + 2 * rates.step_s
    if enough_stay:
        copied = rates.copies and alone
        wanted, after_s = Choice.MOVE, rates.copied_s if copied else rates.staged_s + rates.resume_s
    elif rates.committed:
        wanted, after_s = Choice.DELTA, rates.delta_s
    else:
        wanted, after_s = Choice.FULL, rates.full_s
    needs_s = stop_s + after_s
    return Plan(wanted if needs_s + MARGIN_S <= left_s else Choice.NOTHING, needs_s, left_s)


# --------------------------------------------------------------------------------------------------------------- notices


def node_leaving(state: State, event: NodeLeaving, policy: Policy) -> Decision:
    """A node will be taken away."""
    if find(state, event.node) is None:
        return ignored(state, f"node {event.node} is to be taken away ({event.how}), and not part of the job")
    known = next((departure for departure in state.departures if departure.node == event.node), None)
    if known is not None and not event.deadline < known.deadline - EARLIER_S:
        return ignored(state, f"node {event.node} is known to leave")
    others = tuple(departure for departure in state.departures if departure is not known)
    state = replace(state, departures=(*others, Departure(event.node, event.deadline, event.how, event.rates)))
    asks: tuple[Action, ...] = ()
    if not isinstance(state.phase, Finishing) and not (isinstance(state.phase, Draining) and not state.phase.suspends):
        state, asks = request_missing(state, policy)
    said = Decision(state, asks, f"node {event.node} leaves {_when(event.deadline - event.at)} ({event.how})")
    match state.phase:
        case Running():
            return considered(said, event.at, policy)
        case Suspended() if state.attempt:
            return also(said, _look_and_save(state, event.at, policy))
        case Draining(suspends=True) as phase:
            sooner = min(phase.deadline, event.deadline)
            return replace(said, state=replace(state, phase=replace(phase, deadline=sooner)))
        case Draining() | Finishing():
            return replace(said, reason=f"{said.reason}: the job is ending")
        case _:
            return replace(said, reason=f"{said.reason}: the next group is formed without it")


def considered(decision: Decision, at: float, policy: Policy) -> Decision:
    """The decision, and what a group that runs now does about those of its nodes that leave."""
    state = decision.state
    phase = state.phase
    if not state.departures or not isinstance(phase, Running) or state.done:
        return decision
    members = frozenset(phase.group.members)
    mine = [departure for departure in state.departures if not members.isdisjoint(_ready(state, departure.node))]
    if not mine:
        return decision
    first = min(mine, key=lambda departure: departure.deadline)
    stays = usable_nodes(state)
    enough, alone = stays >= policy.min_nodes_to_run, len(state.departures) == 1
    plan = choose(first.deadline - at, first.rates, enough_stay=enough, alone=alone)
    return also(decision, _carry_out(state, phase.group, plan, at, stays, policy))


def _carry_out(state: State, group: Group, plan: Plan, at: float, stays: int, policy: Policy) -> Decision:
    attempt, within = group.attempt, f"expected to take {plan.needs_s:.1f} s, {_left(plan.left_s)}"
    match plan.choice:
        case Choice.MOVE:
            what = f"attempt {attempt} stops at its next common step, and goes on from there on {count(stays, 'node')}"
            after = replace(state, phase=Resizing(group, (), at))
            return Decision(after, (StopGroup(attempt, everywhere=False),), f"preemption: {what} ({within})")
        case Choice.DELTA | Choice.FULL:
            need, size = policy.min_nodes_to_run, "what has changed" if plan.choice is Choice.DELTA else "all of it"
            what = f"only {stays} of the {need} nodes it takes stay: attempt {attempt} stops and saves {size} to every store"
            deadline = min(at + plan.left_s, at + policy.start_s)
            after = replace(state, phase=Draining(group, state.done, deadline, suspends=True))
            return Decision(after, (StopGroup(attempt, everywhere=True),), f"preemption: {what} ({within})")
        case Choice.NOTHING:
            what = f"too soon for a {'move' if stays >= policy.min_nodes_to_run else 'save'} ({within})"
            return Decision(state, (), f"preemption: {what}: attempt {attempt} goes on until the node is gone")


# ---------------------------------------------------------------------------------------- the way of a group that stops


def stopped(state: State, group: Group, version: VersionId, at: float, policy: Policy) -> Decision:
    """All members have stopped at `version`: the next group; or, where too many nodes leave, it goes to the store."""
    if state.departures and usable_nodes(state) < policy.min_nodes_to_run:
        return _save(state, Draining(group, group.members, _last(state, at, policy), version.step, suspends=True), version)
    return form(state, version, at, policy)


def keep_found(state: State, phase: Recovering, at: float, policy: Policy) -> Decision | None:
    """Too few nodes stay, and what was found may lie in the memory of those that leave: it is saved while they are there."""
    if not state.departures or not isinstance(phase.found, VersionId) or _last(state, at, policy) <= at:
        return None
    return _save(state, Draining(None, (), _last(state, at, policy), suspends=True), phase.found)


def released(decision: Decision, policy: Policy) -> Decision:
    """The decision, and the nodes that leave and that nobody needs any more given back: a group runs without them."""
    state = decision.state
    phase = state.phase
    if not state.departures or not isinstance(phase, Running):
        return decision
    members = frozenset(phase.group.members)
    free = [departure.node for departure in state.departures if members.isdisjoint(_ready(state, departure.node))]
    return also(decision, _give_back(state, free, policy)) if free else decision


def waits_instead(decision: Decision, event_is: type, at: float, policy: Policy) -> Decision:
    """A stop that nobody asked for ends in waiting for capacity, not in the job's end; what leaves is given back once all is in
    the stores."""
    if not isinstance(decision.state.phase, Finished) or not decision.state.phase.drained:
        return decision
    state = replace(decision.state, phase=Suspended(None, at), done=())
    kept = tuple(action for action in decision.actions if not isinstance(action, CloseJob))
    reason = f"{decision.reason.removesuffix(': drained')}: waiting for capacity"
    state, asks = request_missing(state, policy)
    state, starts = start_missing(state, policy)
    waiting = Decision(state, (*kept, *asks, *starts), reason)
    leaving = [departure.node for departure in state.departures]
    return also(waiting, _give_back(state, leaving, policy)) if event_is is Saved and leaving else waiting


def excused(state: State, members: Collection[str], incident: Incident) -> bool:
    """Whether an incident is charged to nobody: a node that was to leave went, or the group broke that still had members there.
    As no next group has any, that happens once per notice."""
    if incident.kind is FailureKind.PREEMPTED:
        return True
    if incident.kind is FailureKind.USER_ERROR or not state.departures:
        return False
    there = {worker for departure in state.departures for worker in _workers(state, departure.node)}
    return not there.isdisjoint(members)


def loss_kind(state: State, node: str) -> FailureKind:
    """What the loss of a node of the job is."""
    announced = any(departure.node == node for departure in state.departures)
    return FailureKind.PREEMPTED if announced else FailureKind.NODE_LOST


def _save(state: State, phase: Draining, version: VersionId) -> Decision:
    after = replace(state, phase=replace(phase, saving=version), done=())
    what = f"preemption: too few nodes stay: saving step {version.step} of attempt {version.attempt} everywhere"
    return Decision(after, (SaveFinal(version.attempt, version.step),), what)


def _look_and_save(state: State, at: float, policy: Policy) -> Decision:
    state = replace(state, phase=Draining(None, (), _last(state, at, policy), suspends=True))
    return also(Decision(state, (), "preemption: the newest version is saved everywhere"), take_inventory(state, at, policy))


def _give_back(state: State, nodes: Collection[str], policy: Policy) -> Decision:
    for node in nodes:
        state = drop(state, node)
    state, asks = request_missing(state, policy)
    releases = tuple(ReleaseNode(node) for node in nodes)
    return Decision(state, (*releases, *asks), f"preemption: nobody needs anything of {', '.join(nodes)} any more: given back")


def _last(state: State, at: float, policy: Policy) -> float:
    """Until when anybody who leaves is there."""
    return min(max(departure.deadline for departure in state.departures), at + policy.start_s)


def _ready(state: State, node: str) -> tuple[str, ...]:
    known = find(state, node)
    return known.ready if known is not None else ()


def _workers(state: State, node: str) -> tuple[str, ...]:
    known = find(state, node)
    return (*known.ready, *known.lost) if known is not None else ()


def _when(left_s: float) -> str:
    return "at a time nobody told" if left_s == math.inf else f"in {max(0.0, left_s):.0f} s"


def _left(left_s: float) -> str:
    return "and nobody said how many there are" if left_s == math.inf else f"{max(0.0, left_s):.1f} s are left"
