"""The supervisor's senses: what agents, workers and connections say becomes samples for the detectors, and what they find
becomes records of the journal and events of the machine.

Detectors know nodes by the short names that are in the workers' names; the machine and Ray by their ids.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_dr.actors.health import Vigil
from ray_dr.detection.detectors import Detection
from ray_dr.model import codec
from ray_dr.model.checkpoint import StepRecord
from ray_dr.model.events import Hung, WorkerRaised
from ray_dr.model.recovery import Group
from ray_dr.model.signal import (
    Beacon,
    Closed,
    Exit,
    FaultKind,
    Finding,
    Formed,
    Member,
    Notice,
    Noticed,
    Now,
    Peer,
    Raised,
    Released,
    Report,
    Sample,
    StepDone,
    StoreSeen,
    Xid,
)

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

NOW_S = 0.1


def short(node: str) -> str:
    """A node as its workers' names begin with it."""
    return f"{node[:8]}{node[-5:]}"


def write_down(host: Host, finding: Finding) -> None:
    """What was found goes to the journal, with when it began (UTC seconds). From any thread."""
    fields = {key: value for key, value in codec.to_json(finding).items() if key not in ("at", "since")}
    host.note("finding", **fields, began=round(time.time() - (time.monotonic() - finding.since), 3))


class Senses:
    """Belongs to the host's one thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.vigil = Vigil(host)
        self._detection = self._begin()
        self._group: Formed | None = None
        self._at = 0.0
        self._nodes: dict[str, str] = {}
        self._said_at = 0.0
        self._hung: Finding | None = None

    def receive(self, at: float) -> None:
        """What is told next was received at this moment: what a busy host takes late is not late."""
        self._at = max(self._at, at)

    def beat(self, node: str, message: dict[str, Any]) -> None:
        """A sign of life of a node's agent, with its workers' beacons."""
        name = self._name(node)
        beacons = codec.from_json(tuple[Beacon, ...], message["beacons"])
        peers = codec.from_json(tuple[Peer, ...], message.get("peers", ()))
        xids = codec.from_json(tuple[Xid, ...], message.get("xids", ()))
        stores = codec.from_json(tuple[StoreSeen, ...], message.get("stores", ()))
        self._take(Report(self._at, name, message["beat"], beacons, peers, stores=stores, xids=xids))

    def noticed(self, node: str, notices: tuple[Notice, ...]) -> None:
        """A node will be taken away, say its cloud or Ray."""
        self._take(Noticed(self._now(), self._name(node), notices))

    def stepped(self, record: StepRecord) -> None:
        """A rank has done a step."""
        loss, grad_norm = record.logs.get("loss"), record.logs.get("grad_norm")
        finite = all(math.isfinite(value) for value in (loss, grad_norm) if value is not None)
        shard, _, digest = record.state_hash.rpartition(":")
        self.vigil.stepped(record)
        self._take(StepDone(self._at, record.rank, record.attempt, record.step, record.took_s, record.arrived_s, loss=loss,
                            grad_norm=grad_norm, finite=finite and not record.skipped, digest=digest, shard=shard,
                            skipped=record.skipped))  # fmt: skip

    def raised(self, event: WorkerRaised) -> None:
        """`train` left by an exception on a rank."""
        self._take(Raised(self._now(), event.worker, event.attempt, event.step, event.error, event.collateral))

    def exited(self, node: str, worker: str, how: str, *, oom: bool) -> None:
        """A worker's process has ended, and nobody had asked for it."""
        self._take(Report(self._now(), self._name(node), 0.0, exits=(Exit(worker, how, oom),)))

    def closed(self, node: str) -> None:
        """The connection to a node's agent is gone."""
        self._take(Closed(self._now(), self._name(node)))

    def released(self, name: str, *, node: bool = False) -> None:
        """The host ends a worker, or gives a node back: its end is no news."""
        self._take(Released(self._now(), self._name(name) if node else name))

    def formed(self, group: Group) -> None:
        """An attempt begins."""
        self.vigil.formed(group)
        members = tuple(Member(rank, worker) for rank, worker in enumerate(group.members))
        self._form(Formed(self._now(), group.attempt, members))

    def broken(self, attempt: int) -> None:
        """The group is no more."""
        self.vigil.formed(None)
        self._form(Formed(self._now(), attempt, ()))

    def _form(self, formed: Formed) -> None:
        self._hung, self._group = None, formed
        self._take(formed)

    def look(self) -> None:
        """Time passes; to be called at least every tenth of a second."""
        now = self._now()
        if now - self._said_at >= NOW_S:
            self._said_at = now
            self._take(Now(now))
            self._end_hang(now)

    def _begin(self) -> Detection:
        asked = self._host.job.detection
        return Detection(shadow=asked.shadow, off=asked.off, more=self.vigil.detectors())

    def _name(self, node: str) -> str:
        name = short(node)
        self._nodes[name] = node
        return name

    def _now(self) -> float:
        self._at = max(self._at, time.monotonic())
        return self._at

    def _take(self, sample: Sample) -> None:
        try:
            found = self._detection.observe(sample)
        except Exception as error:  # a supervisor that ended of it would hear the same again, and end again
            self._host.note("detection.failed", error=repr(error), sample=type(sample).__name__)
            self._detection, found = self._begin(), ()
            if self._group is not None and sample is not self._group:
                self._take(replace(self._group, at=self._at))
        for finding in found:
            write_down(self._host, finding)
            self._act(finding)

    def _act(self, finding: Finding) -> None:
        self.vigil.found(finding)
        match finding.kind:
            case FaultKind.NODE_FROZEN if finding.stage == "confirmed" and not finding.shadow:
                for subject in finding.subjects:
                    self._host.perform.lose_node(self._nodes.get(subject.node, ""), finding.evidence)
            case FaultKind.NETWORK_CUT if finding.stage == "confirmed" and not finding.shadow:
                self._cut(finding)
            case FaultKind.STRAGGLER if finding.stage == "confirmed" and not finding.shadow:
                for subject in finding.subjects:
                    self._host.machines.hold_slow(self._nodes.get(subject.node, ""), finding.evidence)
            case FaultKind.PREEMPTION if finding.stage == "confirmed" and not finding.shadow:
                for subject in finding.subjects:
                    self._host.notices.confirmed(self._nodes.get(subject.node, ""), finding)
            case FaultKind.HANG:
                self._hung = finding if finding.stage == "confirmed" and not finding.shadow else None
            case _:
                pass

    def _cut(self, finding: Finding) -> None:
        """The smaller side is given up, and not taken again at once: Ray may well reach it. Where nobody can say which side is
        at fault, or all would be lost, what hangs or breaks of it tells more."""
        if finding.numbers.get("others", 0.0) <= len(finding.subjects):
            return
        for subject in finding.subjects:
            node = self._nodes.get(subject.node, "")
            self._host.machines.condemn(node, finding.kind, finding.evidence)
            self._host.perform.lose_node(node, finding.evidence)

    def _end_hang(self, now: float) -> None:
        """What hangs is given as long as the job's owner says, and then ended."""
        hung = self._hung
        if hung is None or now - hung.since < self._host.job.recovery.hang_s:
            return
        self._hung = None
        workers = tuple(subject.worker for subject in hung.subjects)
        if (group := self._host.group) is not None:
            self._host.decide(Hung(time.time(), group.attempt, workers, hung.evidence, self._host.progress.step))
