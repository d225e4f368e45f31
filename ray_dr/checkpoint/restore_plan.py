"""Which bytes of which parts fill which places of the wanted boxes.

Saved and wanted boxes are rectangles of the same tensor in different cuts: any world size, any sharding. Their
intersection is copied as *runs*, stretches of bytes that are contiguous on both sides. Equally spaced runs of equal
length make one Read: whole rows along dim 0 are a single run, a cut along another dim is `count` runs with a stride.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ray_dr.errors import CheckpointError
from ray_dr.model.checkpoint import DTYPE_BYTES, Box, Chunk, Part, Shard

Piece = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, lengths) in the whole tensor."""
Described = tuple[tuple[int, tuple[Shard, ...]], ...]
PLANS_KEPT = 4
"""Plans remembered: a process restores the same state again after a failure elsewhere."""


@dataclass(frozen=True, slots=True)
class Read:
    """`count` runs of `size` bytes: run i lies at `start + i * stride` of part `rank`'s stream and belongs at
    `into + i * into_stride` of the dense row-major bytes of `target`. Strides of a single run are 0."""

    rank: int
    start: int
    size: int
    target: Box
    into: int
    count: int = 1
    stride: int = 0
    into_stride: int = 0

    @property
    def end(self) -> int:
        """First byte of the stream behind the last run."""
        return self.start + (self.count - 1) * self.stride + self.size


@dataclass(frozen=True, slots=True)
class Index:
    """Where each saved tensor lies: name -> its (rank of part, shard), by rank, then by place."""

    shards: Mapping[str, tuple[tuple[int, Shard], ...]]

    def box(self, name: str) -> Box:
        """The box that covers the whole saved tensor."""
        saved = self.shards[name][0][1].box
        return replace(saved, offsets=(0,) * len(saved.global_shape), lengths=saved.global_shape)


def build_index(parts: Iterable[Part]) -> Index:
    """The index over the parts of one version. Equal descriptions give the very same index."""
    return _index(_described(parts))


@functools.lru_cache(PLANS_KEPT)
def _index(described: Described) -> Index:
    found: dict[str, list[tuple[int, Shard]]] = {}
    for rank, shards in described:
        for shard in shards:
            found.setdefault(shard.box.name, []).append((rank, shard))
    return Index({name: tuple(found[name]) for name in sorted(found)})


def _described(parts: Iterable[Part]) -> Described:
    """What planning depends on: it stays the same from version to version, while chunks and steps change."""
    return tuple(sorted(((part.rank, part.shards) for part in parts), key=lambda pair: pair[0]))


def compare(index: Index, wanted: Iterable[Box]) -> tuple[str, ...]:
    """Every difference between the saved tensors and the program's, in words; empty when they fit.

    `wanted` names all tensors of the program (boxes without elements count), otherwise the rest is reported as extra.
    """
    program: dict[str, Box] = {}
    for box in wanted:
        program.setdefault(box.name, box)
    missing = [_missing(program[name]) for name in sorted(program.keys() - index.shards.keys())]
    extra = [_extra(index.box(name)) for name in sorted(index.shards.keys() - program.keys())]
    both = sorted(program.keys() & index.shards.keys())
    changed = [text for name in both for text in _changes(index.box(name), program[name])]
    return (*missing, *extra, *changed)


def plan_restore(parts: Sequence[Part], wanted: Iterable[Box]) -> tuple[Read, ...]:
    """The reads that fill every wanted box, grouped by part and sorted by place in its stream.

    The same descriptions and boxes give the very same reads, without planning anew. Raises CheckpointError when a wanted
    box is not covered exactly once by the saved ones.
    """
    return _plan(_described(parts), tuple(dict.fromkeys(wanted)))


@functools.lru_cache(PLANS_KEPT)
def _plan(described: Described, wanted: tuple[Box, ...]) -> tuple[Read, ...]:
    index = _index(described)
    reads = [read for box in wanted for read in _fill(index, box)]
    reads.sort(key=lambda read: (read.rank, read.start, read.into))
    return tuple(_merge(reads))


def needed_chunks(part: Part, reads: Iterable[Read]) -> tuple[Chunk, ...]:
    """The chunks of a part that hold bytes of its reads, in order."""
    return tuple(chunk for chunk, _ in reads_by_chunk(part, reads))


