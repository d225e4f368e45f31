"""Every life a job can have, up to a length: the machine tried with all events that make sense in a state.

Also one fair continuation: a world in which nothing fails any more, and everything asked for is delivered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from ray_dr.model.actions import Decision
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import (
    ActionFailed,
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
from ray_dr.model.signal import FaultKind
from ray_dr.recovery.fleet import leaving, staying
from ray_dr.recovery.groups import group_of
from ray_dr.recovery.machine import initial, step

NAMES = tuple("abcdefghijkl")
SOON_S, IN_TIME_S = 0.5, 200.0


@dataclass(frozen=True, slots=True)
class Explored:
    """One step of one possible life. `at` is the time of the event, `path` the events that led to `before`."""

    before: State
    event: Event
    decision: Decision
    at: float


def opened(policy: Policy) -> tuple[State, float]:
    """A job whose supervisor has begun, and the time."""
    return step(initial(), Opened(100.0, 1, 0), policy).state, 100.0


def explore(policy: Policy, start: State, at: float, depth: int) -> Iterator[Explored]:
    """All steps from a state on, up to `depth` events: breadth first, each state (its times apart) once."""
    frontier = [(start, at)]
    seen = {_timeless(start, at)}
    for _ in range(depth):
        following = []
        for state, now in frontier:
            for event in alphabet(state, policy, now):
                decision = step(state, event, policy)
                yield Explored(state, event, decision, event.at)
                key = _timeless(decision.state, event.at)
                if key not in seen:
                    seen.add(key)
                    following.append((decision.state, event.at))
        frontier = following


def alphabet(state: State, policy: Policy, at: float) -> Iterator[Event]:
    """Events that can happen in a state, good and bad ones."""
    yield from _of_nodes(state, policy, at)
    yield from _of_workers(state, at)
    yield from _of_host(state, at)
    if isinstance(state.phase, Recovering):
        yield from (Diagnosed(at, state.incidents, cause, "a") for cause in (FaultKind.PREEMPTION, FaultKind.OUT_OF_MEMORY))
    yield from (Tick(at + wait) for wait in (policy.settle_s, policy.unwind_s, policy.start_s))


def fair_event(state: State, policy: Policy, at: float) -> Event | None:
    """What happens next where nothing fails any more; None when the job runs or is over."""
    match state.phase:
        case Running() | Finished() | Failed():
            return None
        case Starting(group):
            return FirstStep(at, group.attempt, state.step + 1)
        case Finishing(group):
            return Saved(at, group.attempt, state.step)
        case Recovering(unwinding=(worker, *_)) as phase:
            return WorkerStopped(at, worker, phase.attempt, state.step)
        case Recovering(rescue_until=until) as phase if until:
            return Rescued(at, phase.attempt, state.step)
        case Resizing(group):
            return _stop_next(group.attempt, group.members, (*state.phase.stopped, *state.done), state, at)
        case Draining(saving=VersionId() as saving):
            return Saved(at, saving.attempt, saving.step)
        case Draining(group=group) if group is not None:
            return _stop_next(group.attempt, group.members, state.phase.stopped, state, at)
        case Queued(asked=True) | Suspended(asked=True) | Recovering(found=None) | Draining():
            return InventoryTaken(at, _incident(state), _newest(state), state.asks)
        case _:
            return _capacity_comes(state, policy, at)


def _stop_next(attempt: int, members: tuple[str, ...], left: tuple[str, ...], state: State, at: float) -> Event:
    common = getattr(state.phase, "at_step", None)
    worker = next(member for member in members if member not in left)
    return WorkerStopped(at, worker, attempt, state.step if common is None else common)


def _capacity_comes(state: State, policy: Policy, at: float) -> Event:
    gone = leaving(state)
    for node in state.nodes:
        if node.starting and node.id not in gone:
            return WorkerReady(at, fresh_worker(state, node.id), node.id)
    if staying(state) < policy.nodes_wanted:
        return NodeJoined(at, next(name for name in NAMES if all(node.id != name for node in state.nodes)))
    return Tick(at + policy.start_s)


def fresh_worker(state: State, node: str) -> str:
    """A worker's name that was not used on the node before."""
    used = next((len(known.ready) + len(known.lost) for known in state.nodes if known.id == node), 0)
    return f"{node}/0.{state.attempt}{used}"


def _newest(state: State) -> VersionId:
    """The newest version there can be: of all attempts so far, and from before what went wrong."""
    steps = [state.step, *(back.good for back in state.rollbacks if back.attempt >= state.attempt)]
    return VersionId(state.attempt, min(steps))


