"""Where the boxes of a stream lie, and where the stream is cut into chunks.

Chunks follow the tensors, so that what changes in one tensor is all that a later save sends: a box of OWN_BYTES or more
begins a chunk of its own and is cut every CHUNK_BYTES; smaller ones, side by side, share chunks of up to OWN_BYTES. Each
such chunk begins at a page, the padding before it belongs to the chunk before: memory and files can be moved in pages.

Why OWN_BYTES is what it is: with sizes spread evenly in logarithm from 1 KB to 100 MB, a save of one changed tensor sends
0.9 % more than it has at 256 KiB, 2 % at 512, 5 % at 1 MiB, 51 % at 8. In files, objects of 1 MiB are written as fast as
larger ones, those of 512 KiB a third slower, of 256 KiB half as fast. So the worst state, all of it in tensors of just this
size, makes 2048 objects per GiB instead of 128.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from ray_dr.model.checkpoint import CHUNK_BYTES, Shard, align

OWN_BYTES = 512 * 2**10
PAGE_BYTES = 4096

Run = int | None
"""Place where the chunk began that small boxes share; None behind a large box, or when there is none yet."""


def place(end: int, run: Run, size: int) -> tuple[int, Run]:
    """Where a box of `size` bytes lies in a stream that is filled up to `end`, and the run that it leaves open."""
    if _joins(run, at := align(end), size):
        return at, run
    at = align(end, PAGE_BYTES)
    return at, at if size < OWN_BYTES else None


def cut(shards: Iterable[Shard], size: int) -> tuple[tuple[int, int], ...]:
    """(place, size) of the chunks of a stream of `size` bytes, in order, without gap. `shards` may lie anywhere in it."""
    starts: dict[int, None] = {0: None}
    run: Run = None
    for shard in sorted(shards, key=lambda shard: shard.at):
        if not _joins(run, shard.at, shard.box.size):
            starts[shard.at] = None
            run = shard.at if shard.box.size < OWN_BYTES else None
    edges = pairwise((*starts, size))
    return tuple((at, min(CHUNK_BYTES, end - at)) for first, end in edges for at in range(first, end, CHUNK_BYTES))


def clear_gaps(shards: Iterable[Shard], stream: memoryview) -> None:
    """Zero what lies between boxes, given in order of place: a chunk must not change with what was there before."""
    end = 0
    for shard in shards:
        if shard.at > end:
            stream[end : shard.at] = bytes(shard.at - end)
        end = max(end, shard.at + shard.box.size)


def _joins(run: Run, at: int, size: int) -> bool:
    return run is not None and at + size <= run + OWN_BYTES
