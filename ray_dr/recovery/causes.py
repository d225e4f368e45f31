"""What an incident's root cause is: by what the machine itself saw at first, and by what detection makes of it later."""

from __future__ import annotations

from dataclasses import replace

from ray_dr.detection.raised import NO_MEMORY
from ray_dr.detection.taxonomy import FAULTS
from ray_dr.model.actions import Decision
from ray_dr.model.events import Diagnosed
from ray_dr.model.recovery import FailureKind, Policy, Recovering, State, Suspended
from ray_dr.model.signal import FaultKind
from ray_dr.recovery import budget
from ray_dr.recovery.witnesses import KINDS
from ray_dr.recovery.words import ignored

OF_THE_PROGRAM = (FaultKind.EXCEPTION, FaultKind.PROGRAM_ERROR)


def first_cause(kind: FailureKind, detail: str) -> FaultKind:
    """What a failure is taken for as long as nothing more is known."""
    if kind is FailureKind.USER_ERROR and NO_MEMORY.search(detail):
        return FaultKind.OUT_OF_MEMORY
    return KINDS[kind]


def diagnosed(state: State, event: Diagnosed, policy: Policy) -> Decision:
    """The newest incident has another root cause than it was taken for. What is being done about it stays the same; what it
    counts as does not, and an exception that something else explains is not the program's."""
    phase = state.phase
    incident = phase.incident if isinstance(phase, Recovering | Suspended) else None
    if not isinstance(phase, Recovering | Suspended) or incident is None or incident.number != event.incident:
        return ignored(state, f"incident {event.incident} is over")
    if incident.cause is event.cause:
        return ignored(state, f"incident {incident.number} is held for that already")
    root = event.subject if event.subject != incident.subject else ""
    after = replace(incident, cause=event.cause, root=root)
    state = replace(state, phase=replace(phase, incident=after))
    if incident.kind is FailureKind.USER_ERROR and event.cause not in OF_THE_PROGRAM:
        state = replace(state, last_error=None)
    state = budget.recharge(state, after, policy)
    of = f" of {event.subject}" if event.subject else ""
    fault = FAULTS[event.cause]
    counts = f"a failure {fault.budget}" if fault.charged else "not counted as a failure"
    return Decision(state, (), f"the cause of incident {incident.number} is {shown(event.cause)}{of}: {counts}")


def shown(cause: FaultKind) -> str:
    """A kind of fault in words."""
    return str(cause).replace("_", " ")
