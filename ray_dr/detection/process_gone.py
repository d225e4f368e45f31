"""A worker's process has ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ray_dr.model.signal import Exit, FaultKind, Finding, Formed, Released, Report, Sample

REMEMBERED = 4096


@dataclass(slots=True)
class ProcessGone:
    """From an agent's word that a worker's socket closed or its pid is gone.

    False alarms: none by construction. It is no estimate: the kernel closes a socket when its process ends, and the host
    says beforehand (Released) whom it ends itself.
    """

    name: ClassVar[str] = "process_gone"
    hears: ClassVar[tuple[type, ...]] = (Report, Formed, Released)

    _formed: Formed | None = None
    _ended: dict[str, None] = field(default_factory=dict)

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """One finding for each process that ended unasked."""
        match sample:
            case Formed():
                self._formed = sample
            case Released():
                self._end(sample.name)
            case Report(exits=exits) if exits:
                for ended in exits:
                    if self._end(ended.worker):
                        yield self._finding(sample, ended)

    def _end(self, worker: str) -> bool:
        """Whether this is news. A worker's name is never used again."""
        news = worker not in self._ended
        self._ended[worker] = None
        if len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]
        return news

    def _finding(self, report: Report, ended: Exit) -> Finding:
        subject = (self._formed or Formed(report.at, 0, ())).subject_of(ended.worker)
        evidence = f"the process of {subject} ended: {ended.how}"
        return Finding(self.name, FaultKind.PROCESS_GONE, (subject,), report.at, report.at, evidence)
