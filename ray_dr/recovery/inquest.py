"""What broke the job, while it is being got over: the findings and decisions since the newest group formed, diagnosed as
`ray-dr why` does afterwards. A host lets it hear its records, and gives the machine the verdict where that is another than
what the machine holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ray_dr.model.actions import FormGroup
from ray_dr.model.events import Diagnosed, Hung, NodeLost, WorkerLost, WorkerRaised
from ray_dr.model.journal import Decided, Noted, Record
from ray_dr.model.recovery import Recovering, State, Suspended
from ray_dr.model.signal import FaultKind
from ray_dr.recovery.witnesses import diagnose

RECORDS_MOST, VERDICTS_MOST = 64, 8
"""What a diagnosis costs grows with the square of the one, and a supervisor that is getting over a failure has no time."""
LASTING = (FaultKind.PREEMPTION, FaultKind.STORAGE)
"""Warnings that explain failures."""


@dataclass(slots=True)
class Inquest:
    """Every record of a life goes in, in order. What is only an echo, a suspicion or a warning is not looked at, nor are
    decisions on anything but losses and exceptions."""

    _records: list[Record] = field(default_factory=list)
    _fresh: bool = False
    _incident: int = 0
    _verdicts: int = 0

    def hear(self, record: Record) -> None:
        """One more record."""
        match record:
            case Noted(name="finding") if _explains(record.fields):
                self._records.append(record)
                self._fresh = True
            case Decided():
                if any(isinstance(action, FormGroup) for action in record.actions):
                    self._records = [*filter(_lasts, self._records)]
                before = self._records[-1] if self._records else None
                if isinstance(before, Decided) and not _strikes(before) and not _strikes(record):
                    self._records.pop()  # of such decisions in a row only the newest state matters
                self._records.append(record)
                self._fresh |= _strikes(record) or _number(record.state) != self._incident
            case _:
                pass
        del self._records[:-RECORDS_MOST]

    def verdict(self, state: State, at: float) -> Diagnosed | None:
        """The cause of the incident that is open, where the machine holds another."""
        incident = state.phase.incident if isinstance(state.phase, Recovering | Suspended) else None
        if not self._fresh or incident is None:
            return None
        self._fresh = False
        if incident.number != self._incident:
            self._incident, self._verdicts = incident.number, 0
        self._verdicts += 1
        if self._verdicts > VERDICTS_MOST:
            return None
        found = diagnose(self._records, 0, incident)
        if found.kind is incident.cause:
            return None
        subject = found.subjects[0] if found.subjects else None
        return Diagnosed(at, incident.number, found.kind, (subject.worker or subject.node) if subject else "")


def _explains(finding: Mapping[str, object]) -> bool:
    """Whether a finding may be a root cause, or takes back that one is."""
    if finding.get("stage") == "withdrawn":
        return True
    standing = finding.get("stage") == "confirmed" and not finding.get("shadow")
    grave = finding.get("severity") == "critical" or finding.get("kind") in LASTING
    return standing and grave and finding.get("kind") != FaultKind.COLLECTIVE_BROKEN


def _lasts(record: Record) -> bool:
    """A notice holds beyond the group in which it was given."""
    return isinstance(record, Noted) and record.fields.get("kind") == FaultKind.PREEMPTION


def _strikes(record: Decided) -> bool:
    """Whether a decision was on a loss, or on an exception of the program."""
    event = record.event
    return isinstance(event, NodeLost | WorkerLost | Hung) or (isinstance(event, WorkerRaised) and not event.collateral)


def _number(state: State) -> int:
    incident = state.phase.incident if isinstance(state.phase, Recovering | Suspended) else None
    return incident.number if incident else 0
