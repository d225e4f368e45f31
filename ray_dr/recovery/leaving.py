"""What it means that a worker has left `train`: on request, at its end, or by an exception."""

from __future__ import annotations

from dataclasses import replace

from ray_dr.model.actions import Decision, SaveFinal, StopGroup
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import WorkerRaised, WorkerReturned, WorkerStopped
from ray_dr.model.recovery import (
    Draining,
    FailureKind,
    Finishing,
    Group,
    Incident,
    Policy,
    Recovering,
    Resizing,
    Running,
    Starting,
    State,
)
from ray_dr.model.signal import FaultKind
from ray_dr.recovery import budget, draining, incidents, preemption
from ray_dr.recovery.groups import group_of
from ray_dr.recovery.row import place_of
from ray_dr.recovery.words import also, describe, ignored


def stopped(state: State, event: WorkerStopped, policy: Policy) -> Decision:
    """A member left on request, or out of a broken step."""
    stale = _not_inside(state, event)
    if stale:
        return ignored(state, stale)
    match state.phase:
        case Recovering() as recovering:
            return _unwound(state, recovering, event.worker, "left the broken step")
        case Starting(group) | Running(group):
            # Nobody here asked: a supervisor before this one did, and ended. Stopping is finished in its place.
            phase = Resizing(group, (), event.at)
            ask = Decision(replace(state, phase=phase), (StopGroup(group.attempt, everywhere=False),), "stopping")
            return also(ask, _one_stopped(ask.state, phase, event, policy))
        case Resizing() as resizing:
            return _one_stopped(state, resizing, event, policy)
        case Draining() as phase_draining:
            return draining.left(state, phase_draining, event.worker, event.at, event.step, policy)
        case _:
            raise AssertionError("nobody is inside an attempt in any other phase")


def returned(state: State, event: WorkerReturned, policy: Policy) -> Decision:
    """A member's `train` returned: the job is done when all have."""
    stale = _not_inside(state, event)
    if stale:
        return ignored(state, stale)
    if isinstance(state.phase, Recovering):
        return _unwound(state, state.phase, event.worker, "returned")
    state = replace(state, done=(*state.done, event.worker))
    match state.phase:
        case Starting(group) | Running(group) | Resizing(group) if _covered(group, state.done):
            return _all_returned(state, event)
        case Resizing() as resizing:
            return _one_stopped(state, resizing, event, policy)
        case Draining() as phase_draining:
            return draining.left(state, phase_draining, event.worker, event.at, event.step, policy)
        case _:
            return Decision(state, (), f"worker {event.worker} has returned, others are still at it")


def raised(state: State, event: WorkerRaised, policy: Policy) -> Decision:
    """A member left by an exception: a broken collective, or an error of the program."""
    stale = _not_inside(state, event)
    if stale:
        return ignored(state, stale)
    kind = FailureKind.GROUP_BROKEN if event.collateral else FailureKind.USER_ERROR
    cause = FaultKind.STORAGE if event.unreadable else None
    incident = incidents.next_incident(state, kind, event.worker, event.at, event.step, event.error, cause)
    match state.phase:
        case Recovering() as recovering:
            return _raised_while_recovering(state, recovering, incident, policy)
        case Starting(group) | Running(group) | Resizing(group) | Draining(group=Group() as group, suspends=True):
            if event.collateral:
                return incidents.begin(state, group, incident, policy, gone=(event.worker,))
            return incidents.user_error(state, group, incident, policy)
        case Draining() as phase_draining:
            return draining.fall_back(state, phase_draining, describe(incident), event.at, policy)
        case _:
            raise AssertionError("nobody is inside an attempt in any other phase")


def _not_inside(state: State, event: WorkerStopped | WorkerReturned | WorkerRaised) -> str:
    """Why a worker's word about an attempt does not count; empty when it is a member that had not left so far."""
    inside: tuple[str, ...] = ()
    left: tuple[str, ...] = state.done
    attempt = state.attempt
    match state.phase:
        case Recovering() as recovering:
            inside, attempt = recovering.unwinding, recovering.attempt
        case Resizing(group, stopped):
            inside, left, attempt = group.members, (*stopped, *state.done), group.attempt
        case Draining(group=group, stopped=stopped) if group is not None:
            inside, left, attempt = group.members, (*stopped, *state.done), group.attempt
        case Starting(group) | Running(group):
            inside, attempt = group.members, group.attempt
    if event.attempt != attempt:
        return f"attempt {event.attempt} is not the one at work"
    if place_of(event.worker, inside, state.order) is None or event.worker in left:
        return f"worker {event.worker} has no part in attempt {attempt} any more"
    return ""


def _covered(group: Group, left: tuple[str, ...]) -> bool:
    """Whether these are all members. Most often they are too few to be."""
    return len(left) >= len(group.members) and set(left) >= set(group.members)


def _unwound(state: State, phase: Recovering, worker: str, how: str) -> Decision:
    at = place_of(worker, phase.unwinding, state.order)
    assert at is not None, "who leaves was inside"
    unwinding = phase.unwinding[:at] + phase.unwinding[at + 1 :]
    rest = f"{len(unwinding)} to go" if unwinding else "all have"
    return Decision(replace(state, phase=replace(phase, unwinding=unwinding)), (), f"worker {worker} {how}, {rest}")


def _raised_while_recovering(state: State, phase: Recovering, incident: Incident, policy: Policy) -> Decision:
    """One more member is out. Its own error is the cause where only symptoms were seen; the same again is judged later.

    The error counts as the last one, so that its next occurrence ends the job.
    """
    decision = _unwound(state, phase, incident.subject, f"left by an exception ({incident.detail})")
    if incident.kind is FailureKind.GROUP_BROKEN or phase.incident.kind not in incidents.SYMPTOMS:
        return decision
    cause = replace(incident, number=phase.incident.number, at=phase.incident.at)
    recovering = decision.state.phase
    assert isinstance(recovering, Recovering), "unwinding does not end the phase"
    error = (incident.detail, incident.step)
    if state.last_error == error:
        reason = incidents.again(incident)
        return incidents.fail(decision.state, phase.attempt, recovering.unwinding, reason, resubmit=False)
    after = replace(decision.state, phase=replace(recovering, incident=cause), last_error=error)
    after = budget.recharge(after, cause, policy)
    return replace(decision, state=after, reason=f"{decision.reason}; it is the cause of incident {cause.number}")


def _one_stopped(state: State, phase: Resizing, event: WorkerStopped | WorkerReturned, policy: Policy) -> Decision:
    step = event.step if phase.at_step is None else phase.at_step
    left = (*phase.stopped, event.worker)
    state = incidents.note_step(replace(state, phase=replace(phase, stopped=left, at_step=step)), event.step)
    if event.step != step:
        what = f"{event.worker} stopped at step {event.step}, others at {step}"
        return incidents.group_broken(state, phase.group, event.at, what, policy)
    reason = f"worker {event.worker} stopped at step {step}"
    if not _covered(phase.group, (*left, *state.done)):
        return Decision(state, (), reason)
    version = VersionId(phase.group.attempt, step)
    return also(Decision(state, (), reason), preemption.stopped(state, phase.group, version, event.at, policy))


def _all_returned(state: State, event: WorkerReturned) -> Decision:
    group = group_of(state)
    assert group is not None, "members belong to a group"
    state = incidents.note_step(replace(state, phase=Finishing(group, event.at)), event.step)
    reason = f"every member has returned after step {event.step}: saving the last version"
    return Decision(state, (SaveFinal(group.attempt, event.step),), reason)
