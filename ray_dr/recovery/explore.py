"""Every life a job can have, up to a length: the machine tried with all events that make sense in a state.

Also one fair continuation: a world in which nothing fails any more, and everything asked for is delivered.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, replace

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
    Phase,
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
AGE_S, MUCH_TIME_S = 5.0, 150.0
"""An age, and a time left, beyond which no decision of such a short life differs."""

LEAVING = frozenset({NodeLeaving})
SPOILT = frozenset({Diverged, Corrupted})
RESCUED = frozenset({Rescued})
DIAGNOSED = frozenset({Diagnosed})
SPECIAL: frozenset[type[Event]] = LEAVING | SPOILT | RESCUED | DIAGNOSED
"""Events that a life can do without: each is best tried in lives of its own, as lives with all of them are very many."""


@dataclass(frozen=True, slots=True)
class Explored:
    """One step of one possible life. `at` is the time of the event, `new`: nothing led to this situation before."""

    before: State
    event: Event
    decision: Decision
    at: float
    new: bool


def opened(policy: Policy) -> tuple[State, float]:
    """A job whose supervisor has begun, and the time."""
    return step(initial(), Opened(100.0, 1, 0), policy).state, 100.0


def explore(policy: Policy, start: State, at: float, depth: int,
            special: Collection[type[Event]] = SPECIAL) -> Iterator[Explored]:  # fmt: skip
    """All steps from a state on, up to `depth` events: breadth first, each state (its times apart) once."""
    frontier = [(start, at)]
    met = {_situation(start, at)}
    for _ in range(depth):
        following = []
        for state, now in frontier:
            for event in alphabet(state, policy, now, special):
                decision = step(state, event, policy)
                new = False
                if decision.state is not state or event.at != now:
                    known = len(met)
                    met.add(_situation(decision.state, event.at))
                    if new := len(met) > known:
                        following.append((decision.state, event.at))
                yield Explored(state, event, decision, event.at, new)
        frontier = following


def alphabet(state: State, policy: Policy, at: float, special: Collection[type[Event]] = SPECIAL) -> Iterator[Event]:
    """Events that can happen in a state, good and bad ones; of the special ones, those of these types."""
    yield from _of_nodes(state, policy, at, special)
    yield from _of_workers(state, at, special)
    yield from _of_host(state, at)
    if isinstance(state.phase, Recovering) and Diagnosed in special:
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


def _of_nodes(state: State, policy: Policy, at: float, special: Collection[type[Event]]) -> Iterator[Event]:
    known = [node.id for node in state.nodes]
    yield from (NodeJoined(at, name) for name in [n for n in NAMES if n not in known][:1])
    for node in state.nodes:
        yield NodeLost(at, node.id, "connection closed", state.step)
        if NodeLeaving in special and node.id not in leaving(state):
            yield from (NodeLeaving(at, node.id, at + left_s, "drain") for left_s in (SOON_S, IN_TIME_S))
        if node.starting:
            worker = fresh_worker(state, node.id)
            yield WorkerReady(at, worker, node.id)
            yield WorkerLost(at, worker, node.id, "exit code 1", state.step)
        yield from (WorkerLost(at, worker, node.id, "signal 9", state.step) for worker in node.ready)


def _of_workers(state: State, at: float, special: Collection[type[Event]]) -> Iterator[Event]:
    group = group_of(state)
    broken = isinstance(state.phase, Recovering)
    members = state.phase.unwinding if isinstance(state.phase, Recovering) else group.members if group else ()
    attempt, now = state.attempt, state.step
    for hung in (members[:1], members[1:], members):
        yield Hung(at, attempt, hung, "in step for 9 s", now)
    if members and not broken:
        if Diverged in special:
            yield Diverged(at, attempt, now, "loss not finite", now, 8)
        if Corrupted in special:
            yield Corrupted(at, attempt, max(0, now - 1), members[:1], "one differs", now)
    for worker in members:
        yield WorkerRaised(at, worker, attempt, "collective failed", True, now)
        yield WorkerRaised(at, worker, attempt, "ValueError: bad", False, now)
        yield WorkerStopped(at, worker, attempt, now)
        if Rescued in special:
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


def _situation(state: State, now: float) -> Hashable:
    """What decisions about a state go by: its times as ages, and no words. The same situation at another time is the same.

    A tuple with no more than it takes, as there are very many: times are capped where a longer one makes no difference.
    """
    ledger, plan, nodes = state.ledger, state.plan, state.nodes
    asked = tuple([min(now - node.asked_at, AGE_S) if node.starting and node.asked_at else 0.0 for node in nodes])
    return (
        _phase(state.phase, now), asked,
        tuple([(node.id, node.starting, node.ready, node.lost, node.failed_starts) for node in nodes]),
        state.attempt, state.step, state.incidents, state.failures, state.last_error, state.done,
        min(now - state.changed_at, AGE_S), state.requested, state.order, state.reached, state.asks,
        None if state.retry_at is None else state.retry_at - now, max(0.0, state.not_before - now),
        tuple([(d.node, min(max(d.deadline - now, -1.0), MUCH_TIME_S)) for d in state.departures]) if state.departures else (),
        state.rollbacks, ledger.tries, ledger.running_since is None,
        tuple([(root.name, root.spent) for root in ledger.roots]) if ledger.roots else (),
        None if ledger.newest is None else (ledger.newest.incident, ledger.newest.cause.value, ledger.newest.root),
        None if plan is None else (plan.incident, plan.hold_until > 0.0, max(0.0, plan.hold_until - now)),
    )  # fmt: skip


def _phase(phase: Phase, now: float) -> Hashable:
    match phase:
        case Recovering():
            said = phase.incident
            return (
                Recovering, said.number, said.kind.value, said.subject, said.step, said.detail, said.root,
                None if said.cause is None else said.cause.value, phase.unwinding, phase.found, now - phase.since,
                phase.attempt, phase.began, phase.standing, phase.rescue_until and phase.rescue_until - now,
            )  # fmt: skip
        case Starting() | Finishing():
            return type(phase), phase.group, now - phase.since
        case Resizing():
            return Resizing, phase.group, phase.stopped, phase.at_step, now - phase.since
        case Suspended():
            return Suspended, phase.incident and replace(phase.incident, at=0.0), phase.asked, now - phase.since
        case Draining():
            return replace(phase, deadline=phase.deadline - now)
        case _:
            return phase
