"""What is saved where: parts become whole versions, and whole versions are committed to the stores.

Belongs to the host's one thread; a commit runs in a thread of its own, and its outcome comes back through the mailbox.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_dr.checkpoint.depot import Depot
from ray_dr.errors import Fenced, StoreError
from ray_dr.model import codec
from ray_dr.model.checkpoint import Manifest, PartRef, VersionId
from ray_dr.model.events import FencedOff, Saved
from ray_dr.model.job import StoreTier
from ray_dr.model.journal import PartSaved, VersionSaved, Where
from ray_dr.recovery.groups import group_of
from ray_dr.recovery.quarantine import usable
from ray_dr.telemetry.tiers import Completeness

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

SIZES_KEPT = SKIPPED_KEPT = 16
SECOND_OPEN_S, SECOND_RETRY_S = 10.0, 30.0


@dataclass(frozen=True, slots=True)
class Committed:
    """The committing thread is through with a version. `refused`: it could not be committed."""

    where: Where
    manifest: Manifest
    refused: bool = False


class Saves:
    """`depots`: the stores that answer; `complete`: which parts of which versions are where."""

    def __init__(self, host: Host, first: Depot, owner: str) -> None:
        self._host, self._owner = host, owner
        self.depots: dict[Where, Depot] = {Where.STORE: first}
        self.complete = Completeness()
        self.global_batch = 0
        self._sizes: dict[VersionId, int] = {}
        self._skipped: set[VersionId] = set()

    @property
    def stored(self) -> tuple[Manifest, ...]:
        """Every checkpoint in every store, oldest first, as far as this supervisor knows."""
        found = [manifest for depot in tuple(self.depots.values()) for manifest in depot.stored]
        return tuple(sorted(found, key=lambda manifest: manifest.version))

    def tiers(self) -> dict[str, Any]:
        """Which versions are whole where (JSON)."""
        return {**codec.to_json(self.complete), "armed": codec.to_json(self.complete.armed())}

    def open_second(self, tier: StoreTier) -> None:
        """Take the job in the second store too, which may be all that is left of it; one that is away is tried again."""
        ready = threading.Event()

        def attempt() -> None:
            while not self._host.wait(0.0):
                try:
                    depot = Depot(tier, self._host.job.name, self._owner)
                    self.doubt(depot)
                    self._take_in(depot)
                    return
                except Exception as error:
                    self._host.note("second.unavailable", error=str(error), store=tier.url)
                finally:
                    ready.set()
                self._host.wait(SECOND_RETRY_S)

        threading.Thread(target=attempt, name="second", daemon=True).start()
        ready.wait(SECOND_OPEN_S)

    def _take_in(self, depot: Depot) -> None:
        """The second store answers. Once attempts have begun here, one that has newer ones belongs to another history: what
        is saved here could never be committed there, and what it has must not replace this history unasked."""
        newest, attempt = depot.stored[-1].version if depot.stored else None, self._host.state.attempt
        if newest is not None and attempt and newest > VersionId(attempt, self._host.progress.newest):
            self._host.note("second.ahead", store=depot.store.url, step=newest.step, attempt=newest.attempt,
                            remedy="stop the job and run it again: then it goes on from what the second store has")  # fmt: skip
            return
        self.depots = {**self.depots, Where.SECOND: depot}
        self._host.perform.tell_terms()

    def doubt(self, depot: Depot) -> None:
        """Say aloud what a store does not guarantee."""
        if depot.doubtful:
            self._host.note("log.damaged", entries=list(depot.doubtful), store=depot.store.url)
        if depot.alone:
            self._host.note("store.shares_nothing", why=depot.alone, store=depot.store.url)

    def part_saved(self, record: PartSaved, ref: PartRef | None) -> None:
        """A part lies somewhere; with it, its version may be whole there."""
        if record.rank == 0:
            self._host.pace.saved(record)
        if record.where is Where.MEMORY:
            self._sizes[record.version] = self._sizes.pop(record.version, 0) + record.size
            while len(self._sizes) > SIZES_KEPT:
                del self._sizes[next(iter(self._sizes))]
            if record.version in self._skipped:
                self._host.perform.tell_abandoned(record.version, (record.node,))
        depot = self.depots.get(record.where)
        if ref is not None and depot is not None:
            depot.arrived(record.version, ref)
        elif record.where in (Where.STORE, Where.SECOND):
            return  # nobody could commit it
        with contextlib.suppress(ValueError):
            self.complete, new = replace(self.complete, peers=self._host.perform.forming.peers).add(
                record.version, record.rank, record.world, record.where, record.node
            )
            for version, where in new:
                self._version_complete(version, Where(where), record.world)

    def skip(self, version: VersionId) -> None:
        """A rank had no slot for its part: the others give theirs up, those that are there and those still to come."""
        self._skipped = {*self._skipped, version}
        if len(self._skipped) > SKIPPED_KEPT:
            self._skipped.remove(min(self._skipped))
        self._host.perform.tell_abandoned(version, self.complete.nodes(version, Where.MEMORY))

    def _version_complete(self, version: VersionId, where: Where, world: int) -> None:
        depot = self.depots.get(where)
        if depot is not None and not usable(version, self._host.state.rollbacks):
            return
        if depot is not None:
            manifest = depot.manifest(version, world, version.step * self.global_batch)
            if manifest is None:
                self.complete = self.complete.forget(version, where)
                return
            threading.Thread(target=self._commit, args=(where, depot, manifest), name="commit", daemon=True).start()
            return
        self._host.journal.append(VersionSaved(time.time(), version, where, self._sizes.get(version, 0)))
        if where is Where.DISK and self._host.job.disk is not None:
            self._host.perform.tell_kept_on_disk(self.complete.complete(where)[: self._host.job.disk.keep_last])
        elif where is Where.PEER or not self._host.perform.forming.peers:
            group = group_of(self._host.state)
            if self._host.vigil.doubts(version):
                self._host.perform.tell_abandoned(version, self.complete.nodes(version, Where.MEMORY))
            elif group is not None and (group.attempt == version.attempt or group.restore == version):
                # Else nobody may let go of what was found.
                self._host.perform.tell_completed(version)

    # -- commits

    def _commit(self, where: Where, depot: Depot, manifest: Manifest) -> None:
        try:
            manifest = depot.log.commit(manifest)
        except Fenced as error:
            self._host.post(FencedOff(time.time(), error.newest))
        except StoreError as error:
            self._host.note(f"{where}.unavailable", error=str(error), step=manifest.version.step, store=depot.store.url)
            self._host.committed(Committed(where, manifest, refused=True))
        else:
            self._host.committed(Committed(where, manifest))
            depot.log.mark()
            if not self._host.vigil.holds(depot.after(manifest)):
                self._host.perform.prune(where)

    def committed(self, done: Committed) -> None:
        """A committing thread is through."""
        where, manifest, version = done.where, done.manifest, done.manifest.version
        if done.refused:  # a final save is put again, and then tried again
            self.complete = self.complete.forget(version, where)
            return
        depot = self.depots[where]
        depot.committed(manifest, held=self._host.vigil.holds(depot.after(manifest)))
        if not usable(version, self._host.state.rollbacks):  # it was on its way when that was found out
            self._host.perform.give_up(version)
        self._host.journal.append(VersionSaved(time.time(), version, where, self._sizes.get(version, 0)))
        if self._host.perform.final == version and all(depot.refs(version) for depot in self.depots.values()):
            self._host.decide(Saved(time.time(), version.attempt, version.step))
