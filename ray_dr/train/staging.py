"""The copy out of training: one pass into a slot of shared memory. `fence` says what of it training need not wait for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from ray_dr.checkpoint.cut import clear_gaps
from ray_dr.checkpoint.memory import copy_into, copy_many, in_threads
from ray_dr.checkpoint.save_plan import Leaf, SavePlan, plan_save
from ray_dr.model.checkpoint import CHUNK_BYTES, Shard, VersionId
from ray_dr.train.state import Flat, Local, as_bytes, bytes_of

COPY_THREADS = 2
REST_MOST = 16
WORD_BYTES = 8
SMALL_WORDS = 32_767
"""torch deals copies of more elements to several threads (at::internal::GRAIN_SIZE), which would take them from training."""


@dataclass(slots=True)
class Planner:
    """Keeps the save plan for as long as the state's description stays the same."""

    rank: int
    world: int
    _leaves: tuple[Leaf, ...] = ()
    _plan: SavePlan | None = None

    def plan(self, flat: Flat) -> SavePlan:
        """Which boxes this rank writes, and where in its stream. The same on every rank without talking."""
        leaves = tuple([local.leaf for local in flat.tensors.values()])
        if self._plan is None or leaves != self._leaves:
            self._leaves, self._plan = leaves, plan_save(leaves, rank=self.rank, world=self.world)
        return self._plan


@dataclass(frozen=True, slots=True)
class Piece:
    """What of a named tensor goes to bytes `at` to `at + size` of a slot."""

    name: str
    at: int
    size: int
    tensor: torch.Tensor


def stage(plan: SavePlan, flat: Flat, slot: memoryview) -> None:
    """Copy this rank's boxes into `slot`; returns when the bytes are there."""
    clear_gaps(plan.shards, slot)
    Copy(pieces(plan, flat), slot).run()


def pieces(plan: SavePlan, flat: Flat) -> Iterator[Piece]:
    """What goes where; what has no bytes is left out, and so is every name but one of tied tensors."""
    filled: set[int] = set()
    for shard in plan.shards:
        if shard.box.size and shard.at not in filled:
            filled.add(shard.at)
            yield Piece(shard.box.name, shard.at, shard.box.size, _piece(flat.tensors[shard.box.name], shard))


class Copy:
    """A copy of pieces into a slot. Of those on devices it is what they are after all the work that the devices have been
    given by now. `run` may come later, in any thread, as long as nobody changes them; without any on devices, often.

    CPU tensors: numpy copies in threads, at memory bandwidth; the small ones all in one call, because taking Python's lock
    for each, against a training thread, would cost more than the bytes; of large ones, what the slot has already (`marks`
    tell) is not copied again. CUDA tensors: on a side stream into the pinned slot. The tensors are referred to, so their
    memory is not given to anybody else before their bytes have arrived.
    """

    def __init__(self, pieces: Iterable[Piece], slot: memoryview, marks: Marks | None = None) -> None:
        self._slot, self._marks, self._there = slot, marks, dict[int, bytes]()
        self._device: dict[torch.device, list[tuple[memoryview, torch.Tensor]]] = {}
        self._host: list[Piece] = []
        self._prepared = False
        for piece in pieces:
            if piece.tensor.is_cuda:
                target = slot[piece.at : piece.at + piece.size]
                self._device.setdefault(piece.tensor.device, []).append((target, piece.tensor))
            else:
                self._host.append(piece)
        for device in self._device:
            _side_stream(device).wait_stream(torch.cuda.current_stream(device))

    def _prepare(self) -> None:
        """Once, and only when it is to run: training need not wait for this either."""
        self._runs: list[tuple[int, memoryview, memoryview]] = []
        self._other: list[tuple[memoryview, torch.Tensor]] = []
        spans: dict[torch.dtype, list[tuple[int, int]]] = {torch.int64: [], torch.uint8: []}
        sources: dict[torch.dtype, list[torch.Tensor]] = {torch.int64: [], torch.uint8: []}
        for piece in self._host:
            end = piece.at + piece.size
            if (source := _in_one_thread(piece)) is not None:
                spans[source.dtype].append((piece.at, end))
                sources[source.dtype].append(source)
            elif in_one_run(piece.tensor):
                self._runs += _runs(piece, self._slot)
            else:
                self._other.append((self._slot[piece.at : end], piece.tensor))
        self._small = (
            [target for dtype, wanted in spans.items() for target in _cut_out(self._slot, dtype, wanted)],
            [source for found in sources.values() for source in found],
        )
        for target, source in zip(*self._small, strict=True):
            assert target.numel() == source.numel(), "else torch would fill it up, or copy nothing"
        self._prepared = True

    def run(self) -> None:
        """Copy; returns when the bytes are there."""
        if not self._prepared:
            self._prepare()
        arrived = [_copy_from_device(device, pairs) for device, pairs in self._device.items()]
        if self._small[0]:
            with torch.no_grad():
                torch._foreach_copy_(*self._small)
        copy_many(((target, bytes_of(piece)) for target, piece in self._other), threads=COPY_THREADS)
        if self._marks is None:
            copy_many(((target, source) for _, target, source in self._runs), threads=COPY_THREADS)
        else:
            in_threads((functools.partial(self._renew, self._marks, *run) for run in self._runs), COPY_THREADS)
        for event in arrived:
            event.synchronize()

    def _renew(self, marks: Marks, at: int, target: memoryview, source: memoryview) -> None:
        mark, there = marks.look(at, source), self._there.pop(at, None)
        if mark is None or there != mark:
            copy_into(target, source)
        if mark is not None:
            self._there[at] = mark


