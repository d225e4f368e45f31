"""Reads a state's bytes from the nearest good copy, each chunk checked against its hash.

A chunk that lies in one run of one tensor is read straight into it, and so is one that lies in a few tensors, one behind
the other, where its source can fill several places at once. Any other goes through a buffer that each thread reuses,
and from there, once it is known to be good, to its places. What this node's agent has found good in shared
memory, since the restore was decided (`checkpoint.verified`) or while it fetched it for several ranks
(`checkpoint.shared_fetch`), is copied from there to its places and not hashed again.
"""

from __future__ import annotations

import bisect
import functools
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from blake3 import blake3

from ray_dr.checkpoint.memory import copy_into
from ray_dr.checkpoint.restore_plan import Read, plan_restore, reads_by_chunk
from ray_dr.errors import CheckpointError, CopiesAway, CorruptChunk, NotFound, ObjectTooShort, StoreError
from ray_dr.model.checkpoint import Box, Chunk, Part
from ray_dr.repository.layout import chunk_key
from ray_dr.stores.base import Store

Kind = Literal["memory", "peer", "disk", "store", "second"]

THREADS: Mapping[Kind, int] = {"memory": 2, "peer": 4, "disk": 4, "store": 8, "second": 8}
"""Reading threads per kind of source."""
GAP_BYTES = 4096
"""Bytes between two places that are read for nothing, rather than all of the chunk being copied once more."""


class Source(Protocol):
    """One place that holds the streams of parts. Thread-safe."""

    @property
    def name(self) -> str:
        """For people: which copy this is."""

    @property
    def kind(self) -> Kind: ...

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Fill `into` from `start` of rank's stream. Raises StoreError, OSError or CorruptChunk."""


@runtime_checkable
class Scattering(Source, Protocol):
    """A source that fills several places with one run of bytes."""

    def read_each(self, rank: int, start: int, into: Sequence[memoryview]) -> None:
        """Fill all of `into`, one after the other, from `start` of rank's stream. Raises as `read` does."""


@runtime_checkable
class Lending(Source, Protocol):
    """A source that has some chunks read and verified by this node's agent, for all who want them."""

    @property
    def inner(self) -> Source:
        """Gives every other chunk."""

    def lend(self, rank: int, chunk: Chunk) -> AbstractContextManager[memoryview | None]:
        """The chunk's bytes, hashed and found good where they lie, unchanged while the context lasts. None: this chunk is to
        be read, and hashed, as of any source. Raises as `read` does."""


