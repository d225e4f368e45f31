"""Checkpoints of a job that no supervisor runs: its writer takes the term, numbers the versions and commits them.

A step above the newest one goes on in the same attempt. Any other begins a new attempt: going back is recorded, and
versions only ascend, which is what `repository.commit` and `repository.prune` rely on. The first save of a process
takes a term and so fences whoever saved to the job before.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from ray_dr.checkpoint.sealing import Sealer
from ray_dr.errors import CheckpointError, ConfigError, Fenced, NoCheckpoint
from ray_dr.model.checkpoint import Manifest, Part, PartRef, VersionId
from ray_dr.repository.chunks import KnownChunks
from ray_dr.repository.commit import FORMAT, CommitLog
from ray_dr.repository.layout import parts_prefix, save_folder
from ray_dr.repository.saving import SavedPart, save_part
from ray_dr.repository.sharing import take_base
from ray_dr.stores.base import Store
from ray_dr.stores.open import refuse_locked
from ray_dr.telemetry.journal import prefix_of

DEFAULT_JOB = "main"
HASH_THREADS = 2


@dataclass(frozen=True, slots=True)
class Opening:
    """A save that has begun: the version it will be, and its writer's term."""

    version: VersionId
    term: int


class DirectJob:
    """One job in one store, as a program without a supervisor writes it. Not thread-safe.

    Of several ranks one calls `begin` and `commit`, each calls `put`.
    share_with   a job of the same store that this one begins at, see `repository.sharing`
    """

    def __init__(self, store: Store, job: str, *, share_with: str = "") -> None:
        self.store, self.job, self._share_with = store, job, share_with
        self._log = CommitLog(store, job)
        self._known = KnownChunks()
        self._sealer = Sealer()
        self._term = 0

    def begin(self, step: int | None) -> Opening:
        """Number a save of `step` (None: one after the newest, from 0). Raises Fenced when another process took the
        job since this one's first save, ConfigError when a supervisor has it, NoCheckpoint when there is nothing to share."""
        if self._term == 0:
            self._refuse_supervised()
            self._term = self._log.take_term(f"{socket.gethostname()}:{os.getpid()}", time.time())
            if self._share_with:
                take_base(self.store, self._log, self.job, self._share_with)
        newest = self._log.newest()
        if (term := self._log.term()) > self._term:
            raise Fenced(self.job, mine=self._term, newest=term)
        return Opening(next_version(newest.version if newest else None, step), self._term)

    def put(self, opening: Opening, part: Part, stream: memoryview) -> SavedPart:
        """Hash a part (its version and chunks are filled in here) and store what the newest checkpoint lacks."""
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            chunks = tuple(chunk for chunk, _ in self._sealer.seal(part, stream, pool))
        sealed = replace(part, version=opening.version, chunks=chunks)
        return save_part(self.store, self._log, self.job, sealed, stream, term=opening.term, known=self._known)

    def commit(self, opening: Opening, refs: Sequence[PartRef], *, position: int = 0) -> Manifest:
        """Make the version exist. Raises CheckpointError when a part is not in the store as this process sees it."""
        prefix = f"{parts_prefix(self.job)}{save_folder(opening.version, opening.term)}/"
        there = {entry.key: entry.size for entry in self.store.list(prefix)}
        if absent := [ref.rank for ref in refs if there.get(ref.key) != ref.size]:
            raise CheckpointError(
                f"{self.store.url} does not hold what ranks {absent} put there, as seen by {socket.gethostname()} "
                "(use a store that all ranks share: s3://, or a directory that every node mounts)"
            )
        parts = tuple(sorted(refs, key=lambda ref: ref.rank))
        manifest = Manifest(FORMAT, self.job, opening.term, opening.version, len(parts), position, parts, time.time())
        committed = self._log.commit(manifest)
        self._log.mark()
        return committed

    def _refuse_supervised(self) -> None:
        if next(iter(self.store.list(prefix_of(self.job))), None) is not None:
            raise ConfigError(f"{self.store.url} has a job {self.job!r} that `ray_dr.run` runs", key="job",
                              remedy="saving to it would fence its supervisor; choose another name")  # fmt: skip


def next_version(newest: VersionId | None, step: int | None) -> VersionId:
    """The version that a save of `step` becomes: higher than the newest one."""
    if newest is None:
        return VersionId(1, step or 0)
    if step is None:
        return VersionId(newest.attempt, newest.step + 1)
    return VersionId(newest.attempt + (step <= newest.step), step)


def find_version(store: Store, job: str, step: int | None = None) -> Manifest:
    """The newest committed checkpoint, or the newest of those at `step`. Raises NoCheckpoint, naming the others;
    CheckpointError when which is the newest can't be told, as the log is damaged; WrongKey when the store's key is missing."""
    view = CommitLog(store, job).refresh()
    found = view.checkpoints
    if view.doubtful:
        refuse_locked(store)  # without its key a store looks damaged
    if view.doubtful and step is None:
        newest = f"step {found[-1].version.step}" if found else "none"
        raise CheckpointError(
            f"entry {view.doubtful[-1]} of the commit log of job {job} is damaged or missing, so a newer "
            f"checkpoint may be lost; the newest that is known: {newest} (to take an older one, name its step)"
        )
    if not found:
        raise NoCheckpoint(f"job {job} has no committed checkpoint in {store.url}")
    wanted = [manifest for manifest in found if step in (None, manifest.version.step)]
    if not wanted:
        steps = ", ".join(str(manifest.version.step) for manifest in found)
        raise NoCheckpoint(f"job {job} has no checkpoint of step {step}; there are: {steps}")
    return wanted[-1]
