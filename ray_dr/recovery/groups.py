"""Groups: which one is live, when a next one can begin, and its forming."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ray_dr.model.actions import Decision, FormGroup, TakeInventory
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.recovery import (
    Draining,
    Finishing,
    Group,
    Policy,
    Queued,
    Recovering,
    Resizing,
    Running,
    Starting,
    State,
    Suspended,
)
from ray_dr.recovery.fleet import are_full, ranked, ready_workers, staying, usable_nodes
from ray_dr.recovery.quarantine import settled
from ray_dr.recovery.standbys import in_words, takers
from ray_dr.recovery.words import count


def group_of(state: State) -> Group | None:
    """The group whose members are in `train`, or have just left it together."""
    match state.phase:
        case Starting(group) | Running(group) | Resizing(group) | Finishing(group):
            return group
        case Draining() as phase:
            return phase.group
        case _:
            return None


def can_begin(state: State, at: float, policy: Policy) -> bool:
    """Whether a queued or suspended job has the nodes to form a group."""
    if isinstance(state.phase, Suspended):
        return at >= state.not_before and usable_nodes(state) >= policy.min_nodes_to_run
    begins = begins_at(state, policy)
    return begins is not None and at >= begins and usable_nodes(state) >= policy.min_nodes_to_run


def begins_at(state: State, policy: Policy) -> float | None:
    """Not before when a queued job can begin, should nothing change: UTC seconds; None: not with these nodes.

    One that has begun before goes on with as few as after a loss, once the others had the time to come: it may be all
    there is left, and a supervisor's own end is no reason to wait for more.
    """
    if are_full(state, policy.nodes_max, policy):
        return 0.0
    if are_full(state, max(policy.nodes_min, policy.min_nodes_to_run), policy):
        return state.changed_at + policy.settle_s
    if state.attempt and staying(state) >= policy.min_nodes_to_run:
        return state.changed_at + max(policy.settle_s, policy.start_s)
    return None


def take_inventory(state: State, at: float, policy: Policy) -> Decision:
    """The host is asked for the newest version; whatever it was asked before no longer counts."""
    match state.phase:
        case Queued() as queued:
            state, incident = replace(state, phase=replace(queued, asked=True)), 0
        case Suspended() as suspended:
            state, incident = replace(state, phase=replace(suspended, asked=True)), state.incidents
        case Recovering() as recovering:
            state, incident = replace(state, phase=replace(recovering, found=None)), recovering.incident.number
        case _:
            incident = state.incidents
    state = replace(state, asks=state.asks + 1, retry_at=at + policy.start_s)
    return Decision(state, (TakeInventory(incident, state.asks),), "looking for the newest version")


def answered(state: State) -> State:
    """The state without its open question."""
    return replace(state, retry_at=None)


def restore_of(found: VersionId | Literal["scratch"] | None) -> VersionId | None:
    """What a group restores: None is from scratch."""
    return found if isinstance(found, VersionId) else None


def form(state: State, restore: VersionId | None, at: float, policy: Policy) -> Decision:
    """The next attempt begins with every worker that is up and stays, but for those that stand by."""
    if isinstance(state.phase, Recovering):
        assert not state.phase.unwinding, "a member of a broken group cannot be in the next one"
    # A version may be of an attempt that no journal told this supervisor of: its number is taken.
    newest = max(state.attempt, restore.attempt if restore else 0)
    group = Group(newest + 1, ranked(state, policy), restore)
    assert group.members, "a group has members"
    assert set(group.members) <= set(ready_workers(state)), "members are up"
    source = f"step {restore.step} of attempt {restore.attempt}" if restore else "scratch"
    members = frozenset(group.members)
    nodes = sum(not members.isdisjoint(node.ready) for node in state.nodes)
    size = f"{count(len(group.members), 'worker')} on {count(nodes, 'node')}"
    taken = takers(state.order, group.members) if policy.has_standbys else ()
    places = f": {in_words(taken)}" if taken else ""
    after = replace(answered(state), phase=Starting(group, at), attempt=group.attempt, order=group.members, done=())
    after = replace(after, rollbacks=settled(state.rollbacks, restore)) if state.rollbacks else after
    return Decision(after, (FormGroup(group),), f"attempt {group.attempt} begins with {size} from {source}{places}")
