"""What the demo shows while it works: who is alive, step, loss, checkpoints per place, the incident's phases."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ray_dr.cli.progress import Live
from ray_dr.cli.timeline import moments, spans
from ray_dr.cli.words import duration
from ray_dr.errors import StoreError
from ray_dr.model.journal import Decided, Record
from ray_dr.stores.base import Store
from ray_dr.telemetry.journal import Reader
from ray_dr.telemetry.timeline import JobStatus, incidents, status

BAR_WIDTH = 32
PHASES_PER_LINE = 3


@dataclass(slots=True)
class Display:
    """One run's progress. Called with the supervisor's snapshots; follows the journal in `store` by itself."""

    live: Live
    title: str
    store: Store
    job: str
    steps: int
    began: float = field(default_factory=time.monotonic)
    records: list[Record] = field(default_factory=list)
    phase: str = ""
    _reader: Reader | None = None

    def __call__(self, snapshot: dict[str, Any]) -> None:
        """Paint what is known now."""
        if self._reader is None:
            self._reader = Reader(self.store, self.job)
        with contextlib.suppress(StoreError, ValueError):  # a display never ends the run
            self.records.extend(self._reader.more())
        told = status(self.records)
        changed, self.phase = self.phase != snapshot["phase"], snapshot["phase"]
        self.live.show([*self._lines(snapshot, told)], brief=self._brief(snapshot, told), now=changed)

    def _lines(self, snapshot: dict[str, Any], told: JobStatus) -> Iterator[str]:
        step = snapshot["step"]
        filled = round(BAR_WIDTH * min(step, self.steps) / self.steps)
        loss = "" if told.loss is None else f"   loss {told.loss:.3f}"
        yield f"{self.title}   {duration(time.monotonic() - self.began)}"
        yield f"  step         {'█' * filled}{'░' * (BAR_WIDTH - filled)} {step}/{self.steps}{loss}"
        yield f"  alive        {len(snapshot['nodes'])} nodes, {snapshot['world']} workers in the group"
        yield f"  state        {snapshot['phase'].lower()}, attempt {snapshot['attempt']}"
        yield f"  checkpoints  {_places(told)}"
        for report in incidents(self.records)[-1:]:
            kind = str(report.incident.kind).replace("_", " ")
            yield f"  incident     {kind} at step {report.incident.step}"
            passed = [f"{name.replace('_', ' ')} {duration(at)}" for name, at, _ in spans(report.phases)]
            for first in range(0, len(passed), PHASES_PER_LINE):
                yield f"               {' → '.join(passed[first : first + PHASES_PER_LINE])}"
        yield f"  because      {self._reason()}"

    def _brief(self, snapshot: dict[str, Any], told: JobStatus) -> str:
        loss = "" if told.loss is None else f", loss {told.loss:.3f}"
        return (
            f"{self.title}: {snapshot['phase'].lower()}, step {snapshot['step']}/{self.steps}{loss}, "
            f"{snapshot['world']} workers on {len(snapshot['nodes'])} nodes, checkpoints {_places(told)}"
        )

    def _reason(self) -> str:
        decided = [record for record in self.records if isinstance(record, Decided)]
        return next((text for _, _, text in reversed(list(moments(decided)))), "waiting for the first decision")


def _places(told: JobStatus) -> str:
    shown = [f"{place} {told.saved.get(place, 0)} (step {version.step})" for place, version in told.newest.items()]
    return " · ".join(shown) or "none yet"
