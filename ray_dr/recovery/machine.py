"""One job's whole life, as a function: `step(state, event, policy) -> Decision(state, actions, reason)`.

Theory of operation. A job runs as a sequence of *attempts*; an attempt is a *group* of worker processes in rank order
and the version they began from. The state knows every node with a live agent and every worker that is up. An event
changes what is known (`_learn`); after that, whatever the phase was waiting for is looked at once (`_go_on`), so that
it does not matter which of the awaited things came last.

    Queued      waits for nodes_min full nodes, then for an inventory (incident 0), then forms the first group
    Starting    the group joins, restores, does a first step; too slow or broken: an incident
    Running     steps are done; idle workers that have settled make it Resizing; all returned: Finishing
    Resizing    the group stops at a common step, the next group goes on from exactly there
    Recovering  survivors leave the broken step while the host takes an inventory; both done: the next group, from the
                state they still have (`rescue`) where that is newer and whole, by the shortest way (`course`), which may
                be to wait a little for workers that are about to be up
    Suspended   the same, without enough nodes to go on
    Draining    asked to stop: common step, save everywhere, end; or the newest version there is, if the group is broken
    Finishing   the last version is being committed

Rules that hold throughout. A group is formed only of workers that are up and have left every earlier group. Nothing
said about an older attempt, an unknown node or an ended worker changes anything. A memory copy can vanish with a node,
so whatever was found before a node was lost is looked for again. Repetition is bounded: a row of attempts without a new
step ends the job (`budget`), and so does the same error of the program at the same step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from ray_dr.model.actions import Action, CloseJob, Decision, KillWorker, StopGroup
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import (
    ActionFailed,
    Adopted,
    Corrupted,
    Diagnosed,
    Diverged,
    Event,
    FencedOff,
    FirstStep,
    Hung,
    InventoryTaken,
    NodeJoined,
    NodeLeaving,
    NodeLost,
    Opened,
    Rescued,
    Saved,
    StopRequested,
    Tick,
    WorkerLost,
    WorkerRaised,
    WorkerReady,
    WorkerReturned,
    WorkerStopped,
)
from ray_dr.model.recovery import (
    Draining,
    Failed,
    Finished,
    Finishing,
    Policy,
    Queued,
    Recovering,
    Resizing,
    Running,
    Starting,
    State,
    Suspended,
)
from ray_dr.recovery import (
    budget,
    capacity,
    causes,
    course,
    divergence,
    draining,
    incidents,
    leaving,
    preemption,
    rescue,
)
from ray_dr.recovery.fleet import gained, ranked, request_missing, start_missing, staying, still_starting, usable_nodes
from ray_dr.recovery.groups import answered, begins_at, can_begin, form, take_inventory
from ray_dr.recovery.quarantine import out_of_reach
from ray_dr.recovery.words import NOTHING_DUE, also, count, ignored

OF_AN_ATTEMPT = ("FormGroup", "StopGroup", "SaveFinal", "Rescue")
"""Actions whose failure names the attempt they were for: it may come when another one is at work."""


def initial() -> State:
    """The state of a job whose supervisor has just begun."""
    return State(Queued())


def step(state: State, event: Event, policy: Policy) -> Decision:
    """What follows from an event. One that changes nothing gives the very same state, no actions, and the reason."""
    if isinstance(state.phase, Finished | Failed):
        return ignored(state, "the job is over")
    decision = course.asked(_learn(state, event, policy), event.at)
    if isinstance(state.phase, Draining) and state.phase.suspends:
        decision = preemption.waits_instead(decision, type(event), event.at, policy)
    if decision.state is not state or isinstance(event, Tick):
        decision = rescue.noted(decision, event)
        decision = _go_on(decision, event.at, policy)
    return decision


def _learn(state: State, event: Event, policy: Policy) -> Decision:
    match event:
        case Opened():
            return _opened(state, event, policy)
        case NodeJoined():
            return capacity.node_joined(state, event, policy)
        case NodeLost():
            return capacity.node_lost(state, event, policy)
        case WorkerReady():
            return capacity.worker_ready(state, event, policy)
        case WorkerLost():
            return capacity.worker_lost(state, event, policy)
        case Hung():
            return capacity.hung(state, event, policy)
        case Diverged():
            return divergence.diverged(state, event, policy)
        case Corrupted():
            return divergence.corrupted(state, event, policy)
        case WorkerRaised():
            return leaving.raised(state, event, policy)
        case WorkerStopped():
            return leaving.stopped(state, event, policy)
        case WorkerReturned():
            return leaving.returned(state, event, policy)
        case FirstStep():
            return preemption.considered(_first_step(state, event), event.at, policy)
        case InventoryTaken():
            return _inventory_taken(state, event, policy)
        case Saved():
            return _saved(state, event)
        case StopRequested():
            return draining.stop_requested(state, event)
        case FencedOff():
            return _fenced(state, event)
        case ActionFailed():
            return _action_failed(state, event, policy)
        case Adopted():
            return preemption.considered(_adopted(state, event, policy), event.at, policy)
        case NodeLeaving():
            return preemption.node_leaving(state, event, policy)
        case Tick():
            return _tick(state, event, policy)
        case Rescued():
            return rescue.ended(state, event, policy)
        case Diagnosed():
            return causes.diagnosed(state, event, policy)
        case _:
            assert_never(event)


def _go_on(decision: Decision, at: float, policy: Policy) -> Decision:
    """The decision, and what it makes possible: the next group, or the question that must be answered before one."""
    state = decision.state
    match state.phase:
        case Queued(asked=False) | Suspended(asked=False) if can_begin(state, at, policy):
            return also(decision, take_inventory(state, at, policy))
        case Recovering(unwinding=()) as phase if phase.found is not None:
            if (first := rescue.instead(state, phase, at, policy)) is not None:
                return also(decision, first) if first.actions else decision
            if usable_nodes(state) >= policy.min_nodes_to_run:
                return course.go_on(decision, phase, at, policy)
            return also(decision, preemption.keep_found(state, phase, at, policy) or _suspend(state, phase, at, policy))
        case Running() as phase:
            state = (decision := preemption.released(decision, policy)).state
            if not state.done and _can_grow(state, phase, at, policy):
                return also(decision, _resize(state, phase, at, policy))
            if not state.done and policy.standby_processes:
                return _refill_standbys(decision, policy)
            return decision
        case _:
            return decision


def _suspend(state: State, phase: Recovering, at: float, policy: Policy) -> Decision:
    have, need = usable_nodes(state), policy.min_nodes_to_run
    reason = f"{count(have, 'usable node')} of the {need} it takes: waiting for capacity"
    return Decision(replace(state, phase=Suspended(phase.incident, at)), (), reason)


def _can_grow(state: State, phase: Running, at: float, policy: Policy) -> bool:
    """Whether idle workers are up and it is not worth waiting for more of them."""
    idle = gained(state, phase.group, policy)
    if not idle or (state.departures and usable_nodes(state) < policy.min_nodes_to_run):
        return False
    waited = at - state.changed_at
    if waited >= policy.start_s:
        return True
    whole = policy.has_standbys and len(ranked(state, policy)) == policy.nodes_max * policy.workers_per_node
    complete = whole or (staying(state) >= policy.nodes_wanted and not still_starting(state.nodes))
    beside = [node for node in state.nodes if set(node.ready) & set(idle)]
    return complete or (waited >= policy.settle_s and not still_starting(beside))


def _refill_standbys(decision: Decision, policy: Policy) -> Decision:
    """Processes that stand by start while steps are done, and never within a recovery."""
    state, starts = start_missing(decision.state, policy)
    if not starts:
        return decision
    return also(decision, Decision(state, starts, f"more processes to stand by start on {count(len(starts), 'node')}"))


def _resize(state: State, phase: Running, at: float, policy: Policy) -> Decision:
    attempt, more = phase.group.attempt, len(ranked(state, policy)) - len(phase.group.members)
    reason = f"{count(more, 'worker')} more can take part: attempt {attempt} stops at its next common step"
    return Decision(
        replace(state, phase=Resizing(phase.group, (), at)), (StopGroup(attempt, everywhere=False),), reason
    )


# --------------------------------------------------------------------------------------------------- events, one by one


def _opened(state: State, event: Opened, policy: Policy) -> Decision:
    if not isinstance(state.phase, Queued) or state.attempt > event.attempt or state.requested:
        return ignored(state, "the job is open already")
    known = replace(state, attempt=event.attempt, changed_at=event.at, rollbacks=event.rollbacks)
    after, actions = request_missing(known, policy)
    return Decision(after, actions, f"opened in term {event.term}: the next attempt is {event.attempt + 1}")


def _first_step(state: State, event: FirstStep) -> Decision:
    phase = state.phase
    if not isinstance(phase, Starting) or event.attempt != phase.group.attempt:
        return ignored(state, f"no first step of attempt {event.attempt} is awaited")
    after = budget.ran(replace(state, phase=Running(phase.group)), event.at)
    if event.step > state.reached:
        # Only a step nobody has done before is progress: else a fault at one step could repeat for ever.
        after = budget.progressed(after)
    members = count(len(phase.group.members), "worker")
    return Decision(incidents.note_step(after, event.step), (), f"attempt {event.attempt} runs with {members}")


def _inventory_taken(state: State, event: InventoryTaken, policy: Policy) -> Decision:
    if event.ask not in (0, state.asks) or event.incident != _open_question(state):
        return ignored(state, f"inventory {event.ask} of incident {event.incident} is not awaited")
    state = answered(state)
    newest = event.newest
    if newest is None and not isinstance(state.phase, Draining) and (back := out_of_reach(state.rollbacks)) is not None:
        return divergence.nothing_left(state, back)
    found = f"step {newest.step} of attempt {newest.attempt}" if newest else "no version"
    match state.phase:
        case Recovering() as phase:
            after = replace(state, phase=replace(phase, found=newest or "scratch"))
            return Decision(after, (), f"{found} can be restored")
        case Draining() as phase:
            return draining.save_found(state, phase, newest)
        case Suspended(incident=incident) if incident is not None and can_begin(state, event.at, policy):
            # As after a loss: it may be worth waiting for more that are about to be up.
            recovering = Recovering(incident, (), newest or "scratch", event.at, state.attempt)
            return Decision(replace(state, phase=recovering), (), f"{found} can be restored")
        case Queued() | Suspended() as phase:
            after = replace(state, phase=replace(phase, asked=False))
            if can_begin(after, event.at, policy):
                return also(Decision(after, (), f"{found} can be restored"), form(after, newest, event.at, policy))
            return Decision(after, (), "the nodes it was asked for are gone again: waiting for capacity")
        case _:
            raise AssertionError("an inventory is open in no other phase")


def _open_question(state: State) -> int | None:
    """The incident whose inventory is awaited (0: the first group's), or None."""
    match state.phase:
        case Queued(asked=True):
            return 0
        case Recovering(found=None) as recovering:
            return recovering.incident.number
        case Suspended(asked=True) | Draining(group=None, saving=None):
            return state.incidents
        case _:
            return None


def _saved(state: State, event: Saved) -> Decision:
    match state.phase:
        case Finishing() as phase if event.attempt == phase.group.attempt:
            reason = f"the last checkpoint, step {event.step}, is committed: finished"
            return Decision(replace(state, phase=Finished(drained=False)), (CloseJob("finished"),), reason)
        case Draining() as draining_phase if draining_phase.saving == VersionId(event.attempt, event.step):
            return draining.saved(state, draining_phase, event.step)
        case _:
            return ignored(state, f"nobody waits for step {event.step} of attempt {event.attempt} to be saved")


def _fenced(state: State, event: FencedOff) -> Decision:
    reason = f"a supervisor of term {event.newest_term} owns the job: this one ends and touches nothing"
    return Decision(replace(state, phase=Failed(reason, resubmit=False)), (CloseJob("fenced"),), reason)


def _adopted(state: State, event: Adopted, policy: Policy) -> Decision:
    """A living group is taken over as it is, or, where it is not whole any more, as a broken one."""
    group, phase = event.group, state.phase
    if not isinstance(phase, Queued):
        return ignored(state, f"attempt {group.attempt} cannot be taken over now")
    current = group.attempt >= state.attempt
    absent = incidents.absent_members(state, group)
    if event.left and not absent and begins_at(state, policy) is not None and len(state.nodes) >= policy.nodes_min:
        return ignored(state, f"attempt {group.attempt} has ended, and lost nobody: the next one begins with all there are")
    state = replace(state, attempt=max(state.attempt, group.attempt), order=group.members, retry_at=None)
    state = incidents.note_step(replace(state, phase=Running(group)), event.step)
    if current and not absent and not event.left:
        members = count(len(group.members), "worker")
        return Decision(state, (), f"attempt {group.attempt} went on meanwhile with {members}: taken over at its step")
    return incidents.adopt_broken(state, group, absent, event.at, policy, gone=event.left)


def _action_failed(state: State, event: ActionFailed, policy: Policy) -> Decision:
    what = f"{event.action} failed ({event.error})"
    if event.action in OF_AN_ATTEMPT and event.subject not in ("", str(state.attempt)):
        return ignored(state, f"{what}: it was about attempt {event.subject}")
    match (event.action, state.phase):
        case ("TakeInventory", _) if _open_question(state) is not None:
            return Decision(replace(state, retry_at=event.at + policy.unwind_s), (), f"{what}: asking again later")
        case ("RequestNodes", _) if state.requested:
            later = replace(state, requested=0, retry_at=event.at + policy.unwind_s)
            return Decision(later, (), f"{what}: asking again later")
        case ("StartWorkers", _):
            return capacity.start_failed(state, event, policy)
        case ("FormGroup", Starting() as phase):
            return incidents.group_broken(state, phase.group, event.at, what, policy)
        case ("StopGroup", Resizing() as phase):
            return incidents.group_broken(state, phase.group, event.at, what, policy)
        case ("Rescue", Recovering() as phase) if phase.rescue_until:
            return rescue.ended(state, Rescued(event.at, phase.attempt, state.step, event.error), policy)
        case ("SaveFinal", Finishing() as phase):
            return incidents.group_broken(state, phase.group, event.at, what, policy)
        case ("SaveFinal" | "StopGroup", Draining() as phase):
            return draining.fall_back(state, phase, what, event.at, policy)
        case _:
            return ignored(state, f"{what}: what waits for it has its own deadline")


# ------------------------------------------------------------------------------------------------------------- timeouts


def _tick(state: State, event: Tick, policy: Policy) -> Decision:
    at = event.at
    if _must_ask(state, at, policy):
        return _ask_again(state, at, policy)
    match state.phase:
        case Starting() as phase if at - phase.since >= policy.start_s:
            return incidents.start_timed_out(state, phase, at, policy)
        case Resizing() as phase if at - phase.since >= policy.start_s:
            what = f"not all members stopped within {policy.start_s:g} s"
            return incidents.group_broken(state, phase.group, at, what, policy)
        case Recovering() as phase if phase.unwinding and at - phase.since >= policy.unwind_s:
            return _replace_stuck(state, phase, policy)
        case Recovering() as phase if phase.rescue_until and at >= phase.rescue_until:
            return rescue.out_of_time(state, phase, policy)
        case Draining() as phase if at >= phase.deadline:
            if phase.suspends and phase.saving is None:
                return draining.fall_back(state, phase, "the deadline passed", at, policy)
            return draining.out_of_time(state, phase)
        case _:
            return ignored(state, NOTHING_DUE)


def _must_ask(state: State, at: float, policy: Policy) -> bool:
    """Whether a question is overdue, or nodes are missing that nobody was asked for because the last request failed."""
    if state.retry_at is not None:
        return at >= state.retry_at
    opened, ending = state.changed_at > 0, isinstance(state.phase, Draining | Finishing)
    return opened and not ending and state.requested == 0 and staying(state) < policy.nodes_wanted


def _ask_again(state: State, at: float, policy: Policy) -> Decision:
    """What was refused or never answered is asked again."""
    state = replace(state, retry_at=None)
    actions: tuple[Action, ...] = ()
    if not isinstance(state.phase, Draining | Finishing):
        state, actions = request_missing(state, policy)
    decision = Decision(state, actions, "asking again for what was refused or never answered")
    if _open_question(state) is None:
        return decision
    return also(decision, take_inventory(state, at, policy))


def _replace_stuck(state: State, phase: Recovering, policy: Policy) -> Decision:
    """Members that did not leave the broken step are taken for lost, and their processes end."""
    after = capacity.write_off(replace(state, phase=replace(phase, unwinding=())), phase.unwinding)
    after, started = capacity.refill(after, policy)
    kills = tuple(KillWorker(worker) for worker in phase.unwinding)
    names = ", ".join(phase.unwinding)
    return Decision(after, (*kills, *started), f"{names} did not leave the broken step within {policy.unwind_s:g} s")
