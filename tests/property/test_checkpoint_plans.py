"""Save plans cover every tensor once; restore plans bring every byte to its place, at any two world sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.checkpoint import save_plan
from ray_dr.checkpoint.reader import MemorySource, read_state
from ray_dr.checkpoint.restore_plan import clip, plan_restore
from ray_dr.checkpoint.save_plan import GRAIN_BYTES, GRAINS_PER_SHARE, Leaf, plan_save, replicated, whole
from ray_dr.model.checkpoint import ALIGNMENT, DTYPE_BYTES, Box, Chunk, Part, VersionId

DTYPES = ("float32", "bfloat16", "uint8", "complex128")


@dataclass(frozen=True)
class Tensor:
    """A tensor and its layout: None is replicated on all ranks, an int the sharded dim."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    saved_dim: int | None
    wanted_dim: int | None


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    found = []
    for number in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
        dims = st.none() | st.sampled_from(range(len(shape))) if shape else st.none()
        found.append(Tensor(f"t{number}", draw(st.sampled_from(DTYPES)), shape, draw(dims), draw(dims)))
    return found


def leaf(tensor: Tensor, dim: int | None, rank: int, world: int) -> Leaf:
    """A tensor on a rank, cut as torch.chunk would: the last pieces are shorter or empty."""
    if dim is None:
        return replicated(tensor.name, tensor.dtype, tensor.shape, rank=rank, world=world)
    per_rank = -(-tensor.shape[dim] // world)
    first = min(rank * per_rank, tensor.shape[dim])
    last = min(first + per_rank, tensor.shape[dim])
    offsets = tuple(first if i == dim else 0 for i in range(len(tensor.shape)))
    lengths = tuple(last - first if i == dim else n for i, n in enumerate(tensor.shape))
    box = Box(tensor.name, tensor.dtype, tensor.shape, offsets, lengths)
    return Leaf(tensor.name, tensor.dtype, tensor.shape, (box,))


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(box.offsets, box.lengths, strict=True))


def content(tensor: Tensor) -> np.ndarray:
    """Random elements, as raw bytes of the dtype's width."""
    size = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
    data = np.random.default_rng(len(tensor.name) + size).bytes(size)
    return np.frombuffer(data, f"V{DTYPE_BYTES[tensor.dtype]}").reshape(tensor.shape)


def save(state: dict[Tensor, np.ndarray], world: int, chunk_bytes: int) -> tuple[list[Part], list[bytearray]]:
    parts, streams = [], []
    by_name = {tensor.name: values for tensor, values in state.items()}
    for rank in range(world):
        plan = plan_save([leaf(t, t.saved_dim, rank, world) for t in state], rank=rank, world=world)
        stream = bytearray(plan.size)
        for shard in plan.shards:
            stream[shard.at : shard.at + shard.box.size] = by_name[shard.box.name][region(shard.box)].tobytes()
        runs = [(at, stream[at : at + chunk_bytes]) for at in range(0, plan.size, chunk_bytes)]
        chunks = tuple(Chunk(blake3(run).hexdigest(), at, len(run)) for at, run in runs)
        parts.append(Part(VersionId(1, 1), rank, world, plan.size, plan.shards, chunks))
        streams.append(stream)
    return parts, streams


@settings(max_examples=150, deadline=None)
@given(found=tensors(), world=st.integers(1, 16))
def test_all_ranks_together_save_each_element_exactly_once(found: list[Tensor], world: int) -> None:
    seen = {tensor.name: np.zeros(tensor.shape, int) for tensor in found}
    for rank in range(world):
        plan = plan_save([leaf(t, t.saved_dim, rank, world) for t in found], rank=rank, world=world)
        end = 0
        for shard in plan.shards:
            assert shard.at % ALIGNMENT == 0
            assert shard.at >= end
            end = shard.at + shard.box.size
            seen[shard.box.name][region(shard.box)] += 1
        assert end == plan.size
    assert all((count == 1).all() for count in seen.values())


SHAPES = st.lists(st.integers(1, 40) | st.sampled_from((1, 1000, 30_000)), max_size=3).filter(
    lambda shape: math.prod(shape) <= 10**7
)


