"""A disk or a store that refuses, fails too often, or does not answer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ray_dr.model.signal import Closed, FaultKind, Finding, Released, Report, Sample, StoreSeen, Subject

WINDOW_S = 60.0
USUAL = 0.1
"""The share of tries that may fail in a store's ordinary life: throttling asks for patience, and gets it."""
CHANCE = 2e-9
HANGING_LEAST_S, HANGING = 30.0, 3.0
"""A request is hanging when it is older than this, and than so many times the longest one before."""
REMEMBERED = 32


@dataclass(slots=True)
class Health:
    """One node's view of one place: tries in this window and the one before, the longest requests, and what was told."""

    began: float
    now: tuple[int, int] = (0, 0)
    before: tuple[int, int] = (0, 0)
    oldest_s: float = 0.0
    longest_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    told: Finding | None = None

    def add(self, seen: StoreSeen, at: float) -> None:
        """What a report says of it."""
        if at - self.began > WINDOW_S:
            self.began, self.before, self.now = at, self.now, (0, 0)
        self.now = self.now[0] + seen.done, self.now[1] + seen.failed
        if seen.oldest_s < self.oldest_s:  # it came to an end
            self.longest_s.append(self.oldest_s)
        self.oldest_s = seen.oldest_s

    def trouble(self, seen: StoreSeen) -> str:
        """What is wrong with it, in words; empty when nothing is."""
        if seen.refused:
            return f"it refuses: {seen.refused}"
        done, failed = self.now[0] + self.before[0], self.now[1] + self.before[1]
        if _exceeds(failed, done + failed):
            return f"{failed} of {done + failed} tries failed"
        if self.oldest_s > max(HANGING_LEAST_S, HANGING * max(self.longest_s, default=0.0)):
            return f"a request has been waiting for {self.oldest_s:.0f} s"
        return ""


@dataclass(slots=True)
class Storage:
    """Per node and place. A refusal that patience does not help (full, denied) counts at once; failures when more of the
    tries of the last one to two minutes failed than a tenth explains; a request when it hangs.

    Delay: a report; nine tries where all fail; 30 s for one that hangs.
    False alarms: the chance that an ordinary store fails so often is below 2e-9 per look (Chernoff's bound on the
    binomial law: exp(-n KL(failed/n, 1/10))): at one look per report one in 4 years per node and place. A request
    that takes 30 s and three times the longest of the last 32 is a finding, and withdrawn when it ends.
    """

    name: ClassVar[str] = "storage"
    hears: ClassVar[tuple[type, ...]] = (Report, Closed, Released)

    _health: dict[tuple[str, str], Health] = field(default_factory=dict)

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding when trouble begins, its withdrawal when it is over."""
        match sample:
            case Report(stores=stores) if stores:
                for seen in stores:
                    yield from self._judge(sample, seen)
            case Closed(node=name) | Released(name=name):
                self._health = {key: health for key, health in self._health.items() if key[0] != name}

    def _judge(self, report: Report, seen: StoreSeen) -> Iterator[Finding]:
        health = self._health.setdefault((report.node, seen.place), Health(report.at))
        health.add(seen, report.at)
        trouble = health.trouble(seen)
        told = health.told
        where = f"{seen.place}, as node {report.node} sees it"
        if trouble and told is None:
            tries = health.now[0] + health.now[1] + health.before[0] + health.before[1]
            numbers = {"failed": float(health.now[1] + health.before[1]), "tries": float(tries), "oldest_s": health.oldest_s}
            health.told = Finding(
                self.name, FaultKind.STORAGE, (Subject(report.node),), report.at, report.at - health.oldest_s,
                f"{where}: {trouble}", "warning", numbers=numbers, error=seen.refused,
            )  # fmt: skip
            yield health.told
        elif told is not None and not trouble and seen.done:
            health.told = None
            health.now = health.before = (0, 0)
            yield Finding(
                self.name, told.kind, told.subjects, report.at, told.since, f"{where}: it works again", "warning", "withdrawn"
            )  # fmt: skip


def _exceeds(failed: int, tries: int) -> bool:
    """Whether so many failures are beyond chance where a share of USUAL is to be expected."""
    share = failed / tries if tries else 0.0
    if share <= USUAL:
        return False
    divergence = share * math.log(share / USUAL)
    if share < 1:
        divergence += (1 - share) * math.log((1 - share) / (1 - USUAL))
    return tries * divergence > -math.log(CHANCE)