def reads_by_chunk(part: Part, reads: Iterable[Read]) -> tuple[tuple[Chunk, tuple[Read, ...]], ...]:
    """Each needed chunk of a part with the reads clipped to it: they lie wholly inside the chunk.

    Raises CheckpointError when the part's chunks do not cover its stream.
    """
    chunks = _tiling(part)
    starts = [chunk.at for chunk in chunks]
    found: dict[int, tuple[Read, ...]] = {}
    shared: dict[int, list[Read]] = {}  # of chunks that several reads need
    for read in reads:
        if read.rank != part.rank:
            continue
        if read.end > part.size:
            raise CheckpointError(f"rank {part.rank}'s part of {part.size} bytes is too short for {read.target.name}")
        for number in range(bisect.bisect_right(starts, read.start) - 1, bisect.bisect_left(starts, read.end)):
            clipped = clip(read, chunks[number].at, chunks[number].at + chunks[number].size)
            if number in found:
                shared.setdefault(number, list(found[number])).extend(clipped)
            elif clipped:
                found[number] = clipped
    return tuple((chunks[number], tuple(shared.get(number, found[number]))) for number in sorted(found))


def clip(read: Read, first: int, last: int) -> tuple[Read, ...]:
    """The bytes of a read that lie in [first, last) of the stream: whole runs as one read, cut runs as their own."""
    if first <= read.start and read.end <= last:
        return (read,)
    if read.count == 1:
        begin, end = max(read.start, first), min(read.end, last)
        into = read.into + begin - read.start
        return (Read(read.rank, begin, end - begin, read.target, into),) if begin < end else ()
    stride = read.stride or read.size
    low = min(max(-(-(first - read.start) // stride), 0), read.count)
    high = max(min((last - read.start - read.size) // stride + 1, read.count), low)
    whole = [_runs(read, low, high)] if high > low else []
    cut = [_cut(read, number, first, last) for number in sorted({low - 1, high}) if 0 <= number < read.count]
    return tuple(sorted((*whole, *(piece for piece in cut if piece)), key=lambda piece: piece.start))


def _runs(read: Read, low: int, high: int) -> Read:
    """Runs low .. high - 1 of a read."""
    start, into = read.start + low * read.stride, read.into + low * read.into_stride
    if high - low == 1:
        return Read(read.rank, start, read.size, read.target, into)
    return Read(read.rank, start, read.size, read.target, into, high - low, read.stride, read.into_stride)


def _cut(read: Read, number: int, first: int, last: int) -> Read | None:
    """The bytes of one run that lie in [first, last)."""
    start = read.start + number * read.stride
    begin, end = max(start, first), min(start + read.size, last)
    if begin >= end:
        return None
    return Read(read.rank, begin, end - begin, read.target, read.into + number * read.into_stride + begin - start)


def _fill(index: Index, wanted: Box) -> Iterator[Read]:
    """The reads for one wanted box."""
    if wanted.size == 0:
        return
    seen: set[Box] = set()
    pieces: list[Piece] = []
    covered = 0
    for rank, shard in index.shards.get(wanted.name, ()):
        piece = _intersection(shard.box, wanted)
        if piece is None or shard.box in seen:
            continue
        seen.add(shard.box)
        pieces.append(piece)
        covered += math.prod(lengths := piece[1]) * DTYPE_BYTES[wanted.dtype]
        yield from _reads(rank, shard, wanted, piece[0], lengths)
    if covered != wanted.size or not _disjoint(pieces):
        raise CheckpointError(
            f"{wanted.name}{_place(wanted)}: the saved boxes cover {covered} of {wanted.size} bytes, "
            "so the checkpoint's parts are incomplete or overlap"
        )


def _disjoint(pieces: Sequence[Piece]) -> bool:
    """Whether no two pieces share an element: each is compared with those it meets along the dim that is cut most."""
    if len(pieces) < 2:
        return True
    dim = max(range(len(pieces[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in pieces}))
    met: list[Piece] = []
    for offsets, lengths in sorted(pieces, key=lambda piece: piece[0][dim]):
        met = [piece for piece in met if piece[0][dim] + piece[1][dim] > offsets[dim]]
        for other, extents in met:
            apart = (a + n <= b or b + m <= a for a, n, b, m in zip(offsets, lengths, other, extents, strict=True))
            if not any(apart):
                return False
        met.append((offsets, lengths))
    return True


def _intersection(saved: Box, wanted: Box) -> Piece | None:
    """(offsets, lengths) of the common piece; None when there is none or the tensors are not the same."""
    if (saved.dtype, saved.global_shape) != (wanted.dtype, wanted.global_shape):
        return None
    low = tuple(map(max, saved.offsets, wanted.offsets))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(*_spans(saved), *_spans(wanted), strict=True))
    lengths = tuple(last - first for first, last in zip(low, high, strict=True))
    return None if any(length <= 0 for length in lengths) else (low, lengths)


def _spans(box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return box.offsets, box.lengths


def _reads(rank: int, shard: Shard, wanted: Box, offsets: Sequence[int], lengths: Sequence[int]) -> Iterator[Read]:
    """The reads for one piece: one for every index of all levels but the innermost strided one."""
    item = DTYPE_BYTES[wanted.dtype]
    strides, into_strides = _strides(shard.box.lengths, item), _strides(wanted.lengths, item)
    start = shard.at + _offset(offsets, shard.box.offsets, strides)
    into = _offset(offsets, wanted.offsets, into_strides)
    size, levels = _levels(lengths, strides, into_strides, item)
    count, stride, into_stride = levels[-1] if levels else (1, 0, 0)
    for steps in itertools.product(*(range(level[0]) for level in levels[:-1])):
        ahead = sum(step * level[1] for step, level in zip(steps, levels, strict=False))
        into_ahead = sum(step * level[2] for step, level in zip(steps, levels, strict=False))
        yield Read(rank, start + ahead, size, wanted, into + into_ahead, count, stride, into_stride)


def _levels(
    lengths: Sequence[int], strides: Sequence[int], into_strides: Sequence[int], item: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """Bytes of one run, and the loops (count, stride, target stride) around it, outermost first, as few as can be."""
    size = item
    levels: list[tuple[int, int, int]] = []
    for length, stride, into_stride in zip(reversed(lengths), reversed(strides), reversed(into_strides), strict=True):
        if length == 1:
            continue
        if not levels and stride == into_stride == size:
            size *= length
        elif levels and stride == levels[0][0] * levels[0][1] and into_stride == levels[0][0] * levels[0][2]:
            levels[0] = (levels[0][0] * length, levels[0][1], levels[0][2])
        else:
            levels.insert(0, (length, stride, into_stride))
    return size, levels


def _strides(lengths: Sequence[int], item: int) -> tuple[int, ...]:
    """Bytes from one index to the next along each dim of a dense row-major box."""
    return tuple(math.prod(lengths[dim + 1 :]) * item for dim in range(len(lengths)))


def _offset(offsets: Sequence[int], origin: Sequence[int], strides: Sequence[int]) -> int:
    return sum((at - base) * stride for at, base, stride in zip(offsets, origin, strides, strict=True))


def _merge(reads: Iterable[Read]) -> Iterator[Read]:
    """Neighbouring single runs that continue each other on both sides, as one."""
    held: Read | None = None
    for read in reads:
        if held is not None and _continues(held, read):
            held = replace(held, size=held.size + read.size)
            continue
        if held is not None:
            yield held
        held = read
    if held is not None:
        yield held


def _continues(held: Read, read: Read) -> bool:
    same = held.count == read.count == 1 and held.rank == read.rank and held.target == read.target
    return same and held.end == read.start and held.into + held.size == read.into


def _tiling(part: Part) -> list[Chunk]:
    """A part's chunks in order. Raises CheckpointError when they leave a gap, overlap, or end early or late."""
    chunks = sorted(part.chunks, key=lambda chunk: chunk.at)
    end = 0
    for chunk in chunks:
        if chunk.at != end:
            break
        end += chunk.size
    else:
        if end == part.size:
            return chunks
    raise CheckpointError(f"the chunks of rank {part.rank}'s part of {part.version} do not tile its {part.size} bytes")


def _missing(box: Box) -> str:
    return f"{box.name}: the program wants {_tensor(box)}, the checkpoint does not have it"


def _extra(box: Box) -> str:
    return f"{box.name}: the checkpoint has {_tensor(box)}, the program does not want it"


def _changes(saved: Box, wanted: Box) -> Iterator[str]:
    if saved.global_shape != wanted.global_shape:
        shapes = list(saved.global_shape), list(wanted.global_shape)
        yield f"{saved.name}: shape {shapes[0]} in the checkpoint, {shapes[1]} in the program"
    if saved.dtype != wanted.dtype:
        yield f"{saved.name}: dtype {saved.dtype} in the checkpoint, {wanted.dtype} in the program"


def _tensor(box: Box) -> str:
    return f"{box.dtype}{list(box.global_shape)}"


def _place(box: Box) -> str:
    return "[" + ", ".join(f"{at}:{at + n}" for at, n in zip(box.offsets, box.lengths, strict=True)) + "]"
