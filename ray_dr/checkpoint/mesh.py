"""Which box of a tensor a rank holds when the tensor is cut over the dimensions of a mesh.

A cut deals the indices that are left along one tensor dim to the ranks of one mesh dim: `ceil(n / size)` to each, the
last ones fewer or none. Cuts apply in the order of the mesh's dims. A cut with `splits` above 1 (FSDP2 around tensor
parallelism) deals each of so many equal stretches by itself, because the mesh dims behind it were cut first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """`dim` of the tensor over a mesh dim of `size` ranks, of which this one is number `coordinate`."""

    dim: int
    size: int
    coordinate: int
    splits: int = 1


def held(shape: Sequence[int], cuts: Sequence[Cut]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(offsets, lengths) of what the rank holds; None when its indices along a dim are not one stretch."""
    offsets, lengths = [0] * len(shape), list(shape)
    for dim in {cut.dim for cut in cuts}:
        runs: Runs = ((0, shape[dim]),) if shape[dim] else ()
        for cut in cuts:
            if cut.dim == dim:
                runs = joined(_dealt(runs, cut))
        if len(runs) > 1:
            return None
        first, last = runs[0] if runs else (0, 0)
        offsets[dim], lengths[dim] = first, last - first
    return tuple(offsets), tuple(lengths)


def _dealt(runs: Runs, cut: Cut) -> Runs:
    """What one rank gets of the indices in `runs`."""
    count = sum(last - first for first, last in runs)
    found: list[tuple[int, int]] = []
    for split in range(cut.splits):
        first, last = _chunk(count, cut.splits, split)
        low, high = _chunk(last - first, cut.size, cut.coordinate)
        found.extend(_slice(runs, first + low, first + high))
    return tuple(found)


def _chunk(count: int, parts: int, number: int) -> tuple[int, int]:
    each = -(-count // parts)
    return min(number * each, count), min((number + 1) * each, count)


def _slice(runs: Runs, first: int, last: int) -> Runs:
    """The indices at positions [first, last) of the runs laid end to end."""
    found: list[tuple[int, int]] = []
    at = 0
    for low, high in runs:
        begin, end = max(first - at, 0), min(last - at, high - low)
        if begin < end:
            found.append((low + begin, low + end))
        at += high - low
    return tuple(found)


def joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """Runs [first, last) in order, those that touch each other as one."""
    found: list[tuple[int, int]] = []
    for first, last in runs:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return tuple(found)
