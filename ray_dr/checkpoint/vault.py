"""What one node's agent holds in memory: the parts its own workers staged and the copies it keeps for peers.

A *holding* is one rank's part of one version in shared memory. Own holdings lie in slots of a pool that the worker process
has mapped; each copy lies in a pool of its own, which the node's workers map when they restore. The rules that keep the
last good version whole:

* a slot is given back to its worker only when nobody reads it and its version is older than the newest *complete* one
  (every part has its copies, says the supervisor);
* a version that became complete after this node had given up its part of it makes nothing older go;
* a new attempt keeps the version it restores from until a newer one is complete.

A worker has two slots: the newest complete version, and the one on its way; and one more for each durable place beyond the
first, as each may be reading another version. When a save is due and none is free, it goes
without, and asks (`want`): then a version goes that has been waiting to become complete for GIVE_UP_S (its copy failed, say),
or, while a slow store still reads the other slot, the newest complete version itself where peers hold copies of it. What one
rank goes without can't become complete: the supervisor says so to the others at once (`abandoned`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ray_dr.checkpoint.memory import Pool, available_bytes
from ray_dr.errors import ConfigError, NotFound, StoreError
from ray_dr.model.checkpoint import Held, Part, VersionId

PAGE_BYTES = 4096
SLOTS = 2
"""Own slots per worker, with one durable place."""
KEPT_COPIES = 2
"""Versions kept per rank as copies for peers: the newest complete one, and the one on its way."""
GIVE_UP_S = 2.0
"""A version becomes complete some ten milliseconds after its slowest copy, or never."""
HOPELESS_MAX = 64


@dataclass(slots=True, eq=False)
class Slot:
    """A reusable run of a worker's pool."""

    worker: str
    index: int
    pool: Pool
    view: memoryview


@dataclass(slots=True, eq=False)
class Holding:
    """One rank's part of one version. `part` is None until it is sealed; `readers` counts who needs the bytes; `rested_at`
    is when the last of them went (monotonic seconds)."""

    version: VersionId
    rank: int
    world: int
    view: memoryview
    slot: Slot | None
    pool: Pool
    part: Part | None = None
    readers: int = 0
    rested_at: float = 0.0
    lent: bool = False
    """Staged here, and not in a slot."""

    @property
    def key(self) -> tuple[VersionId, int, bool]:
        return (self.version, self.rank, self.slot is not None)


@dataclass(slots=True)
class _Workspace:
    """The slots of one worker; older pools stay while a holding lies in them."""

    slots: list[Slot] = field(default_factory=list)
    size: int = 0


def _create(size: int, per_slot: int, slots: int) -> Pool:
    free = available_bytes()
    try:
        if size > free:
            raise OSError(f"only {free / 2**30:.2f} GiB are free")
        return Pool.create(size)
    except OSError as error:
        raise ConfigError(
            f"the node has no room for {slots} copies of a rank's share of the state, {per_slot / 2**30:.2f} GiB each ({error})",
            key="checkpoint", remedy="more nodes (smaller shares), fewer workers per node, or nodes with more memory",
        ) from error  # fmt: skip


