"""Which rank writes which bytes of a checkpoint.

Every rank gives the same description of the state, seen from its own place, and finds its share without a word to the
others. A box held by one rank is written by that rank. A box held by n ranks (its *replicas*) is cut so that each
replica writes about one n-th: all boxes of the same replicas are laid out one after the other in order of name, replica
i takes bytes [i*T/n, (i+1)*T/n) of their T bytes, and each cut moves to the nearest whole *row*: an index of dim 0, or,
where those are large beside the share, of a further dim. So no rank writes more than 1/64 of a share, or GRAIN_BYTES,
above the mean, whatever the shapes.

Two tensors may be laid out together only where the same ranks hold both: otherwise the replicas of one would not agree
on T. That is known where all ranks hold them, or where the leaf names its holders; any other tensor is cut by itself.

A leaf that is `whole` comes from replica 0 alone, which then writes less of the others. A leaf that is `same_as` another
has that one's bytes (tied weights): its boxes get the same places in the stream and nothing is written for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ray_dr.checkpoint.cut import OWN_BYTES, place
from ray_dr.model.checkpoint import DTYPE_BYTES, Box, Shard

GRAIN_BYTES = 4096
"""Rows up to this size are never cut, however small a share is: pieces of a few bytes cost more than they balance."""
GRAINS_PER_SHARE = 64
PLANS_KEPT = 16
"""Plans remembered: a job's attempts come back to the same few world sizes."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of the state as one rank sees it.

    boxes          the rank's local pieces; none, or boxes without elements, where it holds nothing
    replica        index of this rank among the `replica_count` ranks that hold these same boxes (0 when it is alone)
    holders        those ranks in order of replica; optional, for better balance where they are not all ranks
    whole          written by replica 0 alone: the ranks' values may differ, and must not be mixed
    same_as        name of another leaf of this rank, with equal boxes and replicas, that has the same bytes
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    replica: int = 0
    replica_count: int = 1
    holders: tuple[int, ...] = ()
    whole: bool = False
    same_as: str = ""


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What one rank writes: the boxes of its part with their places, in order of place, and the length of its stream in
    bytes. Boxes of tied tensors share a place."""

    shards: tuple[Shard, ...]
    size: int


def whole(name: str, dtype: str, shape: tuple[int, ...]) -> Box:
    """The box that covers a tensor."""
    return Box(name, dtype, shape, (0,) * len(shape), shape)


def replicated(name: str, dtype: str, shape: tuple[int, ...], *, rank: int, world: int) -> Leaf:
    """A tensor that every rank holds whole."""
    return Leaf(name, dtype, shape, (whole(name, dtype, shape),), rank, world)


def plan_save(leaves: Iterable[Leaf], *, rank: int, world: int) -> SavePlan:
    """The boxes that `rank` of `world` writes. Over all ranks they cover each tensor exactly once.

    A tensor without elements is written, as an empty box, by the first of its replicas, so that its name is known.
    The same leaves give the very same plan, without planning anew. Raises ValueError for a leaf that does not fit.
    """
    return _plan(tuple(leaves), rank, world)


@functools.lru_cache(PLANS_KEPT)
def _plan(leaves: tuple[Leaf, ...], rank: int, world: int) -> SavePlan:
    ordered = sorted(leaves, key=lambda leaf: leaf.name)
    for leaf in ordered:
        _check(leaf, rank, world)
    groups: dict[tuple[int, ...] | str, list[Leaf]] = {}
    for leaf in ordered:
        if not leaf.same_as:
            groups.setdefault(_group(leaf, world), []).append(leaf)
    pieces = [piece for group in groups.values() for piece in _own_pieces(group)]
    plan = _lay_out(sorted(pieces))
    tied = [leaf for leaf in ordered if leaf.same_as]
    return replace(plan, shards=_with_tied(plan.shards, tied, ordered)) if tied else plan


def _check(leaf: Leaf, rank: int, world: int) -> None:
    if not 0 <= leaf.replica < leaf.replica_count <= world:
        raise ValueError(f"{leaf.name}: replica {leaf.replica} of {leaf.replica_count} does not fit {world} ranks")
    if leaf.holders and (len(leaf.holders) != leaf.replica_count or leaf.holders[leaf.replica] != rank):
        raise ValueError(f"{leaf.name}: rank {rank} is not replica {leaf.replica} of {leaf.holders}")
    if leaf.dtype not in DTYPE_BYTES:
        raise ValueError(f"{leaf.name}: unknown dtype {leaf.dtype}")


def _with_tied(shards: tuple[Shard, ...], tied: Iterable[Leaf], leaves: Iterable[Leaf]) -> tuple[Shard, ...]:
    """The shards and, at the same places, those of the leaves that have the same bytes."""
    known = {leaf.name: leaf for leaf in leaves}
    placed: dict[str, list[Shard]] = {}
    for shard in shards:
        placed.setdefault(shard.box.name, []).append(shard)
    found = list(shards)
    for leaf in tied:
        first = known.get(leaf.same_as)
        if first is None or first.same_as or _layout(first) != _layout(leaf):
            raise ValueError(f"{leaf.name}: {leaf.same_as} cannot have the same bytes")
        found += [Shard(replace(shard.box, name=leaf.name), shard.at) for shard in placed.get(first.name, ())]
    return tuple(sorted(found, key=lambda shard: shard.at))


def _layout(leaf: Leaf) -> tuple[object, ...]:
    boxes = tuple((box.offsets, box.lengths) for box in leaf.boxes)
    return leaf.dtype, leaf.global_shape, boxes, leaf.replica, leaf.replica_count, leaf.whole


def _group(leaf: Leaf, world: int) -> tuple[int, ...] | str:
    """What leaves that are laid out together have in common."""
    if leaf.replica_count in (1, world):
        return (leaf.replica_count,)
    return (leaf.replica_count, *leaf.holders) if leaf.holders else leaf.name


def _own_pieces(group: Sequence[Leaf]) -> Iterator[Box]:
    """This rank's share of the boxes of one set of replicas: those written whole first, then in order of name."""
    ordered = sorted(group, key=lambda leaf: not leaf.whole)
    total = sum(box.size for leaf in ordered for box in leaf.boxes)
    fixed = sum(box.size for leaf in ordered if leaf.whole for box in leaf.boxes)
    start = 0
    for leaf in ordered:
        first, last = _share(total, fixed, leaf.replica, leaf.replica_count)
        grain = max(total // (leaf.replica_count * GRAINS_PER_SHARE), GRAIN_BYTES)
        for box in leaf.boxes:
            if box.size:
                yield from [box] * (leaf.replica == 0) if leaf.whole else _cut(box, first - start, last - start, grain)
            elif 0 in leaf.global_shape and leaf.replica == 0:
                yield box
            start += box.size


def _share(total: int, fixed: int, index: int, count: int) -> tuple[int, int]:
    """The bytes of `total` that replica `index` takes, when replica 0 takes the `fixed` first ones in any case."""
    head = total if count == 1 else max(fixed, total // count)
    if index == 0:
        return 0, head
    rest = total - head
    return head + (index - 1) * rest // (count - 1), head + index * rest // (count - 1)


def _cut(box: Box, first: int, last: int, grain: int) -> Iterator[Box]:
    """Bytes [first, last) of a box as boxes, the ends moved to the nearest row of at most `grain` bytes."""
    dims = min(1, len(box.lengths))
    while (rows := math.prod(box.lengths[:dims])) * grain < box.size and dims < len(box.lengths):
        dims += 1
    row = box.size // rows
    low, high = (min(max((offset + row // 2) // row, 0), rows) for offset in (first, last))
    yield from _rows(box, 0, dims, low, high)


def _rows(box: Box, dim: int, dims: int, first: int, last: int) -> Iterator[Box]:
    """Rows [first, last) of a box, counted over its dims [dim, dims), as few boxes as can be: whole indices of `dim` as
    one, what is left of an index before and after them by its inner dims."""
    if first >= last:
        return
    if dim == dims:
        yield box
        return
    each = math.prod(box.lengths[dim + 1 : dims])
    low, high = -(-first // each), last // each
    if low > high:  # inside of one index
        yield from _rows(_narrow(box, dim, high, 1), dim + 1, dims, first - high * each, last - high * each)
        return
    if first < low * each:
        yield from _rows(_narrow(box, dim, low - 1, 1), dim + 1, dims, first - (low - 1) * each, each)
    if low < high:
        yield _narrow(box, dim, low, high - low)
    if high * each < last:
        yield from _rows(_narrow(box, dim, high, 1), dim + 1, dims, 0, last - high * each)


def _narrow(box: Box, dim: int, first: int, count: int) -> Box:
    offsets = (*box.offsets[:dim], box.offsets[dim] + first, *box.offsets[dim + 1 :])
    return replace(box, offsets=offsets, lengths=(*box.lengths[:dim], count, *box.lengths[dim + 1 :]))


def _lay_out(boxes: Iterable[Box]) -> SavePlan:
    """Large boxes first, so that the small ones lie side by side and share chunks."""
    shards: list[Shard] = []
    end, run = 0, None
    for box in sorted(boxes, key=lambda box: box.size < OWN_BYTES):
        at, run = place(end, run, box.size)
        shards.append(Shard(box, at))
        end = at + box.size
    return SavePlan(tuple(shards), end)
