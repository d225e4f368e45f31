"""Taking the state back: from the nearest copy of each part, straight into the tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ray_dr.checkpoint.described import parse
from ray_dr.checkpoint.memory import attach
from ray_dr.checkpoint.reader import MemorySource, Source, StoreSource, read_state
from ray_dr.checkpoint.restore_plan import build_index
from ray_dr.errors import CheckpointError, CorruptChunk, NoCheckpoint, StoreError
from ray_dr.model.attempt import Assignment, Origin
from ray_dr.model.checkpoint import Box, Part
from ray_dr.model.journal import Noted, Restored
from ray_dr.repository.parts import read_part
from ray_dr.stores.base import Store
from ray_dr.stores.peer import PeerReader
from ray_dr.train.link import Link
from ray_dr.train.state import Local, Target, bytes_of

READ_THREADS = 2


def restore(a: Assignment, objects: Mapping[str, Any], token: bytes, store: Store, link: Link) -> Restored:
    """Load the attempt's version into the objects. Raises IncompatibleState before anything is overwritten."""
    assert a.origin is not None
    begun = time.monotonic()
    readers = _Readers(a, token)
    try:
        parts = [readers.part(rank, store) for rank in range(a.origin.world)]
        scalars = next((part.scalars for part in parts if part.rank == 0), {})
        target = Target(objects, build_index(parts), scalars, rank=a.rank, world=a.world)
        buffers, late = _buffers(target)
        sources = {part.rank: readers.sources(part, store) for part in parts}
        counted = read_state(
            parts, buffers, sources, threads=READ_THREADS, on_corrupt=lambda error: _note(link, a, error)
        )
        fetched = time.monotonic()
        for tensor, staged in late:
            tensor.copy_(staged)
        target.check_shared()
        target.apply()
    finally:
        readers.close()
    return Restored(
        time.time(), a.attempt, a.rank, a.origin.version, counted, fetched - begun, time.monotonic() - fetched
    )


class _Readers:
    """Connections to the agents that hold parts, opened once each; and this node's own memory, mapped."""

    def __init__(self, a: Assignment, token: bytes) -> None:
        self._a, self._token = a, token
        self._origin: Origin = a.origin  # type: ignore[assignment]
        self._open: dict[str, PeerReader] = {}
        self._refs = {ref.rank: ref for ref in self._origin.parts}

    def part(self, rank: int, store: Store) -> Part:
        """The description of a rank's part, from the first holder that answers, else from the store."""
        for address in self._nearest(rank):
            try:
                return parse(self._reader(address).part(self._origin.version, rank))
            except StoreError:
                continue
        if rank not in self._refs:
            raise NoCheckpoint(f"nobody holds rank {rank} of step {self._origin.version.step} any more")
        return read_part(store, self._refs[rank])

    def sources(self, part: Part, store: Store) -> tuple[Source, ...]:
        """Where a part's bytes can be read, nearest first."""
        found: list[Source] = []
        for address in self._nearest(part.rank):
            try:
                found.append(self._memory(address, part))
            except (StoreError, OSError):
                continue
        if part.rank in self._refs:
            try:
                found.append(StoreSource(store, self._a.job, read_part(store, self._refs[part.rank])))
            except (StoreError, CheckpointError):
                if not found:
                    raise  # with a copy in memory, a store that is away does no harm
        return tuple(found)

    def close(self) -> None:
        for reader in self._open.values():
            reader.close()

    def _nearest(self, rank: int) -> tuple[str, ...]:
        holders = self._origin.holders.get(str(rank), ())
        return tuple(sorted(holders, key=lambda address: address != self._a.agent))

    def _memory(self, address: str, part: Part) -> Source:
        reader = self._reader(address)
        if address == self._a.agent and (place := reader.place(part.version, part.rank)) is not None:
            path, offset = place
            return MemorySource(attach(path, offset + part.size)[offset:])
        return reader.source(part.version, part.rank)

    def _reader(self, address: str) -> PeerReader:
        if address not in self._open:
            self._open[address] = PeerReader(address, self._token)
        return self._open[address]


def _buffers(target: Target) -> tuple[dict[Box, memoryview], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Memory to read into, per wanted box: the tensor's own where that is plain CPU memory, else a staging tensor that
    is copied over afterwards: (buffers, [(tensor, staged)])."""
    buffers: dict[Box, memoryview] = {}
    late: list[tuple[torch.Tensor, torch.Tensor]] = []
    for local, box in wanted(target):
        tensor = local.tensor
        shared = local.leaf.name in target.shared
        if tensor.is_cuda or shared or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            late.append((tensor, staged))
            if shared:
                target.shared[local.leaf.name] = staged
            tensor = staged
        buffers[box] = bytes_of(tensor)
    return buffers, late


def wanted(target: Target) -> Iterator[tuple[Local, Box]]:
    """This rank's boxes that have elements, each with its tensor."""
    for local in target.locals:
        for box in local.leaf.boxes:
            if box.size:
                yield local, box


def _note(link: Link, a: Assignment, error: CorruptChunk) -> None:
    fields: dict[str, object] = {"chunk": error.chunk, "source": error.source, "rank": a.rank}
    link.record(Noted(time.time(), "chunk.corrupt", fields))
