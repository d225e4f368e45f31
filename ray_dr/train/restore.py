"""Taking the state back: from the nearest copy of each part, straight into the tensors."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ray_dr.checkpoint.described import parse
from ray_dr.checkpoint.healing import Damages
from ray_dr.checkpoint.listed import ListedSource
from ray_dr.checkpoint.local_disk import LocalDisk
from ray_dr.checkpoint.reader import Kind, MemorySource, Source, StoreSource, read_state
from ray_dr.checkpoint.restore_plan import build_index, plan_restore
from ray_dr.checkpoint.shared_source import Sharing
from ray_dr.errors import CheckpointError, CopiesAway, CorruptChunk, NoCheckpoint, NotFound, StoreError
from ray_dr.model.attempt import Assignment, Origin
from ray_dr.model.checkpoint import Box, Part, PartRef
from ray_dr.model.journal import Noted, Restored
from ray_dr.repository.parts import read_part
from ray_dr.stores.base import Store
from ray_dr.stores.open import open_store
from ray_dr.stores.peer import PeerReader
from ray_dr.train.link import Link
from ray_dr.train.state import Local, Target, bytes_of

LISTS_AT_ONCE = 8
"""Part lists that are read at a time: each is a round trip."""


def restore(a: Assignment, objects: Mapping[str, Any], token: bytes, store: Store, link: Link) -> Restored:
    """Load the attempt's version into the objects. Raises IncompatibleState before anything is overwritten."""
    try:
        return _restore(a, objects, token, store, link)
    finally:
        link.pools.drop()


def _restore(a: Assignment, objects: Mapping[str, Any], token: bytes, store: Store, link: Link) -> Restored:
    assert a.origin is not None
    begun = time.monotonic()
    readers = _Readers(a, token, link)
    try:
        parts = readers.parts(store)
        scalars = next((part.scalars for part in parts if part.rank == 0), {})
        target = Target(objects, build_index(parts), scalars, rank=a.rank, world=a.world)
        buffers, late = _buffers(target)
        needed = {read.rank for read in plan_restore(parts, buffers)}
        sources = {part.rank: readers.sources(part, store) for part in parts if part.rank in needed}
        damages = Damages(a.agent, a.origin.version)
        with Sharing(a.agent, token, restore=str(a.attempt), local=a.local_rank, of=a.local_world) as sharing:
            sources = sharing.join(parts, buffers, sources)
            link.pools.stop()
            counted = read_state(
                parts, buffers, sources, on_corrupt=lambda error: _note(link, a, error), on_bad=damages.add
            )
            counted = sharing.recount(counted)
        fetched = time.monotonic()
        for tensor, staged in late:
            tensor.copy_(staged)
        target.check_shared()
        target.apply()
        if found := damages.described(sources):
            link.heal(a.rank, found)
    finally:
        readers.close()
    return Restored(
        time.time(), a.attempt, a.rank, a.origin.version, counted, fetched - begun, time.monotonic() - fetched
    )


