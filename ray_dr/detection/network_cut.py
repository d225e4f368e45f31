"""A node that lives, but is cut off: from its peers while the head hears it, or from the head while its peers do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ray_dr.detection.silence import Hearing
from ray_dr.model.signal import Closed, FaultKind, Finding, Now, RayWord, Released, Report, Sample, Subject

FRESH_S = 1.0
"""A node that reported no longer ago than this has a say, and can be said something of."""
DEAF_S = 1.5
"""An agent that has not answered for so long is unreachable to the one that asks it (about every 0.5 s)."""
LASTS_S = 1.0
HEAD_DEAF_S = 2.0
AFTERWARDS_S = 1.0
"""Peers' answers must be so much younger than the last report, so that they can't stem from before its end."""

Pair = tuple[str, str]


@dataclass(slots=True)
class NetworkCut:
    """From agents that ask each other for a sign of life, all of whom the head hears, or not.

    Between peers: the nodes that the head hears fall into islands by who answers whom. Those off the largest island are
    cut off; where islands are equally large nobody can tell, and all are named. A broken line between two nodes that
    share an island names both. From the head: a silent node whose answers to its peers are younger than its silence.
    `numbers["others"]`: how many are on the other side, 0 where nobody can say which side is at fault.

    Delay: 2.5 s between peers (1.5 s without an answer, lasting 1 s), 2 s from the head.
    False alarms: an agent would have to fail to answer for 2.5 s while it reports every 0.25 s all along: two threads
    of one process, so no pause does it, and lines to a silent node are not judged. From the head: reports would
    have to stop for 2 s while answers go on.
    """

    name: ClassVar[str] = "network_cut"
    hears: ClassVar[tuple[type, ...]] = (Report, Now, Closed, RayWord, Released)

    _hearing: Hearing = field(default_factory=Hearing)
    _lines: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """observer -> peer -> when it last answered"""
    _broken: dict[Pair, float] = field(default_factory=dict)
    _told: dict[frozenset[str], Finding] = field(default_factory=dict)

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding for each cut, and its withdrawal when it heals."""
        self._hearing.advance(sample.at)
        match sample:
            case Report():
                self._report(sample)
            case Now():
                yield from self._judge(sample.at)
            case Closed() | RayWord(alive=False):
                self._forget(sample.node)
            case Released():
                self._forget(sample.name)

    def _report(self, report: Report) -> None:
        self._hearing.heard(report.node, report.at)
        asked = {peer.node for peer in report.peers}
        for pair in [pair for pair in self._broken if pair[0] == report.node and pair[1] not in asked]:
            del self._broken[pair]
        if not asked:
            self._lines.pop(report.node, None)
            return
        self._lines[report.node] = {peer.node: report.at - peer.age_s for peer in report.peers}
        for peer in report.peers:
            pair = report.node, peer.node
            if peer.age_s > DEAF_S and self._fresh(peer.node, report.at):
                self._broken.setdefault(pair, report.at)
            else:
                self._broken.pop(pair, None)

    def _fresh(self, node: str, at: float) -> bool:
        return at - self._hearing.heard_at.get(node, -FRESH_S) <= FRESH_S

    def _judge(self, at: float) -> Iterator[Finding]:
        found = {names: (since, evidence, others) for names, since, evidence, others in self._between_peers(at)}
        for node, heard_at in self._hearing.heard_at.items():
            if at - heard_at > HEAD_DEAF_S:
                found.update(self._from_head(node, heard_at, at))
        for names, (since, evidence, others) in found.items():
            if names not in self._told:
                yield self._tell(names, at, since, evidence, others)
        for names in [names for names in self._told if names not in found]:
            told = self._told.pop(names)
            evidence = f"{_list(names)}: can be reached again, or is gone"
            yield Finding(self.name, told.kind, told.subjects, at, told.since, evidence, stage="withdrawn")

    def _tell(self, names: frozenset[str], at: float, since: float, evidence: str, others: int) -> Finding:
        subjects = tuple(Subject(name) for name in sorted(names))
        numbers = {"lasted_s": at - since, "nodes": float(len(names)), "others": float(others)}
        finding = Finding(self.name, FaultKind.NETWORK_CUT, subjects, at, since, evidence, numbers=numbers)
        self._told[names] = finding
        return finding

    def _from_head(self, node: str, heard_at: float, at: float) -> dict[frozenset[str], tuple[float, str, int]]:
        hear = [
            peer for peer, answers in self._lines.items()
            if self._fresh(peer, at) and answers.get(node, 0.0) > max(heard_at + AFTERWARDS_S, at - DEAF_S)
        ]  # fmt: skip
        evidence = f"node {node} has told the head nothing for {at - heard_at:.2f} s, but answers {len(hear)} peers"
        return {frozenset((node,)): (heard_at, evidence, len(hear) + 1)} if hear else {}

    def _between_peers(self, at: float) -> Iterator[tuple[frozenset[str], float, str, int]]:
        broken = {
            pair: since for pair, since in self._broken.items()
            if at - since >= LASTS_S and all(self._fresh(node, at) for node in pair)
        }  # fmt: skip
        if not broken:
            return
        since = min(broken.values()) - DEAF_S
        islands = sorted(self._islands(at), key=len, reverse=True)
        largest = [island for island in islands if len(island) == len(islands[0])]
        if len(islands) > len(largest) == 1:
            for island in islands[1:]:
                others = len(islands[0])
                yield island, since, f"{_list(island)}: heard by the head, cut off from {others} others", others
        elif len(islands) > 1:
            everybody = frozenset().union(*islands)
            evidence = f"{_list(everybody)}: heard by the head, but not by each other; nobody can say whose"
            yield everybody, since, evidence, 0
        else:
            for pair in {frozenset(pair) for pair in broken}:
                yield pair, since, f"{_list(pair)}: do not reach each other, though others reach both", 0

    def _islands(self, at: float) -> list[frozenset[str]]:
        """The nodes that have a say, put together along the lines that answered lately, of those that ask each other in either
        direction: what breaks at once is not seen to break at once, and a question needs both directions anyway."""
        island = {node: {node} for node in self._lines if self._fresh(node, at)}
        for one, answers in self._lines.items():
            for other, answered_at in answers.items():
                back_at = self._lines.get(other, {}).get(one, answered_at)
                whole = at - max(answered_at, back_at) <= DEAF_S
                if whole and one in island and other in island and island[one] is not island[other]:
                    island[one] |= island[other]
                    for node in island[other]:
                        island[node] = island[one]
        return list({frozenset(members) for members in island.values()})

    def _forget(self, node: str) -> None:
        self._hearing.forget(node)
        self._lines.pop(node, None)
        self._broken = {pair: since for pair, since in self._broken.items() if node not in pair}


def _list(names: frozenset[str]) -> str:
    return ("node " if len(names) == 1 else "nodes ") + ", ".join(sorted(names))
