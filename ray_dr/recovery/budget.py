"""How often a job may fail before it is given up, and how long it waits before it tries again.

Only attempts that made no new step count: failing with progress in between never ends a job. And only what the taxonomy
charges: a node that was announced to go, or was drained, is free, however often. What counts is held against two limits:

    in a row    more than `attempts_without_progress` failures since the last new step, of whatever cause, end the job
    per root    each root cause has a bucket of tokens (SHARES, in units of the same number). A failure takes one, and
                only an hour of running gives one back: not a step, so that a fault which lets a step through now and then
                is bounded too. A job that ends of a root the program is to blame for is not to be submitted again.

The first retry is immediate; then it waits 1, 2, 4 ... BACK_OFF_MOST_S seconds, counted from the failure, so that what the
survivors need to leave the broken step is part of it. A new step begins both anew. When detection later knows better what the
newest failure was, its charge is moved (`recharge`): a lost node that turns out to have been preempted costs nothing.

Source: algorithms 14 of the design.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_dr.detection.taxonomy import FAULTS, Budget
from ray_dr.model.budget import Charge, Ledger, Root
from ray_dr.model.recovery import Incident, Policy, State
from ray_dr.model.signal import FaultKind
from ray_dr.recovery.words import describe

SHARES: Mapping[Budget, int] = {Budget.INFRASTRUCTURE: 3, Budget.UNKNOWN: 2, Budget.PROGRAM: 1}
"""Tokens of one root, in units of `attempts_without_progress`."""
REFILL_S = 3600.0
"""Of running, for one token."""
BACK_OFF_FIRST_S, BACK_OFF_MOST_S = 1.0, 60.0
ROOTS_MOST = 16
NAME_CHARS = 120
WITH_ERROR = (FaultKind.EXCEPTION, FaultKind.PROGRAM_ERROR, FaultKind.OUT_OF_MEMORY)
"""What is the same only when the words are."""


@dataclass(frozen=True, slots=True)
class Over:
    """The job is given up. `resubmit`: whether running it again can help."""

    reason: str
    resubmit: bool


def charge(state: State, incident: Incident, policy: Policy) -> tuple[State, Over | None]:
    """The state after a failure, of which `state.step` is the last step known to be done; and whether that was one too many."""
    words, cause = describe(incident), _cause(incident)
    ledger = _stood(state.ledger, incident.at)
    progress, free = state.step > state.reached, not FAULTS[cause].charged
    first = "" if progress else state.first_cause
    state = replace(
        state,
        failures=0 if progress else state.failures,
        first_cause=first or ("" if free else words),
        reached=max(state.reached, state.step),
        ledger=replace(ledger, tries=0 if progress else ledger.tries, newest=None),
    )
    if free:
        return replace(state, ledger=_note(state.ledger, incident, cause, ""), not_before=0.0), None
    return _charged(state, incident, cause, policy, counts=not progress)


def charge_start(state: State, why: str, policy: Policy) -> tuple[State, Over | None]:
    """The same for a node on which no process starts: never progress, and no incident."""
    state = replace(state, failures=state.failures + 1, first_cause=state.first_cause or why)
    return state, Over(f"{why}; first: {state.first_cause}", True) if state.failures > policy.attempts_without_progress else None


def recharge(state: State, incident: Incident, policy: Policy) -> State:
    """The state with the newest charge, if it is this incident's, moved to the cause that it has now. It ends no job: what is
    known better is no further failure."""
    before, cause = state.ledger.newest, _cause(incident)
    if before is None or before.incident != incident.number or before.cause is cause:
        return state
    was_free, is_free = not FAULTS[before.cause].charged, not FAULTS[cause].charged
    counted = bool(before.root)
    ledger = replace(state.ledger, roots=_give_back(state.ledger.roots, before.root))
    if is_free:
        ledger = replace(ledger, tries=max(0, ledger.tries - (not was_free)))
        state = replace(state, failures=max(0, state.failures - counted), ledger=ledger, not_before=0.0)
        first = state.first_cause if ledger.tries else ""
        return replace(state, ledger=_note(ledger, incident, cause, ""), first_cause=first)
    if was_free:
        ledger = replace(ledger, tries=ledger.tries + 1)  # it did not count so far, and does not begin to: the job goes on
    name = fingerprint(cause, incident.detail) if counted else ""
    if counted:
        ledger = _take(ledger, name, cause)
    return replace(state, ledger=_note(ledger, incident, cause, name))


def ran(state: State, at: float) -> State:
    """A group has done its first step: from now on seconds of running count."""
    ledger = state.ledger
    return replace(
        state, ledger=replace(ledger, running_since=at if ledger.running_since is None else ledger.running_since),
        not_before=0.0, plan=None,
    )  # fmt: skip


def progressed(state: State) -> State:
    """A step was done that nobody had done before."""
    return replace(state, failures=0, ledger=replace(state.ledger, tries=0))


def back_off_s(tries: int) -> float:
    """Seconds from the `tries`-th failure in a row to the next attempt."""
    return 0.0 if tries <= 1 else min(BACK_OFF_MOST_S, BACK_OFF_FIRST_S * 2.0 ** min(tries - 2, 16))


def fingerprint(cause: FaultKind, detail: str) -> str:
    """What makes two failures of one root."""
    return f"{cause}: {detail[:NAME_CHARS]}" if cause in WITH_ERROR else str(cause)


def tokens(cause: FaultKind, policy: Policy) -> float:
    """How many failures without a new step a root of this kind may have, less what comes back."""
    return float(SHARES.get(FAULTS[cause].budget, 0) * policy.attempts_without_progress)


def spent(ledger: Ledger, name: str) -> float:
    """Tokens of a root that are gone, by now."""
    root = next((root for root in ledger.roots if root.name == name), None)
    return max(0.0, root.spent - (ledger.ran_s - root.ran_s) / REFILL_S) if root else 0.0


def _charged(state: State, incident: Incident, cause: FaultKind, policy: Policy, *, counts: bool) -> tuple[State, Over | None]:
    """A failure that is nobody's plan; `counts`: and came before a new step."""
    ledger = replace(state.ledger, tries=state.ledger.tries + 1)
    name = fingerprint(cause, incident.detail) if counts else ""
    if counts:
        ledger = _take(ledger, name, cause)
    wait_s = back_off_s(ledger.tries)
    state = replace(
        state, failures=state.failures + counts, ledger=_note(ledger, incident, cause, name),
        not_before=incident.at + wait_s if wait_s else 0.0,
    )  # fmt: skip
    return state, _over(state, name, cause, policy) if counts else None


