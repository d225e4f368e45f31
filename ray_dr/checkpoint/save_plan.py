"""Which rank writes which bytes of a checkpoint.

Every rank gives the same description of the state, seen from its own place, and finds its share without a word to the
others. A box held by one rank is written by that rank. A box held by n ranks (its *replicas*) is cut along dim 0, so
that each replica writes about one n-th: all boxes of the same replicas are laid out one after the other in order of
name, replica i takes bytes [i*T/n, (i+1)*T/n) of their T bytes, and each cut moves to the nearest whole row.

Two tensors may be laid out together only where the same ranks hold both: otherwise the replicas of one would not agree
on T. That is known where all ranks hold them, or where the leaf names its holders; any other tensor is cut by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ray_dr.model.checkpoint import DTYPE_BYTES, Box, Shard, align


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of the state as one rank sees it.

    boxes          the rank's local pieces; none, or boxes without elements, where it holds nothing
    replica        index of this rank among the `replica_count` ranks that hold these same boxes (0 when it is alone)
    holders        those ranks in order of replica; optional, for better balance where they are not all ranks
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    replica: int = 0
    replica_count: int = 1
    holders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What one rank writes: the boxes of its part with their places, and the length of its stream in bytes."""

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
    Raises ValueError for a leaf that does not fit the world.
    """
    ordered = sorted(leaves, key=lambda leaf: leaf.name)
    for leaf in ordered:
        _check(leaf, rank, world)
    groups: dict[tuple[int, ...] | str, list[Leaf]] = {}
    for leaf in ordered:
        groups.setdefault(_group(leaf, world), []).append(leaf)
    pieces = [piece for group in groups.values() for piece in _own_pieces(group)]
    return _lay_out(sorted(pieces))


def row_bytes(box: Box) -> tuple[int, int]:
    """(rows, bytes per row) of a box along dim 0; a 0-d box is one row."""
    rows = box.lengths[0] if box.lengths else 1
    return rows, (box.size // rows if rows else 0)


def _check(leaf: Leaf, rank: int, world: int) -> None:
    if not 0 <= leaf.replica < leaf.replica_count <= world:
        raise ValueError(f"{leaf.name}: replica {leaf.replica} of {leaf.replica_count} does not fit {world} ranks")
    if leaf.holders and (len(leaf.holders) != leaf.replica_count or leaf.holders[leaf.replica] != rank):
        raise ValueError(f"{leaf.name}: rank {rank} is not replica {leaf.replica} of {leaf.holders}")
    if leaf.dtype not in DTYPE_BYTES:
        raise ValueError(f"{leaf.name}: unknown dtype {leaf.dtype}")


def _group(leaf: Leaf, world: int) -> tuple[int, ...] | str:
    """What leaves that are laid out together have in common."""
    if leaf.replica_count in (1, world):
        return (leaf.replica_count,)
    return (leaf.replica_count, *leaf.holders) if leaf.holders else leaf.name


def _own_pieces(group: Sequence[Leaf]) -> Iterator[Box]:
    """This rank's share of the boxes of one set of replicas, in order of name."""
    total = sum(box.size for leaf in group for box in leaf.boxes)
    start = 0
    for leaf in group:
        first, last = _share(total, leaf.replica, leaf.replica_count)
        for box in leaf.boxes:
            if box.size:
                yield from _rows(box, _nearest_row(box, first - start), _nearest_row(box, last - start))
            elif 0 in leaf.global_shape and leaf.replica == 0:
                yield box
            start += box.size


def _share(total: int, index: int, count: int) -> tuple[int, int]:
    return index * total // count, (index + 1) * total // count


def _nearest_row(box: Box, offset: int) -> int:
    """The row boundary of `box` nearest to a byte offset, which may lie outside of it."""
    rows, size = row_bytes(box)
    return min(max((offset + size // 2) // size, 0), rows)


def _rows(box: Box, first: int, last: int) -> Iterator[Box]:
    """Rows [first, last) of a box, as a box; nothing when there are none."""
    if first >= last:
        return
    if not box.lengths:
        yield box
        return
    offsets = (box.offsets[0] + first, *box.offsets[1:])
    yield dataclasses.replace(box, offsets=offsets, lengths=(last - first, *box.lengths[1:]))


def _lay_out(boxes: Iterable[Box]) -> SavePlan:
    shards = []
    end = 0
    for box in boxes:
        shards.append(Shard(box, align(end)))
        end = align(end) + box.size
    return SavePlan(tuple(shards), end)
