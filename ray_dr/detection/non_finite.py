"""Loss or gradients that are no numbers any more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ray_dr.model.signal import FaultKind, Finding, Formed, Sample, WholeStep


@dataclass(slots=True)
class NonFinite:
    """Once per run of such steps, naming the ranks where it is so: some, and it began there; all, and it is in what they
    share (the gradient sum spreads it to all within a step).

    The rank's own flag must be the group's by agreement (an all-reduced maximum) before anybody skips a step; this
    finding is what tells the host. Delay: one step.
    False alarms: none, it is a fact. That mixed precision's loss scaling skips such a step by itself is for the program to
    keep out of the flag.
    """

    name: ClassVar[str] = "non_finite"
    hears: ClassVar[tuple[type, ...]] = (Formed, WholeStep)

    _formed: Formed | None = None
    _last: int = -1

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding at the first such step of a row."""
        match sample:
            case Formed():
                self._formed, self._last = sample, -1
            case WholeStep(ranks=ranks) if self._formed is not None and not all(done.finite for done in ranks):
                again = self._last == sample.step - 1
                self._last = sample.step
                if not again:
                    yield self._finding(sample, [done.rank for done in ranks if not done.finite], self._formed)

    def _finding(self, step: WholeStep, bad: list[int], formed: Formed) -> Finding:
        who = "every rank" if len(bad) == len(step.ranks) else "rank " + ", ".join(map(str, bad[:8]))
        evidence = f"loss or gradients of step {step.step} are not finite on {who} ({len(bad)} of {len(step.ranks)})"
        subjects = tuple(formed.subject(rank) for rank in bad)
        numbers = {"ranks": float(len(bad))}
        return Finding(
            self.name, FaultKind.NON_FINITE, subjects, step.at, step.at, evidence, numbers=numbers, step=step.step
        )  # fmt: skip
