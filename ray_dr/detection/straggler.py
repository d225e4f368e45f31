"""A rank that is slower than the others, so that all wait for it at each step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import ClassVar

from ray_dr.detection.robust import TO_SIGMA, median_of_others
from ray_dr.model.signal import FaultKind, Finding, Formed, Sample, WholeStep

WARM_UP = 5
"""Steps of an attempt that say nothing: compilation, caches."""
POOL, RENEW = 1024, 32
SIGMA_LEAST = 0.01
CLIP = 3.0
SMALL = math.log(1.05)
"""The steady slowness that the cumulative sum is tuned for."""
LARGE = math.log(1.10)
Z_LARGE = 5.0
ALLOWANCE_LEAST = 0.1
RUN_LENGTH = 1e10
"""Rank-steps between two false alarms of the cumulative sum."""
WINDOW_STEPS, WINDOW_MOST, WINDOW_S = 32, 256, 10.0
OF_WINDOWS, WINDOWS_SLOW, WINDOWS_WELL = 5, 3, 5


@dataclass(slots=True)
class Pace:
    """What is remembered of one rank: this window's scores, the sum, the last windows' verdicts."""

    scores: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_MOST))
    sum: float = 0.0
    verdicts: deque[bool] = field(default_factory=lambda: deque(maxlen=OF_WINDOWS))
    well: int = 0


@dataclass(slots=True)
class Straggler:
    """From the time each rank took to *arrive* at a step's first collective: after it all look equally slow.

    A rank's score is the logarithm of what the step would take if all arrived as late as it, over what it would take if
    all arrived as its peers' median: whatever is common to all is gone. In windows of 32 steps (and 10 s at least) two
    tests: the window's median beyond 10 % and five sigma; and a one-sided cumulative sum (Page 1954) of the scores,
    in units of their sigma and clipped at three, for 5 % that stay. Slow in 3 of the last 5 windows: a finding.

    Delay: 30 to 40 s, or 96 to 128 steps if that is longer, where 5 % shows in a window (sigma up to about 4 % of a step);
    with a sigma of 25 % it takes some 1300 steps (both simulated), and beyond that only a fifth of a sigma and more is seen.
    False alarms: the sum's limit is set by Siegmund's formula for one in 1e10 rank-steps (1000 ranks at 1 s: one in 116
    days), before three of five windows have to agree; five sigma of a median: 3e-7 per rank and window, likewise.
    """

    name: ClassVar[str] = "straggler"
    hears: ClassVar[tuple[type, ...]] = (Formed, WholeStep)

    _formed: Formed | None = None
    _paces: list[Pace] = field(default_factory=list)
    _pool: deque[float] = field(default_factory=lambda: deque(maxlen=POOL))
    _steps: int = 0
    _sigma: float = 0.0
    _bias: float = 0.0
    _window_at: float = 0.0
    _told: dict[int, Finding] = field(default_factory=dict)

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding for each rank that stays slow, withdrawn when it has been well for five windows."""
        match sample:
            case Formed():
                self._formed, self._paces = sample, [Pace() for _ in sample.members]
                self._steps, self._sigma, self._bias, self._window_at = 0, 0.0, 0.0, sample.at
                self._pool.clear()
                self._told = {}
            case WholeStep(ranks=ranks) if self._formed is not None and len(ranks) == len(self._paces) > 1:
                arrived = [done.arrived_s for done in ranks if done.arrived_s is not None]
                self._steps += 1
                if self._steps > WARM_UP and len(arrived) == len(ranks):
                    self._add(_scores(arrived, median(done.took_s for done in ranks)))
                    if len(self._paces[0].scores) >= WINDOW_STEPS and sample.at - self._window_at >= WINDOW_S:
                        self._window_at = sample.at
                        yield from self._judge(sample)

    def _add(self, scores: list[float]) -> None:
        self._pool.extend(scores)
        if self._steps % RENEW == 0:
            self._sigma = max(SIGMA_LEAST, TO_SIGMA * median(map(abs, self._pool)))
        if not self._sigma:
            return
        allowance = _allowance(self._sigma)
        top = 2 * _limit(allowance)
        clipped = [max(-CLIP, min(CLIP, score / self._sigma)) for score in scores]
        self._bias += (fmean(clipped) - self._bias) / POOL
        for pace, score, raw in zip(self._paces, clipped, scores, strict=True):
            pace.sum = min(top, max(0.0, pace.sum + score - self._bias - allowance))
            pace.scores.append(raw)

    def _judge(self, step: WholeStep) -> Iterator[Finding]:
        limit = _limit(_allowance(self._sigma))
        for rank, pace in enumerate(self._paces):
            middle = median(pace.scores)
            error = math.sqrt(math.pi / 2 / len(pace.scores)) * self._sigma  # of a median
            slow = pace.sum > limit or (middle > LARGE and middle > Z_LARGE * error)
            pace.scores.clear()
            pace.verdicts.append(slow)
            pace.well = 0 if slow else pace.well + 1
            if rank not in self._told and sum(pace.verdicts) >= WINDOWS_SLOW and slow:
                yield self._tell(rank, step, middle, limit)
            elif rank in self._told and pace.well >= WINDOWS_WELL:
                yield self._withdraw(rank, step)

    def _tell(self, rank: int, step: WholeStep, middle: float, limit: float) -> Finding:
        assert self._formed is not None, "only members are slow"
        share, total = math.expm1(middle), self._paces[rank].sum
        evidence = (
            f"rank {rank} arrives so late at the first collective that a step takes {share:.0%} longer than by its peers, "
            f"in {sum(self._paces[rank].verdicts)} of the last {OF_WINDOWS} windows"
        )
        numbers = {"slower": share, "cusum": total, "limit": limit, "sigma": self._sigma}
        self._told[rank] = Finding(
            self.name, FaultKind.STRAGGLER, (self._formed.subject(rank),), step.at, step.at, evidence, "warning",
            numbers=numbers, step=step.step,
        )  # fmt: skip
        return self._told[rank]

    def _withdraw(self, rank: int, step: WholeStep) -> Finding:
        told = self._told.pop(rank)
        evidence = f"rank {rank} keeps up again"
        return Finding(self.name, told.kind, told.subjects, step.at, told.since, evidence, "warning", "withdrawn")


def _scores(arrived: list[float], took_s: float) -> list[float]:
    """For each rank the logarithm of (the step if all arrived like it) / (the step if all arrived like its peers' median)."""
    ordered = sorted(arrived)
    even_s = max(took_s - ordered[-1] + median(ordered), 1e-9)
    places: dict[float, int] = {}
    for place, value in enumerate(ordered):
        places.setdefault(value, place)
    return [math.log1p(max(-0.9, (own - median_of_others(ordered, places[own])) / even_s)) for own in arrived]


def _allowance(sigma: float) -> float:
    """Half of the shift to be found, in sigmas: what the sum lets pass at each step."""
    return max(ALLOWANCE_LEAST, SMALL / 2 / sigma)


def _limit(allowance: float) -> float:
    """Where the sum alarms once in RUN_LENGTH: run length = (e^(2kb) - 2kb - 1) / 2k^2, b = h + 1.166 (D. Siegmund, Sequential
    Analysis, 1985, 2.52; without the linear term, which is small beside the other)."""
    return max(1.0, math.log1p(2 * allowance**2 * RUN_LENGTH) / (2 * allowance) - 1.166)
