"""Stopping on request: a common step, saved everywhere, within a deadline; else the newest version that is found."""

from __future__ import annotations

from dataclasses import replace

from ray_dr.model.actions import AbortGroup, Action, CloseJob, Decision, SaveFinal, StopGroup
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import StopRequested
from ray_dr.model.recovery import (
    Draining,
    Finished,
    Finishing,
    Group,
    Incident,
    Policy,
    Queued,
    Recovering,
    Resizing,
    Running,
    Starting,
    State,
    Suspended,
)
from ray_dr.recovery import incidents
from ray_dr.recovery.fleet import ready_workers
from ray_dr.recovery.groups import take_inventory
from ray_dr.recovery.words import also, describe, ignored


def stop_requested(state: State, event: StopRequested) -> Decision:
    """The job is asked to stop: at once where nothing runs, else when its state is saved."""
    deadline = event.at + event.within_s
    asked = f"asked to stop ({event.why})"
    match state.phase:
        case Queued() | Suspended():
            return _close(state, f"{asked}: no group runs")
        case Starting(group) | Running(group):
            return _stop(state, group, Draining(group, state.done, deadline), asked)
        case Resizing(group, stopped):
            left = tuple(dict.fromkeys((*stopped, *state.done)))
            return _stop(state, group, Draining(group, left, deadline, state.phase.at_step), asked)
        case Recovering() as recovering:
            return _save_what_is_found(state, recovering, deadline, asked)
        case Finishing(group):
            saving = VersionId(group.attempt, state.step)
            after = replace(state, phase=Draining(group, group.members, deadline, state.step, saving))
            return Decision(after, (), f"{asked}: the last version is being saved already")
        case Draining(suspends=True) as draining:
            after = replace(state, phase=replace(draining, suspends=False, deadline=min(deadline, draining.deadline)))
            return Decision(after, (), f"{asked}: it is being saved already, as its nodes leave")
        case Draining() as draining if deadline < draining.deadline:
            after = replace(state, phase=replace(draining, deadline=deadline))
            return Decision(after, (), f"{asked} again, and sooner: within {event.within_s:g} s")
        case _:
            return ignored(state, "the job is stopping already")


def left(state: State, phase: Draining, worker: str, at: float, step: int, policy: Policy) -> Decision:
    """A member has stopped or returned; when all have, what they stopped at is saved."""
    assert phase.group is not None, "who leaves was in a group"
    group = phase.group
    common = step if phase.at_step is None else phase.at_step
    gone = (*phase.stopped, worker)
    phase = replace(phase, stopped=gone, at_step=common)
    state = replace(state, phase=phase, step=max(state.step, step))
    if step != common:
        return fall_back(state, phase, f"{worker} stopped at step {step}, others at {common}", at, policy)
    if len(gone) < len(group.members) or not set(gone) >= set(group.members):
        return Decision(state, (), f"worker {worker} stopped at step {step}")
    return _save(state, phase, VersionId(group.attempt, common), f"all stopped at step {common}")


def lost(state: State, phase: Draining, loss: Incident, hit: bool, policy: Policy) -> Decision:
    """A loss while stopping. Once all members have stopped, their state is with the agents, and saved all the same."""
    what = describe(loss)
    if hit and phase.saving is None:
        return fall_back(state, phase, what, loss.at, policy)
    if phase.group is None and phase.saving is None:
        return also(Decision(state, (), what), take_inventory(state, loss.at, policy))
    return Decision(state, (), f"{what}: the job is stopping, and saves what it has")


def fall_back(state: State, phase: Draining, what: str, at: float, policy: Policy) -> Decision:
    """The common step cannot be reached or saved: the newest version there is gets saved instead, once."""
    if phase.suspends and phase.group is not None:
        return incidents.group_broken(state, phase.group, at, what, policy)
    if phase.group is None:
        if phase.saving is None:
            return ignored(state, f"{what}: the newest version is being looked for")
        return _close(state, f"{what}: what is committed so far is what a later run goes on from")
    unwinding = _inside(state, phase, phase.group)
    aborts: tuple[Action, ...] = (AbortGroup(phase.group.attempt, unwinding),) if unwinding else ()
    after = replace(state, phase=Draining(None, (), phase.deadline), done=())
    return also(Decision(after, aborts, what), take_inventory(after, at, policy))


def save_found(state: State, phase: Draining, newest: VersionId | None) -> Decision:
    """The newest version is saved everywhere; without one there is nothing to do."""
    if newest is None:
        return _close(state, "there is no version to save")
    return _save(state, phase, newest, f"step {newest.step} of attempt {newest.attempt} is the newest version")


def saved(state: State, phase: Draining, step: int) -> Decision:
    """All is safe. A job whose members had all returned meanwhile has not been cut short: it is finished."""
    if phase.group is not None and set(state.done) >= set(phase.group.members):
        after = replace(state, phase=Finished(drained=False))
        return Decision(after, (CloseJob("finished"),), f"the last checkpoint, step {step}, is committed: finished")
    return _close(state, f"step {step} is saved everywhere")


def out_of_time(state: State, phase: Draining) -> Decision:
    """The deadline ends the job, saved or not."""
    unsaved = f"step {phase.saving.step} was" if phase.saving else "anything newer was"
    return _close(state, f"the deadline passed before {unsaved} saved: a later run goes on from what is committed")


def _stop(state: State, group: Group, phase: Draining, asked: str) -> Decision:
    reason = f"{asked}: attempt {group.attempt} stops at its next common step and saves everywhere"
    return Decision(replace(state, phase=phase), (StopGroup(group.attempt, everywhere=True),), reason)


def _save_what_is_found(state: State, recovering: Recovering, deadline: float, asked: str) -> Decision:
    phase = Draining(None, (), deadline)
    state = replace(state, phase=phase)
    match recovering.found:
        case None:
            return Decision(state, (), f"{asked}: the newest version is saved once it is found")
        case "scratch":
            return _close(state, f"{asked}: there is no version to save")
        case VersionId() as found:
            return _save(state, phase, found, asked)


def _save(state: State, phase: Draining, version: VersionId, reason: str) -> Decision:
    after = replace(state, phase=replace(phase, saving=version))
    return Decision(after, (SaveFinal(version.attempt, version.step),), f"{reason}: saving it everywhere")


def _inside(state: State, phase: Draining, group: Group) -> tuple[str, ...]:
    inside = frozenset(ready_workers(state)).difference(phase.stopped)
    return tuple(worker for worker in group.members if worker in inside)


def _close(state: State, reason: str) -> Decision:
    return Decision(replace(state, phase=Finished(drained=True)), (CloseJob("drained"),), f"{reason}: drained")
