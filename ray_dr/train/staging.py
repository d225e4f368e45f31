"""The copy out of training: one pass into a slot of shared memory. `fence` says what of it training need not wait for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ray_dr.checkpoint.cut import clear_gaps
from ray_dr.checkpoint.memory import copy_many
from ray_dr.checkpoint.save_plan import Leaf, SavePlan, plan_save
from ray_dr.model.checkpoint import Shard
from ray_dr.train.state import Flat, Local, as_bytes, bytes_of

COPY_THREADS = 2


@dataclass(slots=True)
class Planner:
    """Keeps the save plan for as long as the state's description stays the same."""

    rank: int
    world: int
    _leaves: tuple[Leaf, ...] = ()
    _plan: SavePlan | None = None

    def plan(self, flat: Flat) -> SavePlan:
        """Which boxes this rank writes, and where in its stream. The same on every rank without talking."""
        leaves = tuple(local.leaf for local in flat.tensors.values())
        if self._plan is None or leaves != self._leaves:
            self._leaves, self._plan = leaves, plan_save(leaves, rank=self.rank, world=self.world)
        return self._plan


def stage(plan: SavePlan, flat: Flat, slot: memoryview) -> None:
    """Copy this rank's boxes into `slot`; returns when the bytes are there."""
    Copy((target, piece) for _, target, piece in places(plan, flat, slot)).run()


def places(plan: SavePlan, flat: Flat, slot: memoryview) -> Iterator[tuple[str, memoryview, torch.Tensor]]:
    """What of each named tensor goes where in `slot`; what has no bytes is left out."""
    filled: set[int] = set()
    clear_gaps(plan.shards, slot)
    for shard in plan.shards:
        if not shard.box.size or shard.at in filled:
            continue  # tied tensors share a place
        filled.add(shard.at)
        name = shard.box.name
        yield name, slot[shard.at : shard.at + shard.box.size], _piece(flat.tensors[name], shard)


class Copy:
    """A copy of tensors into memory, of what they are after all the work that their devices have been given by now. `run`
    may come later, in any thread, as long as nobody changes them.

    CPU tensors: numpy copies in threads, at memory bandwidth. CUDA tensors: on a side stream into the pinned slot. The
    tensors are referred to until their bytes have arrived, so their memory is not given to anybody else before.
    """

    def __init__(self, pairs: Iterable[tuple[memoryview, torch.Tensor]]) -> None:
        self._host: list[tuple[memoryview, torch.Tensor]] = []
        self._device: dict[torch.device, list[tuple[memoryview, torch.Tensor]]] = {}
        for target, piece in pairs:
            (self._device.setdefault(piece.device, []) if piece.is_cuda else self._host).append((target, piece))
        for device in self._device:
            _side_stream(device).wait_stream(torch.cuda.current_stream(device))

    def run(self) -> None:
        """Copy; returns when the bytes are there."""
        arrived = [_copy_from_device(device, pairs) for device, pairs in self._device.items()]
        copy_many([(target, bytes_of(piece)) for target, piece in self._host], threads=COPY_THREADS)
        for event in arrived:
            event.synchronize()


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
