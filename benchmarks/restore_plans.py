"""Restores on other world sizes, and long manifests: the parts of benchmarks.restore that plan."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from blake3 import blake3

from benchmarks.figures import median, p95
from ray_dr.checkpoint.reader import MemorySource, Source, StoreSource, read_state
from ray_dr.checkpoint.restore_plan import build_index, plan_restore, reads_by_chunk
from ray_dr.checkpoint.save_plan import Leaf, plan_save, replicated
from ray_dr.checkpoint.sealing import Sealer
from ray_dr.model.checkpoint import CHUNK_BYTES, Box, Chunk, Part, Shard, VersionId
from ray_dr.repository.layout import chunk_key
from ray_dr.repository.parts import read_part, write_part
from ray_dr.stores.memory import MemoryStore

COLUMNS = 4096
TENSOR_BYTES = 32 * 2**20
FOLDER = "000001-000000000005-000001"
WORLDS = ((4, (4, 1, 2, 3)), (1, (1, 4)), (2, (2, 4)), (3, (3, 4)))
"""Ranks that write, and those that read."""
APART = "store, a node each"
CHUNKS = 100_000
SHARDS = 4_000
VERSION = VersionId(1, 5)


@dataclass(frozen=True)
class World:
    """A checkpoint of `written` ranks read by `read` ranks; `ratio` to that read by `written`."""

    written: int
    read: int
    kind: str
    took_s: list[float]
    ratio: float

    @property
    def row(self) -> tuple[object, ...]:
        return (self.written, self.read, self.kind, f"{median(self.took_s):.3f} / {p95(self.took_s):.3f}", f"{self.ratio:.2f}")


def boxes(size: int, rank: int, world: int) -> list[Leaf]:
    """Matrices of float32, `size` bytes in all: a third cut along rows, a third along columns, a third replicated."""
    rows = TENSOR_BYTES // 4 // COLUMNS
    found = []
    for number in range(max(3, size // TENSOR_BYTES)):
        name, shape = f"w{number:03d}", (rows, COLUMNS)
        if number % 3 == 2:
            found.append(replicated(name, "float32", shape, rank=rank, world=world))
            continue
        dim = number % 3
        first, last = shape[dim] * rank // world, shape[dim] * (rank + 1) // world
        offsets, lengths = [0, 0], list(shape)
        offsets[dim], lengths[dim] = first, last - first
        found.append(Leaf(name, "float32", shape, (Box(name, "float32", shape, tuple(offsets), tuple(lengths)),)))
    return found


def held_boxes(size: int, rank: int, world: int) -> list[Box]:
    """What a rank reads. Replicated tensors are left to rank 0: with more ranks there would be more to read, which is no
    matter of cuts."""
    return [leaf.boxes[0] for leaf in boxes(size, rank, world) if rank == 0 or leaf.replica_count == 1]


@dataclass(frozen=True)
class Written:
    """A checkpoint of some world: its parts, and their bytes as they lie in shared memory and in a store."""

    parts: list[Part]
    streams: list[memoryview]
    store: MemoryStore

    def sources(self, kind: str) -> dict[int, Sequence[Source]]:
        if kind == "store":
            return {part.rank: [StoreSource(self.store, "j", part)] for part in self.parts}
        return {
            part.rank: [MemorySource(stream, good={chunk.at: chunk.id for chunk in part.chunks})]
            for part, stream in zip(self.parts, self.streams, strict=True)
        }


def write(size: int, world: int) -> Written:
    parts, streams, store = [], [], MemoryStore()
    for rank in range(world):
        plan = plan_save(boxes(size, rank, world), rank=rank, world=world)
        data = np.random.default_rng(rank).integers(0, 256, plan.size, np.uint8)
        part = Part(VERSION, rank, world, plan.size, plan.shards, ())
        chunks = []
        for chunk, piece in Sealer().seal(part, memoryview(data)):
            chunks.append(Chunk(chunk.id, chunk.at, chunk.size, FOLDER))
            store.put(chunk_key("j", chunks[-1]), piece)
        parts.append(Part(VERSION, rank, world, plan.size, plan.shards, tuple(chunks)))
        streams.append(memoryview(data))
    return Written(parts, streams, store)


def read(written: Written, size: int, world: int, kind: str, room: memoryview) -> float:
    """Seconds that all ranks take in all to read what they hold into `room`, which is in place."""
    took = 0.0
    for rank in range(world):
        wanted, at = {}, 0
        for box in held_boxes(size, rank, world):
            wanted[box] = room[at : at + box.size]
            at += box.size
        begun = time.perf_counter()
        read_state(written.parts, wanted, written.sources(kind), on_corrupt=refuse)
        took += time.perf_counter() - begun
    return took


def world_rows(size: int, rounds: int) -> list[World]:
    """4 ranks' checkpoint read by 1, 2, 3 and 4; that of 1, 2, 3 read by 4 and by themselves; one rank after the other."""
    found = []
    room = memoryview(np.ones(2 * size, np.uint8))
    for wrote, readers in WORLDS:
        written = write(size, wrote)
        for kind in ("memory", "store"):
            turns: dict[int, list[float]] = {world: [] for world in readers}
            for number in range(rounds + 1):
                for world in readers:
                    took = read(written, size, world, kind, room)
                    if number:
                        turns[world].append(took)
            same = median(turns[wrote])
            name = APART if kind == "store" else kind
            found += [World(wrote, world, name, took, median(took) / same) for world, took in turns.items()]
    return found