def _over(state: State, name: str, cause: FaultKind, policy: Policy) -> Over | None:
    row, gone = state.failures, spent(state.ledger, name)
    at_fault = FAULTS[cause].budget is Budget.PROGRAM
    if gone > tokens(cause, policy) and (at_fault or row <= policy.attempts_without_progress):
        times = f"{name} has cost {gone:.0f} attempts without a new step, the last after step {state.step}"
        blame = ": the program fails of it, so submitting it again cannot help" if at_fault else "; no more are tried"
        return Over(f"{times}{blame}", resubmit=not at_fault)
    if row > policy.attempts_without_progress:
        return Over(f"{row} attempts in a row made no new step after step {state.step}; first: {state.first_cause}", True)
    return None


def _take(ledger: Ledger, name: str, cause: FaultKind) -> Ledger:
    root = Root(name, cause, spent(ledger, name) + 1.0, ledger.ran_s)
    others = [other for other in ledger.roots if other.name != name]
    return replace(ledger, roots=(*others, root)[-ROOTS_MOST:])


def _give_back(roots: tuple[Root, ...], name: str) -> tuple[Root, ...]:
    changed = (replace(root, spent=root.spent - 1.0) if root.name == name else root for root in roots)
    return tuple(root for root in changed if root.spent > 0.0)


def _note(ledger: Ledger, incident: Incident, cause: FaultKind, name: str) -> Ledger:
    return replace(ledger, newest=Charge(incident.number, cause, name))


def _stood(ledger: Ledger, at: float) -> Ledger:
    """The ledger once the group that ran is broken."""
    if ledger.running_since is None:
        return ledger
    return replace(ledger, ran_s=ledger.ran_s + max(0.0, at - ledger.running_since), running_since=None)


def _cause(incident: Incident) -> FaultKind:
    assert incident.cause is not None, "an incident of this version's machine has a cause"
    return incident.cause
