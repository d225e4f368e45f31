"""What a node keeps on its own disk: parts of its ranks, in the layout of a store, without a commit log.

It survives the agent, the node's processes and a restart of the machine: a new agent lists what is there. Which versions
are whole is told by all nodes together, so nothing here is a checkpoint by itself, and only versions of the *life* at hand
count. A life is the job's history in its store: a job of the same name whose store was emptied is another life (its attempts
are numbered from one again), and finds nothing here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from ray_dr.errors import CheckpointError, NotFound, StoreError
from ray_dr.model.checkpoint import Held, Part, StepRecord, VersionId
from ray_dr.repository.layout import chunks_prefix, part_of, parts_prefix, version_of
from ray_dr.repository.parts import read_listed
from ray_dr.stores.base import Store


class LocalDisk:
    """Thread-safe. The store is opened when it is first needed; whatever needs it raises StoreError when it can't be used.

    job   the life's name (see `life_name`)
    """

    def __init__(self, open_it: Callable[[], Store], job: str, node: str) -> None:
        self._open_it, self.job, self._node = open_it, job, node
        self._store: Store | None = None
        self._known: dict[str, Part | None] = {}
        self._lock = threading.Lock()

    @property
    def store(self) -> Store:
        """The directory."""
        if self._store is None:
            self._store = self._open_it()
        return self._store

    def held(self) -> tuple[Held, ...]:
        """Every part whose list is there: it was put after all of its chunks."""
        return tuple(
            Held(self._node, part.version, part.rank, part.world, part.size, own=True, disk=True) for part in self._parts()
        )

    def part(self, version: VersionId, rank: int) -> Part:
        """A part's list. Raises NotFound."""
        for part in self._parts():
            if (part.version, part.rank) == (version, rank):
                return part
        raise NotFound(f"node {self._node} does not hold rank {rank} of step {version.step} on its disk")

    def records(self, version: VersionId) -> tuple[StepRecord, ...]:
        """Step records that came with the parts of a version."""
        return tuple(record for part in self._parts() if part.version == version for record in part.records)

    def keep(self, versions: Iterable[VersionId]) -> int:
        """Remove what is older than the newest of `versions`, but for these: how many objects."""
        kept = set(versions)
        removed = 0
        # Lists first: then none names what is gone.
        for prefix in (parts_prefix(self.job), chunks_prefix(self.job)) if kept else ():
            for key in [entry.key for entry in self.store.list(prefix)]:
                version = version_of(key)
                if version is not None and version < max(kept) and version not in kept:
                    self.store.delete(key)
                    with self._lock:
                        self._known.pop(key, None)
                    removed += 1
        return removed

    def _parts(self) -> list[Part]:
        """The readable part lists; each is read once."""
        keys = [entry.key for entry in self.store.list(parts_prefix(self.job)) if part_of(entry.key)]
        with self._lock:
            for key in keys:
                if key not in self._known:
                    self._known[key] = self._read(key)
            return [part for key in keys if (part := self._known[key]) is not None]

    def _read(self, key: str) -> Part | None:
        try:
            return read_listed(self.store, key)
        except (StoreError, CheckpointError):
            return None  # damaged, or removed meanwhile: another place has it, or the version is not whole


def life_name(job: str, life: str) -> str:
    """The name under which a job's parts lie on disks during one life of it."""
    return f"{job}.{life}"
