"""Training that went wrong and does not come back: when skipping a step, or waiting, is not enough any more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ray_dr.detection.loss_spike import Course
from ray_dr.model.signal import FaultKind, Finding, Formed, Sample, Stage, WholeStep

STATE = "state"
"""In `StepDone.skipped`: what forward computes along was spoilt too, so that a skip does not help."""
TIMES = 3.0
"""The loss is high that is so many times what is usual, and beyond six sigma besides; see `loss_spike.Course`."""


@dataclass(slots=True)
class Divergence:
    """Confirmed after `skips` skipped steps in a row, at once when state was spoilt with it; or when the loss has stayed high
    for twenty steps. Suspected from the first skipped step, or the third high loss of five, on: as long as it is, nobody may
    let go of a version from before. `step` of the finding is the last step done, `numbers["onset"]` the first that went wrong.

    skips   0: skipped steps are not counted; spikes: whether losses are judged
    Delay: `skips` steps; 23 steps for a loss.
    False alarms: skipped steps are facts. For losses as `loss_spike`, of which this asks for more: some 1e-27 per step.
    """

    skips: int = 5
    spikes: bool = True
    name: ClassVar[str] = "divergence"
    hears: ClassVar[tuple[type, ...]] = (Formed, WholeStep)

    _formed: Formed | None = None
    _row: list[int] = field(default_factory=list)
    _loss: Course = field(default_factory=lambda: Course(math.log(TIMES)))

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding at each change of stage."""
        match sample:
            case Formed():
                self._formed, self._row = sample, []
                self._loss.restart()
            case WholeStep(ranks=ranks) if self._formed is not None:
                why = next((done.skipped for done in ranks if done.skipped == STATE), ranks[0].skipped)
                yield from self._count(sample, why)
                losses = [done.loss for done in ranks if done.loss is not None]
                if self.spikes and losses and not why and all(map(math.isfinite, losses)):
                    yield from self._judge(sample, math.fsum(loss / len(losses) for loss in losses))

    def _count(self, step: WholeStep, why: str) -> Iterator[Finding]:
        if not self.skips:
            return
        if not why:
            row, self._row = self._row, []
            if row and len(row) < self.skips:
                yield self._finding(FaultKind.NON_FINITE, step, row[0], "withdrawn", f"step {step.step} was not skipped")
            return
        self._row.append(step.step)
        first, times = self._row[0], len(self._row)
        words = f"step {first} was skipped" if times == 1 else f"steps {first} to {step.step} were skipped one after the other"
        evidence = f"{words}: gradients were not finite"
        if why == STATE:
            evidence += ", and buffers of the model are not any more"
        if times == self.skips or (why == STATE and times < self.skips):
            self._row = self._row if why != STATE else [first, *range(self.skips)]
            yield self._finding(FaultKind.NON_FINITE, step, first, "confirmed", evidence)
        elif times == 1:
            yield self._finding(FaultKind.NON_FINITE, step, first, "suspected", evidence)

    def _judge(self, step: WholeStep, loss: float) -> Iterator[Finding]:
        if not 0 < loss < math.inf:
            return
        stage = self._loss.add(math.log(loss), float(step.step))
        if stage is not None:
            usual, onset = math.exp(self._loss.center), int(self._loss.since)
            evidence = f"loss {loss:.4g} at step {step.step}, usually {usual:.4g}, and above since step {onset}"
            yield self._finding(FaultKind.LOSS_SPIKE, step, onset, stage, evidence)

    def _finding(self, kind: FaultKind, step: WholeStep, onset: int, stage: Stage, evidence: str) -> Finding:
        assert self._formed is not None, "no step is whole without a group"
        numbers = {"onset": float(onset)}
        return Finding(self.name, kind, (), step.at, step.at, evidence, stage=stage, numbers=numbers, step=step.step)
