"""Training's own health as the supervisor sees it: what detectors find becomes events, and versions from before are kept.

A version is *safe* when it is from before whatever is suspected now, and, where replicas are compared, not newer than the last
comparison at which they agreed. As long as retention would leave no safe version in a place, nothing goes there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ray_dr.detection.divergence import Divergence
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.events import Corrupted, Diverged
from ray_dr.model.recovery import Group
from ray_dr.model.signal import FaultKind, Finding
from ray_dr.recovery.quarantine import usable

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

STEPS_OPEN = 64


class Vigil:
    """Belongs to the host's one thread; `holds` is for any."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._onset: int | None = None
        self._good: int | None = None
        self._trusted = False
        self._open: dict[int, list[StepRecord]] = {}
        self._batch = 0

    def detectors(self) -> tuple[Divergence, ...]:
        """Besides the usual ones, as the job's owner wants them."""
        health = self._host.job.health
        skips = health.skips_in_a_row if health.non_finite == "skip" else 0
        return (Divergence(skips, health.spike == "rollback"),)

    def formed(self, group: Group | None) -> None:
        """A group forms (None: there is no more). What it restores is as good as the last comparison before it. What was
        suspected of a group that is no more stays so until the next one: its survivors' state may be what it is about."""
        self._open = {}
        if group is None:
            return
        self._onset = None
        if self._good is not None:
            self._good = min(self._good, group.restore.step if group.restore else 0)

    def stepped(self, record: StepRecord) -> None:
        """A rank of the group at work has done a step."""
        records = self._open.setdefault(record.step, [])
        records.append(record)
        if len(records) == record.world:
            del self._open[record.step]
            self._whole(records)
        elif len(self._open) > STEPS_OPEN:
            del self._open[min(self._open)]

    def found(self, finding: Finding) -> None:
        """What a detector says."""
        if finding.shadow:
            return
        if finding.detector == Divergence.name:
            onset = int(finding.numbers["onset"])
            self._onset = None if finding.stage == "withdrawn" else onset
            if finding.stage == "confirmed":
                self._diverged(finding, onset)
        elif finding.kind is FaultKind.CORRUPTION:
            self._corrupted(finding)

    def doubts(self, version: VersionId) -> bool:
        """Whether a version is from after a beginning of what may be trouble: it must not take the place of an older one."""
        return self._onset is not None and version.step >= self._onset

    def holds(self, left: Iterable[VersionId]) -> bool:
        """Whether retention has to wait, as what it would leave holds no safe version."""
        steps = [step for step in (None if self._onset is None else self._onset - 1, self._good) if step is not None]
        rollbacks = self._host.state.rollbacks
        return bool(steps) and not any(version.step <= min(steps) and usable(version, rollbacks) for version in left)

    def _whole(self, records: list[StepRecord]) -> None:
        step = records[0].step
        ends = [last for record in records for _, last in record.ranges]
        self._batch = max(ends) // step if ends and max(ends) % step == 0 else 0
        hashes: dict[str, set[str]] = {}
        for record in records:
            shard, _, found = record.state_hash.rpartition(":")
            if found:
                hashes.setdefault(shard, set()).add(found)
        every = self._host.job.health.check_every
        if not hashes and every and step % every == 0:
            self._good = None  # this group has no replicas
        if hashes and sum(bool(record.state_hash) for record in records) > len(hashes) and all(map(_one, hashes.values())):
            self._good, self._trusted = step, True

    def _diverged(self, finding: Finding, onset: int) -> None:
        if (group := self._host.group) is None or finding.step is None:
            return
        self._host.decide(Diverged(time.time(), group.attempt, onset, finding.evidence, finding.step, self._batch))
        self._strike()

    def _corrupted(self, finding: Finding) -> None:
        """Replicas that have never been seen to be the same may compute differently by nature: of those it is only told."""
        group, good = self._host.group, self._good
        if group is None or good is None or not self._trusted or finding.step is None:
            why = "nothing is done: they were not seen to be the same before"
            self._host.note("replicas.differ", step=finding.step, evidence=finding.evidence, remedy=why)
            return
        self._trusted = False
        named = finding.subjects if finding.stage == "confirmed" else ()
        suspects = [node for s in finding.subjects if (node := self._host.perform.node_of(s.worker)) is not None]
        workers = tuple(subject.worker for subject in named)
        self._host.decide(Corrupted(time.time(), group.attempt, good, workers, finding.evidence, finding.step))
        for node in dict.fromkeys(suspects):
            self._host.machines.suspect(node, FaultKind.CORRUPTION, finding.evidence, 1.0 if named else 0.5)
        self._strike()

    def _strike(self) -> None:
        """What was committed since it went wrong is taken out of the stores' logs."""
        for manifest in self._host.saves.stored:
            if not usable(manifest.version, self._host.state.rollbacks):
                self._host.perform.give_up(manifest.version)


def _one(found: set[str]) -> bool:
    return len(found) == 1