class _Readers:
    """Connections to the agents that hold parts, opened once each; and this node's own memory, mapped."""

    def __init__(self, a: Assignment, token: bytes, link: Link) -> None:
        self._a, self._token, self._link = a, token, link
        self._origin: Origin = a.origin  # type: ignore[assignment]
        self._open: dict[str, PeerReader] = {}
        self._lists: dict[str, Part] = {}
        self._lock = threading.Lock()

    def parts(self, store: Store) -> list[Part]:
        """The descriptions of all ranks' parts, several asked for at a time."""
        world = self._origin.world
        with ThreadPoolExecutor(min(world, LISTS_AT_ONCE)) as pool:
            return list(pool.map(lambda rank: self.part(rank, store), range(world)))

    def part(self, rank: int, store: Store) -> Part:
        """The description of a rank's part, from the first holder that answers, else from the stores in order. Raises
        CopiesAway when one of them may have it and can't be asked."""
        for address in self._nearest(rank):
            try:
                return parse(self._reader(address).part(self._origin.version, rank))
            except StoreError:
                continue
        failed: list[Exception] = []
        for kept, _, refs, _ in self._stores(store):
            if rank in refs:
                try:
                    return self._listed(kept(), refs[rank])
                except (StoreError, CheckpointError) as error:
                    failed.append(error)
        raise self._none_left(rank, failed)

    def sources(self, part: Part, store: Store) -> tuple[Source, ...]:
        """Where a part's bytes can be read, nearest first. Of stores, only one with nothing nearer is asked now."""
        found: list[Source] = []
        for address in self._nearest(part.rank):
            try:
                found.append(self._held(address, part))
            except (StoreError, OSError):
                continue
        failed: list[Exception] = []
        for kept, url, refs, kind in self._stores(store):
            if part.rank not in refs:
                continue
            stored = functools.partial(self._stored, kept, refs[part.rank], kind)
            if found:
                found.append(ListedSource(url, kind, stored))
                continue
            try:
                found.append(stored())
            except (StoreError, CheckpointError) as error:
                failed.append(error)
        if failed and not found:
            raise self._none_left(part.rank, failed)  # with another copy, a store that is away does no harm
        return tuple(found)

    def _none_left(self, rank: int, failed: list[Exception]) -> CheckpointError:
        """What it means that nobody near holds a part, and that it could not be had from any store, each for its reason."""
        step = self._origin.version.step
        away = [error for error in failed if isinstance(error, StoreError) and not isinstance(error, NotFound)]
        if away:
            return CopiesAway(f"rank {rank} of step {step} can't be had now: {'; '.join(map(str, away))}")
        return NoCheckpoint(f"nobody holds rank {rank} of step {step} any more{''.join(f'; {error}' for error in failed)}")

    def _stored(self, kept: Callable[[], Store], ref: PartRef, kind: Kind) -> StoreSource:
        store = kept()
        return StoreSource(store, self._a.job, self._listed(store, ref), kind)

    def _listed(self, store: Store, ref: PartRef) -> Part:
        """A part list, which is read once."""
        if ref.digest not in self._lists:
            self._lists[ref.digest] = read_part(store, ref)
        return self._lists[ref.digest]

    def _stores(self, first: Store) -> tuple[tuple[Callable[[], Store], str, dict[int, PartRef], Kind], ...]:
        """The stores in order, each with its URL and the part lists that are there."""
        refs, second = ({ref.rank: ref for ref in parts} for parts in (self._origin.parts, self._origin.second))
        return (((lambda: first), first.url, refs, "store"),
                ((lambda: self._second), self._a.second_url, second, "second"))  # fmt: skip

    @functools.cached_property
    def _second(self) -> Store:
        return open_store(self._a.second_url)

    @functools.cached_property
    def _disk(self) -> LocalDisk:
        url, job = self._a.disk
        return LocalDisk(lambda: open_store(url), job, "this node")

    def close(self) -> None:
        for reader in self._open.values():
            reader.close()

    def _nearest(self, rank: int) -> tuple[str, ...]:
        """Agents that hold a part: in memory, then on disk, this node's own first of each."""
        found: list[str] = []
        for holders in (self._origin.holders, self._origin.disks):
            found += sorted(holders.get(str(rank), ()), key=lambda address: address != self._a.agent)
        return tuple(dict.fromkeys(found))

    def _held(self, address: str, part: Part) -> Source:
        reader, own = self._reader(address), address == self._a.agent
        if own and (place := reader.place(part.version, part.rank)) is not None:
            end = place.offset + part.size
            whole = self._link.mapped(place.path, end)
            if whole is None:
                whole = self._link.pools.view(place.path, end)
            return MemorySource(whole[place.offset : end], good=place.good)
        in_memory = address in self._origin.holders.get(str(part.rank), ())
        if own and not in_memory and self._a.disk:
            return StoreSource(self._disk.store, self._disk.job, self._disk.part(part.version, part.rank), "disk")
        return reader.source(part.version, part.rank)

    def _reader(self, address: str) -> PeerReader:
        with self._lock:
            return self._open.setdefault(address, PeerReader(address, self._token))


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
