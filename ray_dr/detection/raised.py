"""`train` left by an exception: the program's, the memory's, or the echo of somebody else's end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ray_dr.model.signal import Exit, FaultKind, Finding, Formed, Raised, Report, Sample, Subject

NO_MEMORY = re.compile(
    r"^(\w+\.)*(OutOfMemoryError|MemoryError)\b|CUDA out of memory|DefaultCPUAllocator: (can't|not enough)|"
    r"Cannot allocate memory|cudaErrorMemoryAllocation|NVML_ERROR_MEMORY"
)


@dataclass(slots=True)
class Exceptions:
    """Every exception is a finding: of a broken collective where it is one by its type, else of the program. Whose fault
    it is, is decided by what else is known.

    False alarms: none; an exception that left `train` is a fact.
    """

    name: ClassVar[str] = "exceptions"
    hears: ClassVar[tuple[type, ...]] = (Formed, Raised)

    _formed: Formed | None = None

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding for each exception."""
        match sample:
            case Formed():
                self._formed = sample
            case Raised() if not NO_MEMORY.search(sample.error):
                kind = FaultKind.COLLECTIVE_BROKEN if sample.collateral else FaultKind.EXCEPTION
                yield _finding(self.name, kind, self._formed, sample)


@dataclass(slots=True)
class OutOfMemory:
    """From a process that the kernel or Ray's memory watch ended, and from exceptions that say so, on the host or the GPU.

    False alarms: none by construction. A process that is killed without a word from the kernel is not one.
    """

    name: ClassVar[str] = "out_of_memory"
    hears: ClassVar[tuple[type, ...]] = (Formed, Raised, Report)

    _formed: Formed | None = None

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding for each worker that ran out of memory."""
        match sample:
            case Formed():
                self._formed = sample
            case Raised() if NO_MEMORY.search(sample.error):
                yield _finding(self.name, FaultKind.OUT_OF_MEMORY, self._formed, sample)
            case Report(exits=exits) if exits:
                yield from (self._killed(sample, ended) for ended in exits if ended.oom)

    def _killed(self, report: Report, ended: Exit) -> Finding:
        subject = _subject(self._formed, ended.worker)
        evidence = f"{subject} was ended for the memory it used: {ended.how}"
        return Finding(self.name, FaultKind.OUT_OF_MEMORY, (subject,), report.at, report.at, evidence)


def _finding(name: str, kind: FaultKind, formed: Formed | None, raised: Raised) -> Finding:
    subject = _subject(formed, raised.worker)
    evidence = f"{subject} raised after step {raised.step}: {raised.error}"
    return Finding(
        name, kind, (subject,), raised.at, raised.at, evidence, step=raised.step, error=raised.error
    )  # fmt: skip


def _subject(formed: Formed | None, worker: str) -> Subject:
    return (formed or Formed(0.0, 0, ())).subject_of(worker)