def _incident(state: State) -> int:
    return 0 if isinstance(state.phase, Queued) else state.incidents


def _of_nodes(state: State, policy: Policy, at: float) -> Iterator[Event]:
    known = [node.id for node in state.nodes]
    yield from (NodeJoined(at, name) for name in [n for n in NAMES if n not in known][:1])
    for node in state.nodes:
        yield NodeLost(at, node.id, "connection closed", state.step)
        if node.id not in leaving(state):
            yield from (NodeLeaving(at, node.id, at + left_s, "drain") for left_s in (SOON_S, IN_TIME_S))
        if node.starting:
            worker = fresh_worker(state, node.id)
            yield WorkerReady(at, worker, node.id)
            yield WorkerLost(at, worker, node.id, "exit code 1", state.step)
        yield from (WorkerLost(at, worker, node.id, "signal 9", state.step) for worker in node.ready)


def _of_workers(state: State, at: float) -> Iterator[Event]:
    group = group_of(state)
    broken = isinstance(state.phase, Recovering)
    members = state.phase.unwinding if isinstance(state.phase, Recovering) else group.members if group else ()
    attempt, now = state.attempt, state.step
    for hung in (members[:1], members[1:], members):
        yield Hung(at, attempt, hung, "in step for 9 s", now)
    if members and not broken:
        yield Diverged(at, attempt, now, "loss not finite", now, 8)
        yield Corrupted(at, attempt, max(0, now - 1), members[:1], "one differs", now)
    for worker in members:
        yield WorkerRaised(at, worker, attempt, "collective failed", True, now)
        yield WorkerRaised(at, worker, attempt, "ValueError: bad", False, now)
        yield WorkerStopped(at, worker, attempt, now)
        yield WorkerRaised(at, worker, attempt, "collective failed", True, now, stands_at=now)
        yield WorkerStopped(at, worker, attempt, now, now, (members.index(worker),))
        if not broken:
            yield WorkerReturned(at, worker, attempt, now)


def _of_host(state: State, at: float) -> Iterator[Event]:
    attempt = state.attempt
    match state.phase:
        case Starting():
            yield FirstStep(at, attempt, state.step + 1)
            yield ActionFailed(at, "FormGroup", "timed out")
        case Resizing():
            yield ActionFailed(at, "StopGroup", "timed out")
        case Recovering() as phase if phase.rescue_until:
            yield Rescued(at, attempt, state.step)
            yield Rescued(at, attempt, state.step, "no memory")
        case Finishing() | Draining():
            yield Saved(at, attempt, state.step)
            yield ActionFailed(at, "SaveFinal", "no space")
        case _:
            pass
    if state.retry_at is not None:
        yield InventoryTaken(at, _incident(state), None, state.asks)
        yield InventoryTaken(at, _incident(state), _newest(state), state.asks)
        yield ActionFailed(at, "TakeInventory", "store unavailable")
    yield StopRequested(at, 5.0, "Ctrl-C")
    yield FencedOff(at, 2)


def _timeless(value: Any, now: float) -> Any:
    """A state with its times as ages, so that the same situation at another time is the same."""
    if isinstance(value, State):
        ledger, plan, nodes = value.ledger, value.plan, value.nodes
        if any(node.asked_at for node in nodes):
            nodes = tuple(replace(node, asked_at=min(now - node.asked_at, 5.0) if node.starting else 0.0) for node in nodes)
        since = None if ledger.running_since is None else 0.0
        plan = plan and replace(plan, at=0.0, hold_until=max(0.0, plan.hold_until - now))
        ledger = replace(ledger, ran_s=0.0, running_since=since, roots=tuple(replace(r, ran_s=0.0) for r in ledger.roots))
        return replace(
            value, phase=_timeless(value.phase, now), changed_at=min(now - value.changed_at, 5.0), nodes=nodes, ledger=ledger,
            retry_at=None if value.retry_at is None else value.retry_at - now, first_cause="",
            not_before=max(0.0, value.not_before - now), plan=plan,
            departures=tuple(replace(d, deadline=max(d.deadline - now, -1.0)) for d in value.departures),
        )  # fmt: skip
    times = {f.name for f in fields(value)} & {"since", "deadline"}
    changes: dict[str, Any] = {name: getattr(value, name) - now for name in times}
    if getattr(value, "rescue_until", None):
        changes["rescue_until"] = value.rescue_until - now
    if getattr(value, "incident", None) is not None:
        changes["incident"] = replace(value.incident, at=0.0)
    return replace(value, **changes) if changes else value
