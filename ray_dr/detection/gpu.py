"""What a GPU's driver says of it in the kernel's log."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ray_dr.detection.xid import XIDS, XidMeaning, XidRemedy
from ray_dr.model.signal import Closed, FaultKind, Finding, Released, Report, Sample, Severity, Subject, Xid

UNKNOWN = XidMeaning("not in NVIDIA's catalog", XidRemedy.APPLICATION)
REPEATED_S = 60.0


@dataclass(slots=True)
class Gpu:
    """A code that asks for a reset, a drain or another node is a fault of the GPU's; one that is most likely the program's
    own, or unknown, is a warning: it explains a process that ended without a word. What NVIDIA says to ignore is
    ignored. The same code of the same GPU counts once a minute.

    False alarms: none of its own; it repeats what the driver says, by NVIDIA's table.
    """

    name: ClassVar[str] = "gpu"
    hears: ClassVar[tuple[type, ...]] = (Report, Closed, Released)

    _seen: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding for each code that means something."""
        match sample:
            case Report(xids=xids) if xids:
                for xid in xids:
                    key = sample.node, xid.gpu, xid.code
                    if sample.at - self._seen.get(key, -REPEATED_S) >= REPEATED_S:
                        self._seen[key] = sample.at
                        yield from self._finding(sample, xid)
            case Closed(node=name) | Released(name=name):
                self._seen = {key: at for key, at in self._seen.items() if key[0] != name}

    def _finding(self, report: Report, xid: Xid) -> Iterator[Finding]:
        known = XIDS.get(xid.code, UNKNOWN)
        if known.remedy is XidRemedy.WATCH:
            return
        program = known.remedy is XidRemedy.APPLICATION
        kind = FaultKind.GPU_MISUSE if program else FaultKind.GPU_FAULT
        severity: Severity = "warning" if program else "critical"
        evidence = f"GPU {xid.gpu} of node {report.node}: Xid {xid.code}, {known.meaning} ({known.remedy})"
        numbers = {"xid": float(xid.code), "gpu": float(xid.gpu)}
        yield Finding(
            self.name, kind, (Subject(report.node),), report.at, report.at, evidence, severity, numbers=numbers
        )  # fmt: skip