class Marks:
    """Which runs of a state's bytes have stayed what they were, from save to save: told by fingerprints (`sealing` says how
    far these can be trusted), which take a third of the time of a copy.

    A run that has changed is not looked at again before 0, 1, 2, 4, ... REST_MOST saves have passed: in dense training, where
    all changes always, looking costs next to nothing.
    """

    def __init__(self) -> None:
        self._save = 0
        self._marks: dict[int, bytes] = {}
        self._new_at: dict[int, int] = {}
        self._changes: dict[int, int] = {}
        self._rest: dict[int, int] = {}
        self._told: tuple[VersionId, int] | None = None

    def begin(self) -> None:
        """The next save."""
        self._save += 1

    def look(self, at: int, data: memoryview) -> bytes | None:
        """The mark of the run at this place, None if it was not looked at. One thread per run."""
        if self._rest.get(at, 0):
            self._rest[at] -= 1
            self._marks.pop(at, None)
            self._new_at[at] = self._save
            return None
        mark, before = xxhash.xxh3_128_digest(data), self._marks.get(at)
        self._marks[at] = mark
        if mark == before:
            self._changes[at] = 0
            return mark
        self._new_at[at] = self._save
        if before is not None:
            self._rest[at] = min(2 ** self._changes.get(at, 0) // 2, REST_MOST)
            self._changes[at] = self._changes.get(at, 0) + 1
        return mark

    def tell(self, version: VersionId) -> tuple[VersionId, tuple[int, ...]] | None:
        """This save goes to the agent as `version`: the one that went before it, and the places of runs that are the same."""
        told, self._told = self._told, (version, self._save)
        if told is None:
            return None
        return told[0], tuple(sorted(at for at, new_at in self._new_at.items() if new_at <= told[1]))


def _runs(piece: Piece, slot: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """(place, target, source) of a piece, in the runs that its chunks are made of."""
    data = bytes_of(piece.tensor)
    for first in range(0, piece.size, CHUNK_BYTES):
        source = data[first : first + CHUNK_BYTES]
        at = piece.at + first
        yield at, slot[at : at + len(source)], source


def in_one_run(tensor: torch.Tensor) -> bool:
    """Whether its bytes, as they are to be stored, lie side by side in its own memory."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _in_one_thread(piece: Piece) -> torch.Tensor | None:
    """The bytes of a piece, as words where they come in words, if torch would take but one thread to copy them; no copy."""
    tensor, size = piece.tensor, piece.size
    if size > SMALL_WORDS * WORD_BYTES or not in_one_run(tensor):
        return None
    flat = as_bytes(tensor) if tensor.is_complex() or size % WORD_BYTES else tensor.reshape(-1)
    if size % WORD_BYTES == 0 and flat.storage_offset() * flat.element_size() % WORD_BYTES == 0:
        return flat.view(torch.int64)
    return flat.view(torch.uint8) if size <= SMALL_WORDS else None


def _cut_out(slot: memoryview, dtype: torch.dtype, runs: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
    """Runs of bytes [first, last) of a slot as tensors."""
    if runs:
        end = max(last for _, last in runs)
        whole, width = torch.from_numpy(np.frombuffer(slot[:end], np.uint8)).view(dtype), dtype.itemsize
        yield from (whole[first // width : last // width] for first, last in runs)


def pin(slot: memoryview) -> None:
    """Register shared memory with CUDA, so that copies from the device run at the bus's speed. Nothing without CUDA."""
    if not torch.cuda.is_available():
        return
    array = np.frombuffer(slot, np.uint8)
    torch.cuda.cudart().cudaHostRegister(array.ctypes.data, len(slot), 0)  # type: ignore[no-untyped-call]


def _piece(local: Local, shard: Shard) -> torch.Tensor:
    """What a shard covers of this rank's tensor."""
    (box,) = local.leaf.boxes
    piece = local.tensor
    if shard.box.lengths != box.lengths:
        for dim, (at, base) in enumerate(zip(shard.box.offsets, box.offsets, strict=True)):
            piece = piece.narrow(dim, at - base, shard.box.lengths[dim])
    return piece


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: memory that a stream has used stays reserved for that stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _copy_from_device(device: torch.device, pairs: Iterable[tuple[memoryview, torch.Tensor]]) -> torch.cuda.Event:
    """Give the copies to the device's side stream; the event comes after them."""
    side = _side_stream(device)
    with torch.cuda.stream(side):
        for target, piece in pairs:
            torch.frombuffer(target, dtype=torch.uint8).copy_(as_bytes(piece), non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrived.record(side)
    return arrived