@dataclass(frozen=True, slots=True)
class MemorySource:
    """A part's stream in memory of this process.

    good    place -> id of the chunks that were hashed there and found good (see `checkpoint.verified`)
    """

    buffer: memoryview
    name: str = "own memory"
    kind: Kind = "memory"
    good: Mapping[int, str] = field(default_factory=dict)

    def verified(self, chunk: Chunk) -> memoryview | None:
        """The chunk's bytes, if they were found good."""
        end = chunk.at + chunk.size
        return self.buffer[chunk.at : end] if self.good.get(chunk.at) == chunk.id and end <= self.buffer.nbytes else None

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Copy the bytes. Raises OSError when the stream is shorter."""
        if start + into.nbytes > self.buffer.nbytes:
            raise OSError(f"{self.name} holds {self.buffer.nbytes} bytes, wanted {into.nbytes} from {start}")
        copy_into(into, self.buffer[start : start + into.nbytes])

    def read_each(self, rank: int, start: int, into: Sequence[memoryview]) -> None:
        """As `read`, into several places."""
        for view in into:
            self.read(rank, start, view)
            start += view.nbytes


@dataclass(frozen=True)
class StoreSource:
    """A part's stream as chunks of a job in a store. `part` was read there: it says which saves put its chunks."""

    store: Store
    job: str
    part: Part
    kind: Kind = "store"

    @property
    def name(self) -> str:
        """The store's URL."""
        return self.store.url

    @functools.cached_property
    def _placed(self) -> tuple[list[Chunk], list[int]]:
        """Chunks in order of place, and their places: a part has too many to look through for each read."""
        chunks = sorted(self.part.chunks, key=lambda chunk: chunk.at)
        return chunks, [chunk.at for chunk in chunks]

    def chunk_at(self, at: int) -> Chunk | None:
        """The chunk that begins at this place of the stream, with the save that put it."""
        chunks, starts = self._placed
        number = bisect.bisect_left(starts, at)
        return chunks[number] if number < len(starts) and starts[number] == at else None

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Fill `into` from the chunks that hold the run."""
        chunks, starts = self._placed
        number = max(bisect.bisect_right(starts, start) - 1, 0)
        for chunk in chunks[number : bisect.bisect_left(starts, start + into.nbytes)]:
            first, last = max(start, chunk.at), min(start + into.nbytes, chunk.at + chunk.size)
            if first < last:
                piece = into[first - start : last - start]
                self.store.readinto(chunk_key(self.job, chunk), piece, start=first - chunk.at)


def read_state(
    parts: Sequence[Part],
    wanted: Mapping[Box, memoryview],
    sources: Mapping[int, Sequence[Source]],
    *,
    threads: int | None = None,
    on_corrupt: Callable[[CorruptChunk], None],
    on_unreadable: Callable[[Source, Exception], None] | None = None,
    on_bad: Callable[[Source, int, Chunk], None] | None = None,
) -> dict[str, int]:
    """Fill the wanted boxes' bytes, and say how many bytes were read from each kind of source.

    wanted         dense row-major bytes of each box, contiguous and writable
    sources        per rank of part, nearest first; a chunk is taken from the first that gives it unharmed
    threads        None: as many as the kinds of the nearest sources are worth
    on_corrupt     told of each bad copy; on_unreadable of each copy that could not be read; from a reading thread
    on_bad         told of each copy that is corrupt or missing: (source, rank of part, chunk); from a reading thread
    Raises CheckpointError when a chunk has no good copy left: then some buffers are already overwritten. Also when the
    parts do not cover the wanted boxes: then nothing was read.
    """
    for box, view in wanted.items():
        if view.nbytes != box.size:
            raise ValueError(f"{box.name}: a buffer of {view.nbytes} bytes for a box of {box.size}")
    reads = plan_restore(parts, wanted)
    buffers = {box: view.cast("B") for box, view in wanted.items() if view.nbytes}
    jobs = deque(_Job(part.rank, chunk, pieces) for part in parts for chunk, pieces in reads_by_chunk(part, reads))
    fetch = _Fetch(buffers, sources, on_corrupt, on_unreadable or _ignore, on_bad or _ignore)
    total: Counter[str] = Counter()
    count = max(1, min(threads or _worth(sources), len(jobs)))
    with ThreadPoolExecutor(count) as pool:
        for counted in [pool.submit(fetch.all, jobs) for _ in range(count)]:
            total.update(counted.result())
    return dict(total)


def _worth(sources: Mapping[int, Sequence[Source]]) -> int:
    """Threads to read with: what waits for others is worth more than what moves in memory."""
    return max((THREADS[found[0].kind] for found in sources.values() if found), default=1)


@dataclass(frozen=True, slots=True)
class _Job:
    """A chunk of rank's part and what is wanted of it."""

    rank: int
    chunk: Chunk
    reads: tuple[Read, ...]


