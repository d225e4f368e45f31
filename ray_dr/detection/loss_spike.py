"""A loss, or a gradient's norm, that leaves the course it was on and does not come back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar

from ray_dr.detection.robust import scale
from ray_dr.model.signal import FaultKind, Finding, Formed, Sample, Stage, WholeStep

REMEMBERED, ENOUGH, RENEW = 64, 32, 8
Z = 6.0
OF_STEPS, STEPS_HIGH = 5, 3
"""So many of the last steps above the limit make a suspicion, and none of them ends it."""
STAYS = 20
"""Steps above the limit, from the suspicion on, that confirm it."""


@dataclass(slots=True)
class Course:
    """One quantity's logarithm. Its baseline is the median of the newer half of 64 steps, its scatter the deviation of
    all of them from it; once a spike is suspected its steps enter neither. `rise_least`: no smaller rise is one."""

    rise_least: float
    past: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    highs: deque[bool] = field(default_factory=lambda: deque(maxlen=OF_STEPS))
    center: float = 0.0
    limit: float = math.inf
    seen: int = 0
    since: float = 0.0
    stage: Stage = "withdrawn"
    stayed: int = 0

    def add(self, value: float, at: float) -> Stage | None:
        """One step's logarithm. The new stage, if it changes."""
        high = value > self.limit
        self.highs.append(high)
        if not any(self.highs):
            was, self.stage = self.stage, "withdrawn"
            self._learn(value)
            return None if was == "withdrawn" else "withdrawn"
        if self.stage == "withdrawn":
            if sum(self.highs) == 1 and high:
                self.since = at
            self._learn(value)
            if sum(self.highs) < STEPS_HIGH:
                return None
            self.stage, self.stayed = "suspected", 0
            return self.stage
        self.stayed += high
        if self.stage == "suspected" and self.stayed >= STAYS:
            self.stage = "confirmed"
            return self.stage
        return None

    def _learn(self, value: float) -> None:
        self.past.append(value)
        self.seen += 1
        if len(self.past) >= ENOUGH and self.seen % RENEW == 0:
            self.center = median(list(self.past)[-REMEMBERED // 2 :])
            self.limit = self.center + max(self.rise_least, Z * scale(self.past, self.center))

    def restart(self) -> None:
        """A new attempt: what was suspected is over, the course is kept."""
        self.highs.clear()
        self.stage = "withdrawn"


@dataclass(slots=True)
class LossSpike:
    """In two stages. Suspected: three of five steps above the baseline by six sigma, and by 30 % for the loss or three times
    for the gradient's norm: checkpoints from now on are not trusted. Confirmed: twenty steps stayed above. A spike that
    comes back is withdrawn, and costs nothing: most do, within some thirty steps.

    The logarithm is judged, as losses scatter in proportion; values that are not positive are not judged. Delay: 3 steps
    to suspect, 23 to confirm. One value per step: the mean over ranks of the loss, the highest norm.
    False alarms: three of five independent steps beyond six sigma: under a normal law 1e-26 per step; under Student's t with
    four degrees of freedom (six robust sigmas: 1.4e-3 of steps) 3e-8 per step, one suspicion in a year at 1 s a step.
    """

    name: ClassVar[str] = "loss_spike"
    hears: ClassVar[tuple[type, ...]] = (Formed, WholeStep)

    _formed: Formed | None = None
    _loss: Course = field(default_factory=lambda: Course(math.log(1.3)))
    _norm: Course = field(default_factory=lambda: Course(math.log(3.0)))

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding at each change of stage, for each of the two quantities."""
        match sample:
            case Formed():
                self._formed = sample
                self._loss.restart()
                self._norm.restart()
            case WholeStep(ranks=ranks) if self._formed is not None:
                losses = [done.loss for done in ranks if done.loss is not None]
                norms = [done.grad_norm for done in ranks if done.grad_norm is not None]
                if losses and all(map(math.isfinite, losses)):
                    yield from self._judge(self._loss, "loss", math.fsum(loss / len(losses) for loss in losses), sample)
                if norms:
                    yield from self._judge(self._norm, "gradient norm", max(norms), sample)

    def _judge(self, course: Course, what: str, value: float, step: WholeStep) -> Iterator[Finding]:
        if not 0 < value < math.inf:
            return
        stage = course.add(math.log(value), step.at)
        if stage is None or self._formed is None:
            return
        usual, limit = math.exp(course.center), math.exp(course.limit)
        evidence = f"{what} {value:.4g} at step {step.step}, usually {usual:.4g} (limit {limit:.4g})"
        if stage == "withdrawn":
            evidence += ": it came back by itself"
        subjects = tuple(self._formed.subject(done.rank) for done in step.ranks)
        numbers = {"value": value, "usual": usual, "limit": limit}
        yield Finding(
            self.name, FaultKind.LOSS_SPIKE, subjects, step.at, course.since, evidence, stage=stage, numbers=numbers,
            step=step.step,
        )  # fmt: skip