@dataclass(frozen=True)
class Manifests:
    """A version of CHUNKS chunks in `lists` part lists: seconds of each stage in each round."""

    lists: int
    stages: list[tuple[float, ...]]

    @property
    def total_s(self) -> float:
        return median([sum(each) for each in self.stages])

    @property
    def row(self) -> tuple[object, ...]:
        each = [f"{median([stages[i] for stages in self.stages]):.3f}" for i in range(len(self.stages[0]))]
        return (self.lists, f"{CHUNKS:,}", *each, f"{self.total_s:.3f} / {p95([sum(s) for s in self.stages]):.3f}")


def long_parts(lists: int) -> list[Part]:
    """CHUNKS chunks and SHARDS shards, dealt to part lists; every tensor is cut over all of them."""
    each, shards = CHUNKS // lists, SHARDS // lists
    size = each * CHUNK_BYTES
    length = size // shards // 64 * 16
    found = []
    for rank in range(lists):
        held = []
        for number in range(shards):
            items = length if number < shards - 1 else size // 4 - length * (shards - 1)
            box = Box(f"model/layers.{number}.weight", "float32", (items * lists,), (items * rank,), (items,))
            held.append(Shard(box, number * length * 4))
        names = (blake3(f"{rank}.{number}".encode()).hexdigest() for number in range(each))
        chunks = (Chunk(name, number * CHUNK_BYTES, CHUNK_BYTES, FOLDER) for number, name in enumerate(names))
        found.append(Part(VERSION, rank, lists, size, tuple(held), tuple(chunks)))
    return found


def manifest_rows(rounds: int) -> list[Manifests]:
    """One and 64 part lists: written to a store in memory, read back, indexed and planned, from nothing each time."""
    return [Manifests(lists, [_stages(long_parts(lists)) for _ in range(rounds)]) for lists in (1, 64)]


def _stages(parts: list[Part]) -> tuple[float, ...]:
    from ray_dr.checkpoint import restore_plan

    restore_plan._plan.cache_clear()
    restore_plan._index.cache_clear()
    store = MemoryStore()
    clock = [time.perf_counter()]
    mark = partial(_mark, clock)
    refs = [write_part(store, "j", part, term=1) for part in parts]
    mark()
    found = [read_part(store, ref) for ref in refs]
    mark()
    index = build_index(found)
    wanted = [index.box(name) for name in index.shards]
    mark()
    reads = plan_restore(found, wanted)
    jobs = [job for part in found for job in reads_by_chunk(part, reads)]
    mark()
    assert len(jobs) == sum(len(part.chunks) for part in parts)
    return tuple(after - before for before, after in itertools.pairwise(clock))


def _mark(clock: list[float]) -> None:
    clock.append(time.perf_counter())


def refuse(error: Exception) -> None:
    """For readers of what is whole."""
    raise error
