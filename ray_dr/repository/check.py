"""Is everything there that the commit log names, and is it what it should be? Reads only.

A check has two steps. The *inventory* reads the log and all part lists, and compares a listing with what they name. What
is to be read besides (each chunk; or a trial restore in pieces, see `checkpoint.trial`) are *units*. They are looked at in
the order of the hashes of their names. So a stretch of that order is a fair sample, the stretches of one check after the
other cover everything, and a check that was stopped goes on where it was: all of that is one `Progress`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice

from blake3 import blake3

from ray_dr.errors import CheckpointError, CorruptChunk, NotFound, ObjectTooShort
from ray_dr.model.checkpoint import Chunk, Manifest, Part, PartRef, VersionId
from ray_dr.repository.chunks import get_chunk
from ray_dr.repository.commit import LogView
from ray_dr.repository.layout import chunk_key, chunks_prefix, log_key, parts_prefix
from ray_dr.repository.parts import read_part
from ray_dr.stores.base import Store

ROUND = 2**64
"""Places in the order of units: 0 .. ROUND - 1."""
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Damage:
    """An object that is not what it should be, and the versions that can't be restored without it."""

    key: str
    what: str
    versions: tuple[VersionId, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the checkpoints need. `parts`: the readable part lists of each; `chunks`: by key, with who needs it.

    objects, size   how many objects are named, and their bytes
    damaged         what reading the lists and listing the store has shown
    """

    parts: Mapping[VersionId, tuple[Part, ...]]
    chunks: Mapping[str, tuple[Chunk, tuple[VersionId, ...]]]
    objects: int
    size: int
    damaged: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """Something to be read. `look` gives what is wrong with it; raises StoreError when that can't be told now."""

    name: str
    size: int
    look: Callable[[], tuple[Damage, ...]]

    @property
    def place(self) -> int:
        """Where it comes in the order: anywhere, but always there."""
        return int.from_bytes(blake3(self.name.encode()).digest(8), "big")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a check has come.

    share      of all units that is looked at (0..1)
    start      place where its stretch begins
    reached    units less than so far behind `start` were looked at
    versions   what it is about: those that existed when it began
    again      names of units that were damaged, now or in the check before: each check looks at them first
    """

    format: int
    job: str
    store: str
    level: str
    share: float
    versions: tuple[VersionId, ...]
    start: int = 0
    reached: int = 0
    again: tuple[str, ...] = ()
    damaged: tuple[Damage, ...] = field(default=())
    finished: bool = False

    @property
    def width(self) -> int:
        """Length of the stretch."""
        return min(ROUND, max(1, round(self.share * ROUND)))


def begin(fresh: Progress, before: Progress | None) -> Progress:
    """How a check begins: `fresh`, or where the one before it was stopped, or at the stretch behind the one before."""
    if before is None or (before.format, before.job, before.store, before.level) != (
        fresh.format, fresh.job, fresh.store, fresh.level,
    ):  # fmt: skip
        return fresh
    if not before.finished and before.share == fresh.share and set(before.versions) & set(fresh.versions):
        left = tuple(version for version in before.versions if version in fresh.versions)
        return replace(before, versions=left, damaged=())  # `again` finds it once more, if it is still so
    behind = before.start + (before.width if before.finished else before.reached)
    return replace(fresh, start=behind % ROUND if fresh.share < 1 else 0, again=before.again)


def take_inventory(store: Store, job: str, view: LogView, versions: Iterable[VersionId] | None = None) -> Inventory:
    """The objects that checkpoints in the log need, all or those of `versions`, beside a listing of the store."""
    only = None if versions is None else set(versions)
    manifests = [each for each in view.checkpoints if only is None or each.version in only]
    listed = {e.key: e.size for prefix in (parts_prefix(job), chunks_prefix(job)) for e in store.list(prefix)}
    damaged = [Damage(log_key(job, number), "cannot be read", ()) for number in view.unread]
    parts: dict[VersionId, list[Part]] = {each.version: [] for each in manifests}
    needed: dict[str, tuple[Chunk, list[VersionId]]] = {}
    for manifest, ref, found in _read_parts(store, manifests):
        if isinstance(found, str):
            damaged.append(Damage(ref.key, found, (manifest.version,)))
            continue
        parts[manifest.version].append(found)
        for chunk in found.chunks:
            needed.setdefault(chunk_key(job, chunk), (chunk, []))[1].append(manifest.version)
    others = {key.rpartition("/")[0] + "/" for key in needed if not key.startswith(chunks_prefix(job))}
    listed |= {e.key: e.size for prefix in sorted(others) for e in store.list(prefix)}
    chunks = {key: (chunk, tuple(dict.fromkeys(users))) for key, (chunk, users) in sorted(needed.items())}
    for key, (chunk, users) in chunks.items():
        if listed.get(key) != chunk.size:
            what = f"has {listed[key]} bytes, not {chunk.size}" if key in listed else "is missing"
            damaged.append(Damage(key, what, users))
    refs = {ref.key: ref.size for manifest in manifests for ref in manifest.parts}
    return Inventory(
        {version: tuple(found) for version, found in parts.items()}, chunks, len(refs) + len(chunks),
        sum(refs.values()) + sum(chunk.size for chunk, _ in chunks.values()), tuple(damaged),
    )  # fmt: skip


def chunk_units(store: Store, job: str, inventory: Inventory) -> list[Unit]:
    """One unit for each chunk: read whole, and hashed."""

    def unit(key: str, chunk: Chunk, users: tuple[VersionId, ...]) -> Unit:
        return Unit(key, chunk.size, lambda: look_at_chunk(store, job, chunk, users))

    return [unit(key, *needed) for key, needed in inventory.chunks.items()]


def look_at_chunk(store: Store, job: str, chunk: Chunk, users: tuple[VersionId, ...]) -> tuple[Damage, ...]:
    """What is wrong with a chunk, read whole. Raises StoreError when the store can't be asked."""
    try:
        get_chunk(store, job, chunk)
    except NotFound:
        return (Damage(chunk_key(job, chunk), "is missing", users),)
    except (CorruptChunk, ObjectTooShort):
        return (Damage(chunk_key(job, chunk), "does not match its hash", users),)
    return ()


def stretch(units: Iterable[Unit], progress: Progress) -> list[Unit]:
    """The units that are still to be looked at, in their order; first those that were damaged before."""

    def distance(unit: Unit) -> int:
        return (unit.place - progress.start) % ROUND

    again = set(progress.again)
    there = list(units)
    due = [unit for unit in there if progress.reached <= distance(unit) < progress.width and unit.name not in again]
    return [unit for unit in there if unit.name in again] + sorted(due, key=distance)


def look(units: Sequence[Unit], progress: Progress, *, threads: int = _THREADS) -> Iterator[tuple[Unit, Progress]]:
    """Look at units of a stretch, and say after each how far the check has come. Raises StoreError."""
    left = iter(units)
    revisited = set(progress.again)
    with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
        while batch := list(islice(left, 2 * threads)):
            for unit, found in zip(batch, pool.map(lambda unit: unit.look(), batch), strict=True):
                again = [name for name in progress.again if name != unit.name] + [unit.name] * bool(found)
                reached = progress.reached
                if unit.name not in revisited:
                    reached = (unit.place - progress.start) % ROUND + 1
                damaged = merge((*progress.damaged, *found))
                progress = replace(progress, reached=reached, again=tuple(again), damaged=damaged)
                yield unit, progress


def merge(damaged: Iterable[Damage]) -> tuple[Damage, ...]:
    """One damage per object, with all versions that need it, in order of key."""
    found: dict[str, Damage] = {}
    for each in damaged:
        versions = (*found[each.key].versions, *each.versions) if each.key in found else each.versions
        found[each.key] = replace(each, versions=tuple(sorted(set(versions))))
    return tuple(found[key] for key in sorted(found))


def still_there(damaged: Iterable[Damage], view: LogView) -> tuple[Damage, ...]:
    """What matters of it in the log as it is now: a version may have been dropped while it was looked at."""
    exist = {manifest.version for manifest in view.checkpoints}
    found = [(each, tuple(version for version in each.versions if version in exist)) for each in damaged]
    return tuple(replace(each, versions=left) for each, left in found if left or not each.versions)


def _read_parts(store: Store, manifests: Sequence[Manifest]) -> Iterator[tuple[Manifest, PartRef, Part | str]]:
    """Each part list, or what is wrong with it."""

    def read(named: tuple[Manifest, PartRef]) -> tuple[Manifest, PartRef, Part | str]:
        manifest, ref = named
        try:
            part = read_part(store, ref)
        except NotFound:
            return manifest, ref, "is missing"
        except CorruptChunk:
            return manifest, ref, "does not match its hash"
        except CheckpointError as error:
            return manifest, ref, str(error)
        if (part.version, part.rank) != (manifest.version, ref.rank):
            return manifest, ref, f"is of rank {part.rank} of {part.version}"
        return manifest, ref, part

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="check") as pool:
        yield from pool.map(read, [(manifest, ref) for manifest in manifests for ref in manifest.parts])
