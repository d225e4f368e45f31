"""Somebody says beforehand that a node will be taken away: a spot instance's notice, a maintenance, Ray's drain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ray_dr.model.signal import Closed, FaultKind, Finding, Notice, Noticed, Released, Report, Sample, Subject

EARLIER_S = 1.0


@dataclass(slots=True)
class Preemption:
    """Once per node and source, and again when the deadline moves forward by more than a second.

    False alarms: none of its own; it repeats what the cloud or Ray says.
    """

    name: ClassVar[str] = "preemption"
    hears: ClassVar[tuple[type, ...]] = (Report, Noticed, Closed, Released)

    _deadlines: dict[tuple[str, str], float] = field(default_factory=dict)

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding for each notice that is news."""
        match sample:
            case Report(notices=notices) | Noticed(notices=notices) if notices:
                for notice in notices:
                    yield from self._heard(sample, notice)
            case Closed(node=name) | Released(name=name):
                self._deadlines = {key: at for key, at in self._deadlines.items() if key[0] != name}

    def _heard(self, report: Report | Noticed, notice: Notice) -> Iterator[Finding]:
        key, deadline = (report.node, notice.source), report.at + notice.left_s
        if key in self._deadlines and not deadline < self._deadlines[key] - EARLIER_S:
            return
        self._deadlines[key] = deadline
        when = "at an unknown time" if notice.left_s == math.inf else f"in {max(0.0, notice.left_s):.0f} s"
        will = "will" if notice.certain else "may"
        evidence = f"node {report.node} {will} be taken away {when} ({notice.source})"
        yield Finding(
            self.name, FaultKind.PREEMPTION, (Subject(report.node),), report.at, report.at, evidence, "warning",
            "confirmed" if notice.certain else "suspected", numbers={"left_s": notice.left_s},
        )  # fmt: skip
