"""The copy out of training: one pass into a slot of shared memory, then training goes on."""

from __future__ import annotations

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
    """Copy this rank's boxes into `slot`; returns when the bytes are there.

    CPU tensors: numpy copies in threads, at memory bandwidth. CUDA tensors: on a side stream into the pinned slot.
    """
    host: list[tuple[memoryview, torch.Tensor]] = []
    device: list[tuple[memoryview, torch.Tensor]] = []
    filled: set[int] = set()
    clear_gaps(plan.shards, slot)
    for shard in plan.shards:
        if not shard.box.size or shard.at in filled:
            continue  # tied tensors share a place
        filled.add(shard.at)
        piece = _piece(flat.tensors[shard.box.name], shard)
        target = slot[shard.at : shard.at + shard.box.size]
        (device if piece.is_cuda else host).append((target, piece))
    _copy_from_device(device)
    copy_many([(target, bytes_of(piece)) for target, piece in host], threads=COPY_THREADS)


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


def _copy_from_device(pairs: list[tuple[memoryview, torch.Tensor]]) -> None:
    if not pairs:
        return
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for target, piece in pairs:
            if piece.numel():
                flat = as_bytes(piece)
                torch.frombuffer(target, dtype=torch.uint8).copy_(flat, non_blocking=True)
    side.synchronize()
