"""How long a job takes for what can be done about a departure: a fold over its journal's records."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_dr.model.actions import FormGroup
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.departure import Rates
from ray_dr.model.events import FirstStep
from ray_dr.model.journal import Decided, PartSaved, Record, Stepped, VersionSaved, Where

KEPT = 32
P95 = 0.95
FULL, DELTA = "full", "delta"


def p95(times: Sequence[float]) -> float:
    """The 95th percentile by nearest rank: of fewer than twenty the largest. Of none: an error."""
    return sorted(times)[math.ceil(P95 * len(times)) - 1]


@dataclass(slots=True)
class Measured:
    """Times in seconds, the newest KEPT of each; of a version those of its slowest part."""

    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    _resumes: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    _saves: dict[str, dict[VersionId, float]] = field(default_factory=dict)
    _formed: tuple[int, float] = (0, 0.0)
    _committed: bool = False

    def add(self, record: Record) -> None:
        """One more record."""
        match record:
            case Stepped(record=step):
                self._steps.append(step.took_s)
            case PartSaved():
                self._saved(record)
            case VersionSaved(where=Where.STORE):
                self._committed = True
            case Decided(event=FirstStep() as event) if event.attempt == self._formed[0]:
                self._resumes.append(record.at - self._formed[1])
                self._formed = (0, 0.0)
            case Decided(actions=actions):
                for action in actions:
                    if isinstance(action, FormGroup):
                        self._formed = (action.group.attempt, record.at)
            case _:
                pass

    def rates(self, *, copies: bool, committed: bool = False) -> Rates:
        """What is expected now. `copies`: whether the job keeps any on other nodes; `committed`: the store has a version."""
        known = {name: p95(list(times.values())) for name, times in self._saves.items()}
        usual = Rates()
        full_s = known.get(FULL, max(usual.full_s, known.get(DELTA, 0.0)))
        return Rates(
            step_s=p95(self._steps) if self._steps else usual.step_s,
            staged_s=known.get(Where.MEMORY, usual.staged_s),
            copied_s=known.get(Where.PEER, usual.copied_s),
            delta_s=known.get(DELTA, min(usual.delta_s, full_s)),
            full_s=full_s,
            resume_s=p95(self._resumes) if self._resumes else usual.resume_s,
            copies=copies,
            committed=committed or self._committed,
        )

    def _saved(self, record: PartSaved) -> None:
        if record.where in (Where.MEMORY, Where.PEER):
            name: str = record.where
        elif record.where is Where.STORE:
            name = DELTA if record.sent < record.size else FULL
        else:
            return
        times = self._saves.setdefault(name, {})
        times[record.version] = max(times.pop(record.version, 0.0), record.took_s + record.stall_s)
        while len(times) > KEPT:
            del times[next(iter(times))]
