"""Incidents: how one begins, what a further loss makes of it, and when the job is given up.

The root cause gives an incident its kind and subject. A loss is a root cause; an exception of the program is one unless
a loss shows; a broken collective is only what others see of somebody's end, and is set aside as soon as an end shows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ray_dr.model.actions import AbortGroup, Action, CloseJob, Decision
from ray_dr.model.recovery import (
    Draining,
    Failed,
    FailureKind,
    Group,
    Incident,
    Policy,
    Recovering,
    Resizing,
    Starting,
    State,
)
from ray_dr.model.signal import FaultKind
from ray_dr.recovery import budget, preemption
from ray_dr.recovery.causes import first_cause
from ray_dr.recovery.fleet import ranked, ready_workers, request_missing, start_missing, usable_nodes
from ray_dr.recovery.groups import take_inventory
from ray_dr.recovery.standbys import in_words, takers
from ray_dr.recovery.words import also, count, describe

SYMPTOMS = (FailureKind.GROUP_BROKEN, FailureKind.START_TIMEOUT)
NODE_GONE = (FailureKind.NODE_LOST, FailureKind.PREEMPTED)


def next_incident(
    state: State, kind: FailureKind, subject: str, at: float, step: int, detail: str, cause: FaultKind | None = None
) -> Incident:
    """An incident with the next number; it counts only once it is begun. `cause`: where more is known than its kind says."""
    return Incident(state.incidents + 1, kind, subject, at, step, detail, cause or first_cause(kind, detail))


def note_step(state: State, step: int) -> State:
    """The state, knowing that `step` is done. A user error that was got past is no longer the last one."""
    if state.last_error is not None and step > state.last_error[1]:
        state = replace(state, last_error=None)
    return replace(state, step=max(state.step, step))


def absent_members(state: State, group: Group) -> tuple[str, ...]:
    """Members that are not up."""
    ready = frozenset(ready_workers(state))
    return tuple(worker for worker in group.members if worker not in ready)


def begin(state: State, group: Group, incident: Incident, policy: Policy, *, gone: Collection[str] = ()) -> Decision:
    """The group is broken: survivors leave, the newest version is looked for, and what is missing is asked for.

    gone   members that left by themselves; those that are not up any more need not be named
    """
    unwinding = _still_inside(state, group, gone)
    if preemption.excused(state, group.members, incident):
        incident = replace(incident, cause=FaultKind.PREEMPTION)
    state, over = budget.charge(note_step(state, incident.step), incident, policy)
    if over is not None:
        return fail(state, group.attempt, unwinding, over.reason, resubmit=over.resubmit)
    phase = Recovering(incident, unwinding, None, incident.at, group.attempt, group.restore)
    state = replace(state, phase=phase, incidents=incident.number, done=(), plan=None)
    state, requests = request_missing(state, policy)
    state, starts = start_missing(state, policy)
    reason = f"{describe(incident)}: {_remaining(state, group, policy)}"
    decision = Decision(state, (*_abort(group.attempt, unwinding), *requests, *starts), reason)
    return also(decision, take_inventory(state, incident.at, policy))


def fail(state: State, attempt: int, unwinding: tuple[str, ...], reason: str, *, resubmit: bool) -> Decision:
    """The job is over: members are freed from what they wait in, and everything ends."""
    after = replace(state, phase=Failed(reason, resubmit))
    return Decision(after, (*_abort(attempt, unwinding), CloseJob("failed")), reason)


def group_broken(state: State, group: Group, at: float, detail: str, policy: Policy) -> Decision:
    """An incident in which nobody is known to have died."""
    subject = f"attempt {group.attempt}"
    incident = next_incident(state, FailureKind.GROUP_BROKEN, subject, at, state.step, detail)
    return begin(state, group, incident, policy)


def start_timed_out(state: State, phase: Starting, at: float, policy: Policy) -> Decision:
    """A group that does not get to its first step is broken."""
    detail = f"no first step within {policy.start_s:g} s"
    subject = f"attempt {phase.group.attempt}"
    incident = next_incident(state, FailureKind.START_TIMEOUT, subject, at, state.step, detail)
    return begin(state, phase.group, incident, policy)


def adopt_broken(state: State, group: Group, absent: tuple[str, ...], at: float, policy: Policy, *,
                 gone: Collection[str] = ()) -> Decision:  # fmt: skip
    """A group found, but not whole, or of an attempt that another one was to follow, or one that everybody has left (`gone`)."""
    if absent:
        kind, subject, detail = FailureKind.WORKER_LOST, absent[0], "ended while no supervisor watched"
    else:
        kind, subject = FailureKind.GROUP_BROKEN, f"attempt {group.attempt}"
        detail = "its members left while no supervisor watched" if gone else f"attempt {state.attempt} was to follow"
    incident = next_incident(state, kind, subject, at, state.step, detail)
    return begin(state, group, incident, policy, gone=gone)


def user_error(state: State, group: Group, incident: Incident, policy: Policy) -> Decision:
    """The program raised. Once may be the machine's fault; the same error at the same step again is the program's."""
    error = (incident.detail, incident.step)
    if state.last_error == error:
        unwinding = _still_inside(state, group, (incident.subject,))
        return fail(state, group.attempt, unwinding, again(incident), resubmit=False)
    decision = begin(state, group, incident, policy, gone=(incident.subject,))
    return replace(decision, state=replace(decision.state, last_error=error))


def again(incident: Incident) -> str:
    """Why the same error twice ends the job."""
    return f"{describe(incident)}, the second time: the program fails there, so submitting it again cannot help"


def further_loss(state: State, phase: Recovering, loss: Incident, workers: Collection[str], policy: Policy) -> Decision:
    """A loss while the group is being recovered. `workers`: whom it took.

    Versions are looked for again where a node went: copies may be gone with it.
    """
    unwinding = tuple(worker for worker in phase.unwinding if worker not in workers)
    incident = phase.incident
    reason = describe(loss)
    if _explains(loss, incident, state, workers):
        reason = f"{reason} is the cause of incident {incident.number}; {describe(incident)} is set aside"
        if incident.kind is FailureKind.USER_ERROR:
            state = replace(state, last_error=None)
        incident = replace(loss, number=incident.number, at=incident.at)
        state = budget.recharge(state, incident, policy)
    writes = phase.rescue_until and any(standing.worker in workers for standing in phase.standing)
    rescue_until = 0.0 if writes else phase.rescue_until  # without one of them there will be no rescue
    state = replace(state, phase=replace(phase, incident=incident, unwinding=unwinding, rescue_until=rescue_until))
    state, requests = request_missing(state, policy)
    state, starts = start_missing(state, policy)
    decision = Decision(state, (*requests, *starts), reason)
    if loss.kind not in NODE_GONE:
        return decision
    return also(decision, take_inventory(state, loss.at, policy))


def _explains(loss: Incident, incident: Incident, state: State, workers: Collection[str]) -> bool:
    """Whether a later loss is what an incident began with: it took a member, and only symptoms were seen before."""
    if incident.kind is FailureKind.WORKER_LOST:
        return loss.kind in NODE_GONE and incident.subject in workers
    return incident.kind not in NODE_GONE and any(worker in state.order for worker in workers)


def _still_inside(state: State, group: Group, gone: Collection[str]) -> tuple[str, ...]:
    """Members that are up and have not left the attempt, in rank order."""
    stopped = state.phase.stopped if isinstance(state.phase, Resizing | Draining) else ()
    out = {*gone, *stopped, *state.done}
    ready = frozenset(ready_workers(state))
    return tuple(worker for worker in group.members if worker in ready and worker not in out)


def _remaining(state: State, group: Group, policy: Policy) -> str:
    left = len(group.members) - len(absent_members(state, group))
    of = f"{left} of {count(len(group.members), 'worker')}"
    if policy.has_standbys and (taken := takers(group.members, ranked(state, policy))):
        return f"{of} left, standby {in_words(taken)}"
    return f"going on with {of}" if usable_nodes(state) >= policy.min_nodes_to_run else f"{of} left"


def _abort(attempt: int, members: tuple[str, ...]) -> tuple[Action, ...]:
    return (AbortGroup(attempt, members),) if members else ()
