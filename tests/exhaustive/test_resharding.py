"""Any world's checkpoint at any other world, in every kind of cut: each byte comes from its place, and none is read
that is not needed."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.checkpoint import restore_plan
from ray_dr.checkpoint.mesh import Cut, held
from ray_dr.checkpoint.reader import MemorySource, read_state
from ray_dr.checkpoint.restore_plan import needed_chunks, plan_restore
from ray_dr.checkpoint.save_plan import Leaf, plan_save
from ray_dr.errors import CheckpointError
from ray_dr.model.checkpoint import Box, Chunk, Part, Shard, VersionId

CHUNK = 96
SHAPES = {"weight": (9, 7), "cube": (2, 5, 3), "bias": (10,), "wide": (1, 61), "step": ()}


@dataclass(frozen=True)
class Layout:
    """How a program of `world` ranks holds every tensor."""

    kind: str
    world: int

    def cuts(self, rank: int, dims: int) -> tuple[tuple[Cut, ...], tuple[int, ...]]:
        """The cuts of a tensor on a rank, and the ranks that hold the same box."""
        rows = max(size for size in (1, 2, 3, 4) if self.world % size == 0)
        columns = self.world // rows
        at, beside = divmod(rank, columns)
        if self.kind == "replicated" or dims == 0:
            return (), tuple(range(self.world))
        if self.kind == "hybrid":  # replicas x shards
            return (Cut(0, columns, beside),), tuple(range(beside, self.world, columns))
        if self.kind == "columns":
            return (Cut(dims - 1, self.world, rank),), (rank,)
        if self.kind == "grid":  # two dims, over the same tensor dim where it has one only
            return (Cut(0, rows, at), Cut(dims - 1, columns, beside)), (rank,)
        return (Cut(0, self.world, rank),), (rank,)

    def leaf(self, name: str, rank: int) -> Leaf:
        shape = SHAPES[name]
        cuts, holders = self.cuts(rank, len(shape))
        placed = held(shape, cuts)
        assert placed is not None
        box = Box(name, "int16", shape, *placed)
        return Leaf(name, "int16", shape, (box,), holders.index(rank), len(holders), holders)

    def leaves(self, rank: int) -> list[Leaf]:
        return [self.leaf(name, rank) for name in SHAPES]


KINDS = ("replicated", "rows", "columns", "hybrid", "grid")
VALUES = {name: np.arange(math.prod(shape), dtype=np.int16).reshape(shape) + 1000 * i
          for i, (name, shape) in enumerate(SHAPES.items())}  # fmt: skip


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(box.offsets, box.lengths, strict=True))


def save(layout: Layout) -> tuple[list[Part], list[bytearray]]:
    parts, streams = [], []
    for rank in range(layout.world):
        plan = plan_save(layout.leaves(rank), rank=rank, world=layout.world)
        stream = bytearray(plan.size)
        for shard in plan.shards:
            stream[shard.at : shard.at + shard.box.size] = VALUES[shard.box.name][region(shard.box)].tobytes()
        runs = [(at, stream[at : at + CHUNK]) for at in range(0, plan.size, CHUNK)]
        chunks = tuple(Chunk(blake3(run).hexdigest(), at, len(run)) for at, run in runs)
        parts.append(Part(VersionId(1, 1), rank, layout.world, plan.size, plan.shards, chunks))
        streams.append(stream)
    assert sum(shard.box.size for part in parts for shard in part.shards) == sum(v.nbytes for v in VALUES.values())
    return parts, streams


def restore_and_check(parts: list[Part], streams: list[bytearray], layout: Layout, ranks: range) -> None:
    sources = {rank: [MemorySource(memoryview(stream))] for rank, stream in enumerate(streams)}
    for rank in ranks:
        boxes = [box for leaf in layout.leaves(rank) for box in leaf.boxes]
        reads = plan_restore(parts, boxes)
        assert sum(read.count * read.size for read in reads) == sum(box.size for box in boxes)  # only what it needs
        buffers = {box: memoryview(bytearray(box.size)) for box in boxes}
        counted = read_state(parts, buffers, sources, threads=1, on_corrupt=lambda error: pytest.fail(str(error)))
        needed = [chunk for part in parts for chunk in needed_chunks(part, reads)]
        assert sum(counted.values()) == sum(chunk.size for chunk in needed)  # each chunk of it once
        for box in boxes:
            assert bytes(buffers[box]) == VALUES[box.name][region(box)].tobytes()


@pytest.mark.parametrize(("saved_kind", "kind"), [*itertools.product(KINDS, KINDS)])
def test_every_world_of_one_to_eight_ranks_restores_at_every_other(saved_kind: str, kind: str) -> None:
    for saved_world in range(1, 9):
        parts, streams = save(Layout(saved_kind, saved_world))
        for world in range(1, 9):
            rank = saved_world % world  # a different one for each saved world
            restore_and_check(parts, streams, Layout(kind, world), range(rank, rank + 1))


@settings(max_examples=40, deadline=None)
@given(kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)), saved=st.integers(1, 64), data=st.data())
def test_any_world_up_to_64_restores_at_any_other(kinds: tuple[str, str], saved: int, data: st.DataObject) -> None:
    parts, streams = save(Layout(kinds[0], saved))
    world = data.draw(st.integers(1, 64))
    rank = data.draw(st.integers(0, world - 1))
    restore_and_check(parts, streams, Layout(kinds[1], world), range(rank, rank + 1))


def test_the_replicas_of_a_mesh_share_its_writing() -> None:
    loads = []
    for rank in range(12):
        cuts, holders = Layout("hybrid", 12).cuts(rank, 2)
        leaves = []
        for name, shape in {"a": (300, 500), "b": (7, 30_000), "c": (40_000, 1)}.items():
            box = Box(name, "float32", shape, *(held(shape, cuts) or ((), ())))
            leaves.append(Leaf(name, "float32", shape, (box,), holders.index(rank), len(holders), holders))
        loads.append(sum(shard.box.size for shard in plan_save(leaves, rank=rank, world=12).shards))
    assert sum(loads) == 4 * (300 * 500 + 7 * 30_000 + 40_000)
    for first in range(3):  # the four ranks that hold the same shards
        alike = loads[first::3]
        assert max(alike) <= 1.05 * min(alike)


@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_parts_that_overlap_are_never_taken_for_a_whole_tensor(cut: str) -> None:
    across = cut == "columns"
    spans = [(0, 4), (2, 4)]  # 8 of 8 in sum, and 6:8 is nowhere
    parts = []
    for rank, (at, size) in enumerate(spans):
        box = Box("w", "int8", (8, 8), (0, at) if across else (at, 0), (8, size) if across else (size, 8))
        parts.append(Part(VersionId(1, 1), rank, 2, box.size, (Shard(box, 0),), ()))
    with pytest.raises(CheckpointError, match=r"w\[0:8, 0:8\]: the saved boxes cover 64 of 64 bytes.*overlap"):
        plan_restore(parts, [Box("w", "int8", (8, 8), (0, 0), (8, 8))])


def test_a_second_restore_of_the_same_shapes_plans_nothing_anew() -> None:
    parts, streams = save(Layout("grid", 6))
    layout = Layout("rows", 5)
    restore_and_check(parts, streams, layout, range(5))
    before = restore_plan._plan.cache_info().misses, restore_plan._index.cache_info().misses
    boxes = [box for leaf in layout.leaves(4) for box in leaf.boxes]
    later = [replace(part, version=VersionId(2, 9), chunks=(), shards=tuple(map(replace, part.shards))) for part in parts]
    assert plan_restore(later, boxes) is plan_restore(parts, boxes)
    assert (restore_plan._plan.cache_info().misses, restore_plan._index.cache_info().misses) == before
