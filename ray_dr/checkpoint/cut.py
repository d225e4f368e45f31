"""Where the boxes of a stream lie, and where the stream is cut into chunks.

Chunks follow the tensors, so that what changes in one tensor is all that a later save sends: a box of OWN_BYTES or more
begins a chunk of its own and is cut every CHUNK_BYTES; smaller ones, side by side, share chunks of up to OWN_BYTES. Each
such chunk begins at a page, the padding before it belongs to the chunk before: memory and files can be moved in pages.

Why OWN_BYTES is what it is: with sizes spread evenly in logarithm from 1 KB to 100 MB, a save of one changed tensor sends
0.9 % more than it has at 256 KiB, 2 % at 512, 5 % at 1 MiB, 51 % at 8. In files, objects of 1 MiB are written as fast as
larger ones, those of 512 KiB a third slower, of 256 KiB half as fast. So the worst state, all of it in tensors of just this
size, makes 2048 objects per GiB instead of 128.

A state all of which is small tensors would make as many at every save, and each costs a few file operations or a request.
So neighbouring chunks of small boxes form *blocks* of up to CHUNK_BYTES: a save in which all of a block has changed may
send it as one chunk (`checkpoint.sealing` decides), as small parts of it are of no use to anybody then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ray_dr.model.checkpoint import CHUNK_BYTES, Shard, align

OWN_BYTES = 512 * 2**10
PAGE_BYTES = 4096

Span = tuple[int, int]
"""(place, size) of a chunk."""
Block = tuple[Span, ...]
"""Chunks side by side that may as well be one; most are alone."""
Run = int | None
"""Place where the chunk began that small boxes share; None behind a large box, or when there is none yet."""


def place(end: int, run: Run, size: int) -> tuple[int, Run]:
    """Where a box of `size` bytes lies in a stream that is filled up to `end`, and the run that it leaves open."""
    if _joins(run, at := align(end), size):
        return at, run
    at = align(end, PAGE_BYTES)
    return at, at if size < OWN_BYTES else None


def cut(shards: Iterable[Shard], size: int) -> tuple[Span, ...]:
    """The chunks of a stream of `size` bytes, in order, without gap. `shards` may lie anywhere in it."""
    return tuple(span for block in blocks(shards, size) for span in block)


def blocks(shards: Iterable[Shard], size: int) -> tuple[Block, ...]:
    """The same chunks, those together that small boxes share, as many as make up to CHUNK_BYTES."""
    found: list[Block] = []
    side_by_side: list[Span] = []
    for first, end, shared in _edges(shards, size):
        room = CHUNK_BYTES - (first - side_by_side[0][0]) if side_by_side else CHUNK_BYTES
        if side_by_side and not (shared and end - first <= room):
            found.append(tuple(side_by_side))
            side_by_side = []
        if shared:
            side_by_side.append((first, end - first))
        else:
            found += (((at, min(CHUNK_BYTES, end - at)),) for at in range(first, end, CHUNK_BYTES))
    return (*found, tuple(side_by_side)) if side_by_side else tuple(found)


def joined(block: Block) -> Span:
    """A block as one chunk."""
    at = block[0][0]
    return at, sum(size for _, size in block)


def _edges(shards: Iterable[Shard], size: int) -> Iterator[tuple[int, int, bool]]:
    """(first, end) of the runs of a stream, and whether it is one that small boxes share."""
    starts = {0: True}
    run: Run = None
    for shard in sorted(shards, key=lambda shard: shard.at):
        length = shard.box.size
        if not _joins(run, shard.at, length):
            small = length < OWN_BYTES
            starts[shard.at] = starts.get(shard.at, True) and small
            run = shard.at if small else None
    for (first, small), end in zip(starts.items(), (*list(starts)[1:], size), strict=True):
        if first < end:
            yield first, end, small and end - first < OWN_BYTES + PAGE_BYTES


def clear_gaps(shards: Iterable[Shard], stream: memoryview) -> None:
    """Zero what lies between boxes, given in order of place: a chunk must not change with what was there before."""
    end = 0
    for shard in shards:
        if shard.at > end:
            stream[end : shard.at] = bytes(shard.at - end)
        end = max(end, shard.at + shard.box.size)


def _joins(run: Run, at: int, size: int) -> bool:
    return run is not None and at + size <= run + OWN_BYTES
