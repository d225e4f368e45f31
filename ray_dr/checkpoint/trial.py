"""A trial restore: every tensor of a checkpoint is assembled in memory, piece by piece, as a restore would.

Tensors are cut along their outermost dims and put together to pieces of at most ROOM bytes, in the order in which they lie
in the parts, so that a chunk is read about once. The reader checks each chunk's hash, and the plan that each byte of each
tensor is covered exactly once.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ray_dr.checkpoint.reader import Source, StoreSource, read_state
from ray_dr.checkpoint.restore_plan import build_index, needed_chunks, plan_restore
from ray_dr.errors import CheckpointError
from ray_dr.model.checkpoint import Box, Part, VersionId
from ray_dr.repository.check import Damage, Unit, look_at_chunk
from ray_dr.repository.layout import parts_prefix
from ray_dr.stores.base import Store

ROOM = 64 * 2**20
"""Bytes of tensors in memory at a time, in one trial."""
_THREADS = 4


def trial_units(store: Store, job: str, version: VersionId, parts: Sequence[Part], *, room: int = ROOM) -> list[Unit]:
    """The pieces that together are one restore of a version. Run one at a time, they take `room` bytes of memory."""
    return [_unit(store, job, version, parts, piece) for piece in pieces(parts, room)]


def pieces(parts: Sequence[Part], room: int) -> Iterator[tuple[Box, ...]]:
    """Boxes that cover every saved tensor once, in lots of at most `room` bytes; a single element may be more."""
    index = build_index(parts)
    lot: list[Box] = []
    size = 0
    for name in sorted(index.shards, key=lambda name: (index.shards[name][0][0], index.shards[name][0][1].at)):
        for box in slabs(index.box(name), room):
            if lot and size + box.size > room:
                yield tuple(lot)
                lot, size = [], 0
            lot.append(box)
            size += box.size
    if lot:
        yield tuple(lot)


def slabs(box: Box, room: int) -> Iterator[Box]:
    """A box, cut along its outermost dims so that each piece has at most `room` bytes, if it has more than one element."""
    dim = next((dim for dim, length in enumerate(box.lengths) if length > 1), None)
    if box.size <= room or dim is None:
        yield box
        return
    rows = max(1, room // (box.size // box.lengths[dim]))
    for first in range(0, box.lengths[dim], rows):
        offsets, lengths = list(box.offsets), list(box.lengths)
        offsets[dim], lengths[dim] = box.offsets[dim] + first, min(rows, box.lengths[dim] - first)
        yield from slabs(replace(box, offsets=tuple(offsets), lengths=tuple(lengths)), room)


def _unit(store: Store, job: str, version: VersionId, parts: Sequence[Part], boxes: tuple[Box, ...]) -> Unit:
    first = boxes[0]
    name = f"{version.attempt}-{version.step}/{first.name}@{','.join(map(str, first.offsets))}"
    size = sum(box.size for box in boxes)
    return Unit(name, size, lambda: _try(store, job, version, parts, boxes, size))


def _try(
    store: Store, job: str, version: VersionId, parts: Sequence[Part], boxes: tuple[Box, ...], size: int
) -> tuple[Damage, ...]:
    """Assemble boxes; what stands in the way."""
    names = {box.name for box in boxes}
    those = [replace(part, shards=tuple(s for s in part.shards if s.box.name in names)) for part in parts]
    sources: dict[int, Sequence[Source]] = {part.rank: [StoreSource(store, job, part)] for part in those}
    memory = memoryview(mmap.mmap(-1, max(1, size)))
    wanted: dict[Box, memoryview] = {}
    at = 0
    for box in boxes:
        wanted[box] = memory[at : at + box.size]
        at += box.size
    try:
        read_state(those, wanted, sources, threads=_THREADS, on_corrupt=lambda error: None)
    except CheckpointError as error:
        bad = _bad_chunks(store, job, version, those, boxes)
        return bad or (
            Damage(f"{parts_prefix(job)}*", f"step {version.step} can't be put together: {error}", (version,)),
        )
    return ()


def _bad_chunks(
    store: Store, job: str, version: VersionId, parts: Sequence[Part], boxes: tuple[Box, ...]
) -> tuple[Damage, ...]:
    """Which of the chunks it takes are damaged. Raises StoreError when the store can't be asked: then none is known to be."""
    try:
        reads = plan_restore(parts, boxes)
        chunks = [chunk for part in parts for chunk in needed_chunks(part, reads)]
    except CheckpointError:
        return ()
    return tuple(damage for chunk in chunks for damage in look_at_chunk(store, job, chunk, (version,)))
