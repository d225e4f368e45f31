"""Save plans cover every tensor once; restore plans bring every byte to its place, at any two world sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.checkpoint.reader import MemorySource, read_state
from ray_dr.checkpoint.restore_plan import clip, plan_restore
from ray_dr.checkpoint.save_plan import Leaf, plan_save, replicated, row_bytes
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


@settings(max_examples=100, deadline=None)
@given(found=tensors(), world=st.integers(1, 16))
def test_replicated_bytes_are_balanced_within_one_row(found: list[Tensor], world: int) -> None:
    leaves = [[leaf(t, None, rank, world) for t in found] for rank in range(world)]
    plans = [plan_save(mine, rank=rank, world=world) for rank, mine in enumerate(leaves)]
    largest_row = max(row_bytes(one.boxes[0])[1] for one in leaves[0])
    mean = sum(one.boxes[0].size for one in leaves[0]) / world
    for plan in plans:
        assert abs(sum(shard.box.size for shard in plan.shards) - mean) <= largest_row + 1


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
