"""Who of a job's nodes will be taken away: Ray's word (a drain) and what agents hear of their clouds, in one place.

The thread that looks for nodes asks Ray; the loop takes what is new to the detectors (`Senses`), and what they confirm comes
back as an event of the machine. A node that is to leave is not taken in again, not counted on, and keeps nobody's copies.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from ray_dr.actors import cluster
from ray_dr.model.events import NodeLeaving
from ray_dr.model.journal import Record
from ray_dr.model.signal import Finding, Notice
from ray_dr.recovery.rates import Measured

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

DRAIN = "ray drain"


class Notices:
    """`ask_ray` and `left_out` are for the thread that looks for nodes, `leaving` for any, the rest for the loop."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._measured = Measured()
        self._draining: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._known: dict[str, tuple[float, str]] = {}

    @property
    def leaving(self) -> frozenset[str]:
        """Ray's ids of nodes that will be taken away, of this job or not."""
        return frozenset((*self._draining, *self._known))

    def ask_ray(self) -> None:
        """Which nodes are being drained, and by when. Raises what Ray raises."""
        self._draining = cluster.draining()

    def heard(self, record: Record) -> None:
        """A record of the journal: how long things take is learned from it."""
        self._measured.add(record)

    def news(self) -> list[tuple[str, Notice]]:
        """What Ray has said of nodes of the job since the last time, with the seconds left now."""
        draining, now, ours = self._draining, time.time(), self._host.perform.has
        new = {node: at for node, at in draining.items() if self._told.get(node) != at and ours(node)}
        self._told |= new
        return [(node, Notice(DRAIN, at - now)) for node, at in new.items()]

    def confirmed(self, node: str, finding: Finding) -> None:
        """The detectors are sure that a node will be taken away."""
        now = time.time()
        left_s = finding.numbers.get("left_s", math.inf) - (time.monotonic() - finding.at)
        how = finding.evidence.rpartition("(")[2].rstrip(")")
        self._known = {**self._known, node: (now + left_s, how)}
        self._post(node)

    def joined(self, node: str) -> None:
        """A node became one of the job's: what was heard of it before counts."""
        if node in self._known:
            self._post(node)

    def _post(self, node: str) -> None:
        deadline, how = self._known[node]
        job = self._host.job
        rates = self._measured.rates(copies=job.memory.copies > 1, committed=bool(self._host.saves.stored))
        self._host.post(NodeLeaving(time.time(), node, deadline, how, rates))