@settings(max_examples=80, deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=6), fixed=st.integers(0, 20_000), world=st.integers(1, 64))
def test_replicated_bytes_are_balanced_over_ranks_whatever_the_shapes(
    shapes: list[list[int]], fixed: int, world: int
) -> None:
    boxes = [whole(f"t{i}", "float32", tuple(shape)) for i, shape in enumerate(shapes)]
    plans = []
    for rank in range(world):
        leaves = [Leaf(box.name, box.dtype, box.global_shape, (box,), rank, world) for box in boxes]
        state = whole("loose", "uint8", (fixed,))
        plans.append(plan_save([*leaves, Leaf("loose", "uint8", (fixed,), (state,), rank, world, whole=True)],
                               rank=rank, world=world))  # fmt: skip
    loads = [sum(shard.box.size for shard in plan.shards) for plan in plans]
    total = sum(box.size for box in boxes) + fixed
    assert sum(loads) == total
    grain = max(total // (world * GRAINS_PER_SHARE), GRAIN_BYTES)
    assert fixed <= loads[0] <= max(fixed, total / world) + grain + 1
    rest = (total - max(fixed, total // world)) / (world - 1) if world > 1 else 0
    assert all(abs(load - rest) <= grain + 1 for load in loads[1:])
    assert [shard.box.name for plan in plans[1:] for shard in plan.shards].count("loose") == 0
    assert all(len(plan.shards) <= len(boxes) + 1 + 2 * 2 * 3 for plan in plans)


@settings(max_examples=80, deadline=None)
@given(found=tensors(), world=st.integers(1, 64), data=st.data())
def test_tied_tensors_are_written_once_and_found_under_each_name(
    found: list[Tensor], world: int, data: st.DataObject
) -> None:
    tied = data.draw(st.sampled_from(found))
    for rank in range(world):
        leaves = [leaf(t, t.saved_dim, rank, world) for t in found]
        (first,) = (one for one in leaves if one.name == tied.name)
        again = replace(first, name="z", boxes=tuple(replace(box, name="z") for box in first.boxes), same_as=tied.name)
        plan, alone = (plan_save(given, rank=rank, world=world) for given in ([*leaves, again], leaves))
        assert plan.size == alone.size
        places = {name: [(s.box.offsets, s.box.lengths, s.at) for s in plan.shards if s.box.name == name]
                  for name in ("z", tied.name)}  # fmt: skip
        assert places["z"] == places[tied.name]
        assert [shard for shard in plan.shards if shard.box.name != "z"] == list(alone.shards)


def test_a_state_that_stays_the_same_is_planned_once() -> None:
    planned = save_plan._plan.cache_info
    leaves = [replicated(f"once{i}", "float32", (i + 1, 3), rank=1, world=4) for i in range(9)]
    before = planned().misses
    first = plan_save(leaves, rank=1, world=4)
    again = plan_save([replicated(f"once{i}", "float32", (i + 1, 3), rank=1, world=4) for i in range(9)], rank=1, world=4)
    assert again is first
    assert planned().misses == before + 1


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(1, 7), min_size=1, max_size=4), dp=st.integers(1, 3), tp=st.integers(1, 3))
def test_tensors_replicated_over_different_mesh_dims_are_each_saved_once(rows: list[int], dp: int, tp: int) -> None:
    seen = {f"{i}{over}": np.zeros(n, int) for i, n in enumerate(rows) for over in ("dp", "tp")}
    for rank in range(dp * tp):
        row, column = divmod(rank, tp)
        mine = []
        for i, n in enumerate(rows):
            for over, at, count, replica, replicas in (("dp", column, tp, row, dp), ("tp", row, dp, column, tp)):
                (box,) = leaf(Tensor(f"{i}{over}", "float32", (n,), 0, None), 0, at, count).boxes
                mine.append(Leaf(box.name, box.dtype, box.global_shape, (box,), replica, replicas))
        for shard in plan_save(mine, rank=rank, world=dp * tp).shards:
            seen[shard.box.name][region(shard.box)] += 1
    assert all((count == 1).all() for count in seen.values())


@settings(max_examples=200, deadline=None)
@given(
    found=tensors(),
    saved_world=st.integers(1, 16),
    wanted_world=st.integers(1, 16),
    chunk_bytes=st.integers(7, 700),
)
def test_what_any_world_saved_any_world_restores_byte_for_byte(
    found: list[Tensor], saved_world: int, wanted_world: int, chunk_bytes: int
) -> None:
    state = {tensor: content(tensor) for tensor in found}
    parts, streams = save(state, saved_world, chunk_bytes)
    sources = {rank: [MemorySource(memoryview(stream))] for rank, stream in enumerate(streams)}
    for rank in {0, wanted_world // 2, wanted_world - 1}:
        boxes = {leaf(t, t.wanted_dim, rank, wanted_world).boxes[0]: values for t, values in state.items()}
        buffers = {box: memoryview(bytearray(box.size)) for box in boxes}
        read_state(parts, buffers, sources, threads=1, on_corrupt=lambda error: None)
        for box, values in boxes.items():
            assert bytes(buffers[box]) == values[region(box)].tobytes()


@settings(max_examples=100, deadline=None)
@given(found=tensors(), world=st.integers(1, 8), cut=st.integers(1, 400))
def test_clipping_a_read_keeps_each_of_its_bytes_once(found: list[Tensor], world: int, cut: int) -> None:
    state = {tensor: content(tensor) for tensor in found}
    parts, _ = save(state, world, 10**6)
    wanted = [leaf(t, t.wanted_dim, 0, 2).boxes[0] for t in found]
    for read in plan_restore(parts, wanted):
        pieces = [piece for at in range(0, read.end, cut) for piece in clip(read, at, at + cut)]
        assert sorted(pairs(read)) == sorted(pair for piece in pieces for pair in pairs(piece))


def pairs(read: object) -> list[tuple[int, int]]:
    """(byte of the stream, byte of the target) of a read."""
    return [
        (read.start + i * read.stride + byte, read.into + i * read.into_stride + byte)  # type: ignore[attr-defined]
        for i in range(read.count)  # type: ignore[attr-defined]
        for byte in range(read.size)  # type: ignore[attr-defined]
    ]