@dataclass(slots=True)
class _Fetch:
    """What the reading threads share."""

    buffers: Mapping[Box, memoryview]
    sources: Mapping[int, Sequence[Source]]
    on_corrupt: Callable[[CorruptChunk], None]
    on_unreadable: Callable[[Source, Exception], None]
    on_bad: Callable[[Source, int, Chunk], None]
    failing: list[Source] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self, jobs: deque[_Job]) -> Counter[str]:
        """Take jobs until none is left; an error ends them for every thread."""
        counted: Counter[str] = Counter()
        room = _Room()
        try:
            while (job := _next(jobs)) is not None:
                kind: Kind = "memory" if self._verified(job) else self._read(job, room)
                counted[kind] += job.chunk.size
        except BaseException:
            jobs.clear()
            raise
        return counted

    def _verified(self, job: _Job) -> bool:
        """Copy the chunk from the nearest source to its places, if it lies in memory there and is known to be good."""
        nearest = next(iter(self.sources.get(job.rank, ())), None)
        data = nearest.verified(job.chunk) if isinstance(nearest, MemorySource) else None
        if data is None:
            return False
        self._scatter(job, data)
        return True

    def _read(self, job: _Job, room: _Room) -> Kind:
        """Fill the chunk's places from a verified copy, and say from what kind of source."""
        tried, away = [], False
        places = self._places(job)
        for source in self._nearest(job.rank):
            try:
                return self._from(source, job, places, room)
            except CorruptChunk as error:
                tried.append(str(error))
                with self.lock:
                    self.on_corrupt(error)
                self.on_bad(source, job.rank, job.chunk)
            except (StoreError, OSError) as error:
                tried.append(f"{source.name}: {error}")
                self._put_last(source, error)
                if isinstance(error, NotFound | ObjectTooShort):
                    self.on_bad(source, job.rank, job.chunk)
                else:
                    away = True
        raise (CopiesAway if away else CheckpointError)(
            f"chunk {job.chunk.id[:16]} of rank {job.rank}'s part has no good copy ({'; '.join(tried) or 'no source'})"
        )

    def _from(self, source: Source, job: _Job, places: Sequence[memoryview], room: _Room) -> Kind:
        """Fill the chunk's places from one source. Raises CorruptChunk, and what the source does."""
        if isinstance(source, Lending):
            with source.lend(job.rank, job.chunk) as lent:
                if lent is not None:
                    self._scatter(job, lent)
                    return source.kind
            source = source.inner
        if len(places) > 1 and isinstance(source, Scattering):
            source.read_each(job.rank, job.chunk.at, places)
            _check(job, places, source)
            return source.kind
        data = places[0] if len(places) == 1 else room.of(job.chunk.size)
        source.read(job.rank, job.chunk.at, data)
        _check(job, (data,), source)
        if len(places) != 1:
            self._scatter(job, data)
        return source.kind

    def _places(self, job: _Job) -> Sequence[memoryview]:
        """Where the chunk's bytes go, one run behind the other; what is between them goes nowhere. Empty when they do not
        lie like that, or when much of the chunk is not wanted."""
        found: list[memoryview] = []
        at, end = job.chunk.at, job.chunk.at + job.chunk.size
        for read in job.reads:
            if read.count != 1 or not at <= read.start <= at + GAP_BYTES:
                return ()
            if read.start > at:
                found.append(memoryview(bytearray(read.start - at)))
            found.append(self.buffers[read.target][read.into : read.into + read.size])
            at = read.end
        if end - at > GAP_BYTES:
            return ()
        return [*found, memoryview(bytearray(end - at))] if end > at else found

    def _nearest(self, rank: int) -> list[Source]:
        """Sources of a part, those that failed before behind the others: waiting for a dead peer once is enough."""
        with self.lock:
            failing = {id(source) for source in self.failing}
        return sorted(self.sources.get(rank, ()), key=lambda source: id(source) in failing)

    def _put_last(self, source: Source, error: Exception) -> None:
        with self.lock:
            if not isinstance(error, NotFound):
                self.failing.append(source)
            self.on_unreadable(source, error)

    def _scatter(self, job: _Job, data: memoryview) -> None:
        for read in job.reads:
            copy_runs(read, data, self.buffers[read.target], at=job.chunk.at)


class _Room:
    """A buffer that grows to the largest chunk."""

    def __init__(self) -> None:
        self._bytes = memoryview(b"")

    def of(self, size: int) -> memoryview:
        """`size` bytes of it."""
        if len(self._bytes) < size:
            self._bytes = memoryview(bytearray(size))
        return self._bytes[:size]


def _check(job: _Job, data: Sequence[memoryview], source: Source) -> None:
    """Raises CorruptChunk when the bytes are not the chunk's."""
    digest = blake3(max_threads=1)
    for piece in data:
        digest.update(piece)
    if digest.hexdigest() != job.chunk.id:
        raise CorruptChunk(job.chunk.id, source=source.name)


def copy_runs(read: Read, data: memoryview, into: memoryview, *, at: int = 0) -> None:
    """Copy a read's runs from `data`, which begins at `at` of the stream, to their places in its target's bytes."""
    if read.count == 1:
        copy_into(into[read.into : read.into + read.size], data[read.start - at : read.start - at + read.size])
        return
    shape = (read.count, read.size)
    found: np.ndarray[tuple[int, int], np.dtype[np.uint8]]
    found = np.ndarray(shape, np.uint8, data, read.start - at, (read.stride, 1))
    np.copyto(np.ndarray(shape, np.uint8, into, read.into, (read.into_stride, 1)), found)


def _next(jobs: deque[_Job]) -> _Job | None:
    try:
        return jobs.popleft()
    except IndexError:
        return None


def _ignore(*told: object) -> None:
    """For callers that only count corrupt copies."""
