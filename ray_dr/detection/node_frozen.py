"""A node that says nothing while its connection stays open: stopped, hung, or off the network without a word."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import ClassVar

from ray_dr.detection.robust import quantile
from ray_dr.detection.silence import Hearing
from ray_dr.model.signal import Closed, FaultKind, Finding, Now, RayWord, Released, Report, Sample, Stage, Subject

BEAT_S = 0.25
"""An agent promises a report at least this often (more often when there is news): only what is later than this is late."""
PAUSE_S = 0.6
"""A pause that anybody may take: a garbage collection, a page-in, a busy machine."""
SIGMA_LEAST_S = 0.1
SURE, SEEN_BY_PEERS = 10.0, 5.0
"""Suspicion that is enough alone, and together with peers that hear nothing either."""
UNANSWERED_S = 0.9
AFTERWARDS_S, STILL_S = 0.5, 1.5
"""A peer that heard the node so long after its last report, and no longer ago than this, shows that it lives: then it is cut
off, not frozen."""
REMEMBERED = 256
TAIL = 0.9
FADE, BEYOND_LONGEST = 1 - 1e-5, 2.0
"""The longest delay fades by half in five hours; twice as long is beyond what was ever seen, whatever a law says."""


@dataclass(slots=True)
class Habit:
    """How late one node's reports are wont to be, in seconds beyond the promised beat."""

    late_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    longest_s: float = 0.0
    _mean_s: float = 0.0
    _square: float = 0.0

    def add(self, late_s: float) -> None:
        """One more report came, `late_s` late."""
        self.late_s.append(late_s)
        self.longest_s = max(late_s, self.longest_s * FADE)
        self._mean_s += (late_s - self._mean_s) / len(self.late_s)
        self._square += (late_s * late_s - self._square) / len(self.late_s)

    def suspicion(self, late_s: float) -> float:
        """-log10 of the chance that a living node is `late_s` late: of two laws the one that finds it less strange.

        A normal law whose sigma has a floor, beyond the pause anybody may take (the phi-accrual detector: Hayashibara et
        al., SRDS 2004; the pause and the floor are Akka's); and an exponential tail fitted to this node's latest tenth, up to
        twice the longest delay of the last hours, as delays have some bound and a law has none.
        """
        sigma_s = max(SIGMA_LEAST_S, math.sqrt(max(0.0, self._square - self._mean_s**2)))
        normal = -math.log10(max(1e-300, 0.5 * math.erfc((late_s - PAUSE_S - self._mean_s) / sigma_s / math.sqrt(2))))
        return min(normal, self._tail(late_s))

    def _tail(self, late_s: float) -> float:
        if not self.late_s or late_s > BEYOND_LONGEST * self.longest_s:
            return math.inf
        edge_s = quantile(self.late_s, TAIL)
        beyond = [late - edge_s for late in self.late_s if late > edge_s]
        if late_s <= edge_s or not beyond:
            return math.inf if late_s > edge_s else 0.0
        return -math.log10(1 - TAIL) + (late_s - edge_s) / fmean(beyond) / math.log(10)


@dataclass(slots=True)
class NodeFrozen:
    """Phi-accrual suspicion on the agents' reports, with Ray's word and the peers' as second witnesses.

    Ray's word that the node is dead makes it NodeGone's; that it is alive says nothing, as Ray needs 15 s and more. Peers
    that hear the node after its last report acquit it (NetworkCut then names the line); peers that hear nothing either
    make less suspicion enough. Silence of the host's own is not counted; and when all nodes (two at least) are silent at
    once it stays a suspicion, as it may be the head's own line, until one of them speaks.

    Delay: 0.25 + 0.6 + 6.4 sigma = 1.5 s where reports are no more than 0.1 s irregular, 1.3 s with the peers' word; a
    node whose reports are wont to be late is given more, up to twice what it was ever late by.
    False alarms: suspicion 10 is a chance of 1e-10 per report under the fitted law: with 4 reports/s one in 29 000
    days per node, one in 28 days with 1024 nodes (5, with the peers' word, needs both to fail together). Reality has
    heavier tails, which is what the fitted tail and the pause are for: were a node's delays exponential, with a mean
    too long for the pause to cover (0.1 s and more), twice the longest would be exceeded once in 150 days (simulated).
    A finding is withdrawn when the node speaks again, and what it was late by is learned.
    """

    name: ClassVar[str] = "node_frozen"
    hears: ClassVar[tuple[type, ...]] = (Report, Now, Closed, RayWord, Released)

    _hearing: Hearing = field(default_factory=Hearing)
    _habits: dict[str, Habit] = field(default_factory=dict)
    _answered: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """node -> peer that asks it -> (when that peer said so, when the node last answered it)"""
    _told: dict[str, Finding] = field(default_factory=dict)

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding when a node's silence is beyond belief, its withdrawal when the node speaks again."""
        self._hearing.advance(sample.at)
        match sample:
            case Report():
                yield from self._report(sample)
            case Now():
                silent = {node: at for node, at in self._hearing.heard_at.items() if sample.at - at > BEAT_S + PAUSE_S}
                alone = len(silent) < max(2, len(self._hearing.heard_at))
                for node, heard_at in silent.items():
                    if node not in self._told or (alone and self._told[node].stage == "suspected"):
                        yield from self._judge(node, heard_at, sample.at, alone=alone)
            case Closed() | RayWord(alive=False):
                self._forget(sample.node)
            case Released():
                self._forget(sample.name)

    def _report(self, report: Report) -> Iterator[Finding]:
        late_s = self._hearing.heard(report.node, report.at) - BEAT_S
        self._habits.setdefault(report.node, Habit()).add(max(0.0, late_s))
        for peer in report.peers:
            self._answered.setdefault(peer.node, {})[report.node] = report.at, report.at - peer.age_s
        told = self._told.pop(report.node, None)
        if told is not None:
            evidence = f"node {report.node} speaks again after {late_s + BEAT_S:.2f} s"
            yield Finding(self.name, told.kind, told.subjects, report.at, told.since, evidence, stage="withdrawn")

    def _judge(self, node: str, heard_at: float, at: float, *, alone: bool) -> Iterator[Finding]:
        silent_s = at - heard_at
        suspicion = self._habits[node].suspicion(silent_s - BEAT_S)
        answers = [answer for said_at, answer in self._answered.get(node, {}).values() if said_at > heard_at]
        if any(answer > max(heard_at + AFTERWARDS_S, at - STILL_S) for answer in answers):
            return
        unheard = bool(answers) and at - max(answers) > UNANSWERED_S
        if suspicion < (SEEN_BY_PEERS if unheard else SURE):
            return
        word = f"; {len(answers)} peers hear nothing either" if unheard else ""
        word += "" if alone else "; so have all others, so it may be the head's own line"
        stage: Stage = "confirmed" if alone else "suspected"
        evidence = f"node {node} has said nothing for {silent_s:.2f} s (suspicion {suspicion:.0f}){word}"
        numbers = {"silent_s": silent_s, "suspicion": suspicion, "peers": float(len(answers))}
        self._told[node] = Finding(
            self.name, FaultKind.NODE_FROZEN, (Subject(node),), at, heard_at, evidence, stage=stage, numbers=numbers
        )
        yield self._told[node]

    def _forget(self, node: str) -> None:
        self._hearing.forget(node)
        for book in (self._habits, self._answered, self._told):
            book.pop(node, None)
        for answers in self._answered.values():
            answers.pop(node, None)
