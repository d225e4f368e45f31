"""Nobody gets on: one rank is behind and does not move, and the others wait for it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar

from ray_dr.detection.robust import quantile
from ray_dr.model.signal import (
    IN_STEP,
    Beacon,
    FaultKind,
    Finding,
    Formed,
    Now,
    Report,
    Sample,
    Stage,
    WholeStep,
    WorkerPhase,
)

NOTICED_S = 0.7
"""From when a limit is exceeded until it is noticed: a report (0.25 s and what it is late by) and a look (0.25 s)."""
LEAST_S = 5.0 - NOTICED_S
"""No limit is shorter."""
SUSPECTED = 3.0
"""Suspected at so many times the 99th percentile."""
CONFIRMED = 5.3 / 2.326
"""Confirmed where a lognormal law through the median and the 99th percentile (its 2.326 sigma) has 5.3 sigma."""
UNLEARNED, UNLEARNED_FIRST, ENOUGH = 4.0, 20.0, 100
"""While fewer than ENOUGH are known: of the longest so far, 4 + 20 / how many are known."""
STEPS_REMEMBERED, PHASES_REMEMBERED = 512, 128
LOOK_S, REPORT_S = 0.25, 0.25
UNKNOWN_S = 600.0
"""For what has never been seen to end: a first step, a compilation, a first evaluation."""
LEAST_OUTSIDE_S = {WorkerPhase.SAVE: 90.0, WorkerPhase.EVAL: 30.0, WorkerPhase.COMPILE: 120.0}
"""Outside of steps times differ more. A save may wait 60 s for a free slot before it says itself that there is none."""

Place = tuple[int, int, bool]


@dataclass(slots=True)
class Hang:
    """From beacons: ranks are ordered by (step, collectives entered, out of the last one again). Those at the end of the
    order are the ones the group waits for; whoever waits in a collective for them is not to blame. A rank is behind for
    too long when it has been in its phase beyond that phase's limit, by its own node's clock, as of its agent's last
    report (so a silent agent makes nobody late). When those behind are all inside of a collective it is a rank whose
    process is stopped; or, when nobody has moved for as long, the network or a kernel.

    Delay. Within a step: suspected after max(5 s, 3 x p99) of the last 512 steps' times (later where fewer than 100 are
    known), confirmed at the same time where p99 is up to 2.4 medians, and later with more jitter: at 5 medians after
    7.8 x p99. First step: 600 s. Compile, eval and save: 600 s until one was seen to end, then by the same rule from
    their own times, with floors of 120, 30 and 90 s. Setting up has the machine's own limit. What is seen to take
    longer than its limit is learned from.

    False alarms: confirmed with a chance of 6e-8 per step where step times are lognormal: once in 76 days at 0.3 s per
    step, in 250 days at 1 s; at 0.1 s and p99 = 5 medians the floor is 43 medians (54 days), with less jitter never.
    Suspected, at p99 = 5 medians, once in 1.7e4 steps (two hours at 0.3 s, six at 1 s); at 3 medians once in 1.2e8
    steps (0.3 s) or 2.7e5 (1 s); at 2 medians never. A suspicion costs a look at the stacks.
    """

    name: ClassVar[str] = "hang"
    hears: ClassVar[tuple[type, ...]] = (Formed, Report, WholeStep, Now)

    _formed: Formed | None = None
    _began: int = -1
    _beacons: dict[int, tuple[Beacon, float]] = field(default_factory=dict)
    """rank -> its beacon, and for how long it had been in that phase when its agent said so"""
    _heard_at: dict[int, float] = field(default_factory=dict)
    _moved_at: float = 0.0
    """When any rank was last seen in another place than before."""
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_REMEMBERED))
    _phases: dict[WorkerPhase, deque[float]] = field(default_factory=dict)
    _looked_at: float = 0.0
    _told: Finding | None = None

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A suspicion, then a confirmed finding, about the ranks that are behind; withdrawn when they move on."""
        match sample:
            case Formed():
                if self._formed is None or len(self._formed.members) != len(sample.members) > 0:
                    self._steps.clear()  # another world, other times
                self._formed, self._began, self._told = sample, -1, None
                self._beacons, self._heard_at = {}, {}
            case Report(beacons=beacons) if beacons and self._formed is not None:
                for beacon in beacons:
                    if beacon.attempt == self._formed.attempt and beacon.rank < len(self._formed.members):
                        self._heard(beacon, sample.clock - beacon.since, sample.at)
            case WholeStep(ranks=ranks) if 0 <= self._began < sample.step - 1:
                self._steps.append(max(done.took_s for done in ranks))
            case Now() if sample.at - self._looked_at >= LOOK_S:
                self._looked_at = sample.at
                yield from self._look(sample.at)

    def _heard(self, beacon: Beacon, age_s: float, at: float) -> None:
        before = self._beacons.get(beacon.rank)
        if before is None or _place(before[0]) != _place(beacon):
            self._moved_at = at
        if before is not None and before[0].since != beacon.since and before[0].phase in LEAST_OUTSIDE_S:
            took_s = beacon.since - before[0].since
            self._phases.setdefault(before[0].phase, deque(maxlen=PHASES_REMEMBERED)).append(took_s)
        self._beacons[beacon.rank], self._heard_at[beacon.rank] = (beacon, age_s), at
        if self._began < 0 and beacon.phase in IN_STEP:
            self._began = beacon.step

    def _look(self, at: float) -> Iterator[Finding]:
        if self._formed is None or not self._formed.members or len(self._beacons) < len(self._formed.members):
            return
        last = min(_place(beacon) for beacon, _ in self._beacons.values())
        behind = {rank: pair for rank, pair in self._beacons.items() if _place(pair[0]) == last}
        told, self._told = self._told, self._judge(behind, at)
        if told is not None and (self._told is None or self._told.subjects != told.subjects):
            evidence = f"{', '.join(map(str, told.subjects[:8]))}: moved on"
            yield Finding(self.name, told.kind, told.subjects, at, told.since, evidence, stage="withdrawn", step=told.step)
            told = None
        if self._told is not None and (told is None or self._told.stage != told.stage):
            yield self._told

    def _judge(self, behind: dict[int, tuple[Beacon, float]], at: float) -> Finding | None:
        late = {
            rank: (beacon, age_s) for rank, (beacon, age_s) in behind.items()
            if (beacon.stopped or beacon.phase is not WorkerPhase.COLLECTIVE) and LEAST_S < age_s > self._limit(beacon)
        }  # fmt: skip
        if not late and all(beacon.phase is WorkerPhase.COLLECTIVE for beacon, _ in behind.values()):
            # Who waits is late only once nobody has moved for so long: until now he may have waited for one that was slow.
            still_s = min(self._heard_at[rank] for rank in behind) - self._moved_at + REPORT_S
            waited_s = min(still_s, *(age_s for _, age_s in behind.values()))
            if waited_s <= LEAST_S or waited_s <= self._limit(next(iter(behind.values()))[0]):
                return None
            late = {rank: (beacon, waited_s) for rank, (beacon, _) in behind.items()}
        return self._finding(late, at) if late else None

    def _finding(self, late: dict[int, tuple[Beacon, float]], at: float) -> Finding:
        assert self._formed is not None, "only a group hangs"
        age_s = min(age_s for _, age_s in late.values())
        beacon = next(beacon for beacon, _ in late.values())
        limit_s = self._limit(beacon, sure=True)
        stage: Stage = "confirmed" if age_s > limit_s else "suspected"
        inside = beacon.phase is WorkerPhase.COLLECTIVE
        waiting = sum(other.phase is WorkerPhase.COLLECTIVE for other, _ in self._beacons.values()) - inside * len(late)
        who = ", ".join(str(rank) for rank in sorted(late)[:8]) + (", ..." if len(late) > 8 else "")
        what = f"collective {beacon.collective}" if inside else beacon.phase.value
        stopped = ", its process is stopped" if beacon.stopped else ""
        evidence = f"rank {who} in {what} of step {beacon.step} for {age_s:.1f} s{stopped}; {waiting} wait for it"
        if inside and not beacon.stopped:
            evidence += ": all have entered it, so the network or a kernel, and no rank"
        numbers = {"age_s": age_s, "limit_s": limit_s, "waiting": float(waiting), "ranks": float(len(late))}
        subjects = tuple(self._formed.subject(rank) for rank in sorted(late))
        return Finding(
            self.name, FaultKind.HANG, subjects, at, at - age_s, evidence, stage=stage, numbers=numbers, step=beacon.step
        )  # fmt: skip

    def _limit(self, beacon: Beacon, *, sure: bool = False) -> float:
        """Seconds that a rank may be in its phase; `sure`: before it is no suspicion any more."""
        match beacon.phase:
            case WorkerPhase.SETUP:
                return math.inf
            case WorkerPhase.SAVE | WorkerPhase.EVAL | WorkerPhase.COMPILE as phase:
                return _learned(self._phases.get(phase, ()), LEAST_OUTSIDE_S[phase], sure=sure)
            case WorkerPhase.DONE:  # it is behind only for those that wait for it in a collective
                waits = any(other.phase is WorkerPhase.COLLECTIVE for other, _ in self._beacons.values())
                return _learned(self._steps, LEAST_S, sure=sure) if waits else math.inf
            case _:
                first = beacon.step <= self._began
                return UNKNOWN_S if first else _learned(self._steps, LEAST_S, sure=sure)


def _learned(times: deque[float] | tuple[()], least_s: float, *, sure: bool) -> float:
    if not times:
        return UNKNOWN_S
    if len(times) < ENOUGH:
        return max(least_s, (UNLEARNED + UNLEARNED_FIRST / len(times)) * max(times))
    usual_s, rare_s = max(median(times), 1e-6), quantile(times, 0.99)
    limit_s = max(SUSPECTED * rare_s, usual_s * (rare_s / usual_s) ** CONFIRMED if sure else 0.0)
    return max(least_s, limit_s - NOTICED_S)


def _place(beacon: Beacon) -> Place:
    return beacon.step, beacon.collective, beacon.phase is not WorkerPhase.COLLECTIVE