class Vault:
    """Thread-safe. `give_back(worker, slot index, pool path)` is called, outside the lock, when a worker may stage into
    a slot again."""

    def __init__(
        self, node: str, give_back: Callable[[str, int, str], None], clock: Callable[[], float] = time.monotonic,
        *, slots: int = SLOTS,
    ) -> None:  # fmt: skip
        self.node = node
        self._give_back, self._clock, self._slots = give_back, clock, slots
        self._lock = threading.Condition()
        self._workspaces: dict[str, _Workspace] = {}
        self._holdings: dict[tuple[VersionId, int, bool], Holding] = {}
        self._complete: VersionId | None = None
        self._began: VersionId | None = None
        self._lent: dict[str, dict[str, Pool]] = {}
        self._copied = False
        self._hopeless: set[VersionId] = set()
        self._reading: set[Holding] = set()
        self._free: list[Pool] = []
        self._pools: list[Pool] = []

    def open_pool(self, worker: str, size: int) -> tuple[str, int, int, tuple[int, ...]]:
        """Slots of at least `size` bytes for a worker: (path to map, bytes per slot, how many, which are free).

        Slow when a new pool is needed, because it is touched once (pre-faulted) here and never again. Raises ConfigError
        when the node has not got that much memory.
        """
        with self._lock:
            workspace = self._workspaces.get(worker)
            if workspace is not None and workspace.size >= size:
                free = tuple(slot.index for slot in workspace.slots if not self._occupied(slot))
                return workspace.slots[0].pool.path, workspace.size, self._slots, free
        per_slot = -(-max(size, 1) // PAGE_BYTES) * PAGE_BYTES
        pool = _create(per_slot * self._slots, per_slot, self._slots)
        views = [pool.view[i * per_slot : (i + 1) * per_slot] for i in range(self._slots)]
        with self._lock:
            self._workspaces[worker] = _Workspace([Slot(worker, i, pool, views[i]) for i in range(self._slots)], per_slot)
            self._pools.append(pool)
        self._sweep()
        return pool.path, per_slot, self._slots, tuple(range(self._slots))

    def lend(self, worker: str, size: int) -> str:
        """The path of memory beside the slots, for one part that `worker` stages for a rank that is gone, or for its own while
        no slot is free. Raises ConfigError when the node has not got that much."""
        try:
            if size > (free := available_bytes()):
                raise StoreError(f"only {free / 2**30:.2f} GiB are free")
            pool = self.buffer(size)
        except StoreError as error:
            raise ConfigError(f"no memory for {size / 2**30:.2f} GiB of a broken attempt's state ({error})", key="checkpoint",
                              remedy="nodes with more memory, or more of them") from error  # fmt: skip
        with self._lock:
            self._lent.setdefault(worker, {})[pool.path] = pool
        return pool.path

    def stage(
        self, worker: str, slot: int | None, *, version: VersionId, rank: int, world: int, size: int, path: str = ""
    ) -> Holding:
        """Take over what a worker just copied into its slot, of the pool at `path`, or, without a slot, into what it was lent
        there. The caller reads it: `done` must follow. Raises NotFound when the worker has another pool by now, or none
        because this closes."""
        with self._lock:
            if slot is None:
                pool = self._lent.get(worker, {}).pop(path, None)
                if pool is None:
                    raise NotFound(f"worker {worker} was not lent {path}, or has given it back")
                return self._take_over(Holding(version, rank, world, pool.view[:size], None, pool, readers=1, lent=True))
            workspace = self._workspaces.get(worker)
            if workspace is None or path not in ("", workspace.slots[slot].pool.path):
                raise NotFound(f"worker {worker} has another pool than {path} by now, or none")
            place = workspace.slots[slot]
            return self._take_over(Holding(version, rank, world, place.view[:size], place, place.pool, readers=1))

    def _take_over(self, holding: Holding) -> Holding:
        self._reading.add(holding)
        self._holdings[holding.key] = holding
        return holding

    def buffer(self, size: int) -> Pool:
        """Memory for a peer's copy, reused when one of the right size is free. Raises StoreError when there is none."""
        with self._lock:
            for index, pool in enumerate(self._free):
                if pool.size == max(size, 1):
                    return self._free.pop(index)
        try:
            return Pool.create(max(size, 1))
        except OSError as error:
            raise StoreError(f"node {self.node} has no room for a copy of {size} bytes ({error})") from error

    def keep_copy(self, part: Part, pool: Pool) -> None:
        """Hold a peer's sealed part."""
        holding = Holding(part.version, part.rank, part.world, pool.view[: part.size], None, pool, part)
        with self._lock:
            if (replaced := self._holdings.get(holding.key)) is not None:
                self._drop(replaced)
            self._holdings[holding.key] = holding
        self._sweep()

    def recycle(self, pool: Pool) -> None:
        """A copy's buffer that came to nothing."""
        with self._lock:
            self._recycle(pool)

    def read(self, version: VersionId, rank: int) -> Holding:
        """A sealed part to read from; `done` must follow. Raises NotFound."""
        with self._lock:
            for own in (True, False):
                holding = self._holdings.get((version, rank, own))
                if holding is not None and holding.part is not None:
                    holding.readers += 1
                    self._reading.add(holding)
                    return holding
        raise NotFound(f"node {self.node} does not hold rank {rank} of step {version.step}")

    def pin(self, holding: Holding) -> None:
        """One more reader; `done` must follow."""
        with self._lock:
            holding.readers += 1

    def done(self, holding: Holding) -> None:
        """The reader has finished."""
        with self._lock:
            holding.readers -= 1
            if not holding.readers:
                self._reading.discard(holding)
                holding.rested_at = self._clock()
            dropped = not holding.readers and self._holdings.get(holding.key) is not holding
            if dropped and holding.slot is None:
                self._recycle(holding.pool)
            returned = self._returned((holding,)) if dropped else []
        self._hand_back(returned)
        self._sweep()

    def want(self, worker: str, *, waiting: bool = False) -> None:
        """A save was due and the worker had no slot: give one back if one can be spared. `waiting`: it can't go without (the
        version to come takes the place of the newest complete one, should only that be there to spare)."""
        with self._lock:
            mine = [h for h in self._holdings.values() if h.slot and self._current(h.slot) and h.slot.worker == worker]
            spare = min((h for h in mine if self._spare(h, mine, waiting)), key=lambda holding: holding.version, default=None)
            if spare is not None:
                self._drop(spare)
            returned = self._returned((spare,)) if spare else []
        self._hand_back(returned)

    def _spare(self, holding: Holding, mine: list[Holding], waiting: bool) -> bool:
        if holding.readers or holding.part is None:
            return False
        if holding.version == self._complete:
            return (self._copied or waiting) and any(other.readers and other.version < holding.version for other in mine)
        return self._clock() - holding.rested_at >= GIVE_UP_S

    def abandoned(self, version: VersionId) -> None:
        """`version` will never be complete, says the supervisor: its slots can be used."""
        with self._lock:
            if self._complete is None or version > self._complete:
                self._hopeless.add(version)
                while len(self._hopeless) > HOPELESS_MAX:
                    self._hopeless.discard(min(self._hopeless))
        self._sweep()

    def completed(self, version: VersionId, *, copied: bool = False) -> None:
        """Every part of `version` has its copies, says the supervisor: what is older may go, if this node has it.

        copied   copies on other nodes
        """
        with self._lock:
            held = any(holding.version == version and holding.part for holding in self._holdings.values())
            if held and (self._complete is None or version > self._complete):
                self._complete, self._copied = version, copied
        self._sweep()

    def begin(self, keep: VersionId | None, behind: VersionId | None = None) -> None:
        """A new attempt starts from `keep`: no other version is of the job's history any more. Where `keep` does not have all
        its copies yet, the one `behind` it stays until it, or a later one, is complete."""
        with self._lock:
            self._complete, self._copied, self._began = behind or keep, False, keep
            doomed = [holding for holding in self._holdings.values() if holding.version not in (keep, behind)]
            for holding in doomed:
                self._drop(holding)
            returned = self._returned(doomed)
        self._hand_back(returned)
        self._sweep()

    def abandon(self, holding: Holding) -> None:
        """Sealing failed: this is no part of any version."""
        with self._lock:
            self._drop(holding)

    def forget_worker(self, worker: str) -> None:
        """The worker's process is gone. What it staged stays as long as its version counts."""
        with self._lock:
            self._workspaces.pop(worker, None)
            for pool in self._lent.pop(worker, {}).values():
                self._recycle(pool)
        self._sweep()

    def held(self) -> tuple[Held, ...]:
        """Every sealed part in memory."""
        with self._lock:
            return tuple(
                Held(self.node, h.version, h.rank, h.world, len(h.view), h.slot is not None or h.lent)
                for h in self._holdings.values()
                if h.part is not None
            )

    def close(self) -> None:
        """Give all memory back to the system."""
        with self._lock:
            self._holdings.clear()
            self._workspaces.clear()
            self._free.clear()
            pools, self._pools = self._pools, []
        for pool in pools:
            pool.close()

    def _sweep(self) -> None:
        """Free what no rule protects: slots go back to their workers, buffers to the free list, empty pools away."""
        with self._lock:
            freed = [h for h in self._holdings.values() if not h.readers and self._outdated(h)]
            for holding in freed:
                self._drop(holding)
            returned = self._returned(freed)
            self._drop_pools()
        self._hand_back(returned)

    def _returned(self, freed: Iterable[Holding]) -> list[Slot]:
        """The slots of dropped holdings that their workers may stage into again."""
        slots = (holding.slot for holding in freed)
        return [slot for slot in slots if slot and self._current(slot) and not self._occupied(slot)]

    def _hand_back(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self._give_back(slot.worker, slot.index, slot.pool.path)

    def _outdated(self, holding: Holding) -> bool:
        newest = self._complete
        if newest is not None and holding.version <= newest:
            return holding.version != newest
        if holding.version == self._began:
            return False
        if holding.slot is not None:
            return holding.part is not None and holding.version in self._hopeless
        # A copy that is not complete: give up on it when enough newer ones of the same rank have come and are whole.
        newer = sum(
            other.rank == holding.rank and other.slot is None and not other.lent  # a rescue may come to nothing
            and other.part is not None and other.version > holding.version
            for other in self._holdings.values()
        )
        return newer >= KEPT_COPIES - 1

    def _drop(self, holding: Holding) -> None:
        if self._holdings.get(holding.key) is holding:
            del self._holdings[holding.key]
        if holding.slot is None and not holding.readers:
            self._recycle(holding.pool)

    def _recycle(self, pool: Pool) -> None:
        self._free.append(pool)
        del self._free[:-KEPT_COPIES]

    def _current(self, slot: Slot) -> bool:
        workspace = self._workspaces.get(slot.worker)
        return workspace is not None and slot in workspace.slots

    def _occupied(self, slot: Slot) -> bool:
        return any(h.slot is slot for h in (*self._holdings.values(), *self._reading))

    def _drop_pools(self) -> None:
        needed = {id(slot.pool) for workspace in self._workspaces.values() for slot in workspace.slots}
        needed |= {id(h.slot.pool) for h in (*self._holdings.values(), *self._reading) if h.slot}
        # Closing a pool while views of it live is an error of mmap: the kernel frees the pages when the last view dies.
        self._pools = [pool for pool in self._pools if id(pool) in needed]
