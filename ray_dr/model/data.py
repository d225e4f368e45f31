"""The job's one global order of samples, and who takes which of them.

The sample stream has positions 0, 1, 2, ...; position p is sample `permute(p % n)` of epoch `p // n`. A step always
takes the next `global_batch` positions, at any world size: so the position after a step is one integer, and nothing
depends on how many ranks there were.

Windows of the stream can be *left out*, because training went wrong on them. What is left is numbered through: *place* k is
the k-th position that no window holds. Steps, slices and seeds go by places, as if the windows had never been there; only
where a sample is looked up do places become positions. Without windows they are the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FEISTEL_ROUNDS = 6
TABLE_BITS = 12
"""Halves of up to this many bits have their rounds tabulated: 6 * 4096 numbers for 16 million samples."""


Windows = tuple[tuple[int, int], ...]
"""Half-open runs [first, last) of positions, in order, of which no two touch."""


def joined(windows: Iterable[tuple[int, int]]) -> Windows:
    """The windows as one: in order, empty ones left out, those that overlap or touch made one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(window for window in windows if window[0] < window[1]):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return tuple(found)


def position_of(place: int, windows: Windows) -> int:
    """Where in the stream a place is."""
    for first, last in windows:
        if place < first:
            break
        place += last - first
    return place


def leave_out(windows: Windows, first: int, last: int) -> Windows:
    """The windows when places [first, last), as they are with those, are left out as well."""
    if first >= last:
        return windows
    return joined((*windows, (position_of(first, windows), position_of(last - 1, windows) + 1)))


@dataclass(frozen=True, slots=True)
class Order:
    """A fixed pseudo-random order of `length` samples, a new one each epoch. `shuffle=False` is the identity. `left_out`: see
    above; a sample that is left out in one epoch comes again in the next, at its place there."""

    length: int
    seed: int
    shuffle: bool = True
    left_out: Windows = ()

    def index(self, place: int) -> int:
        """Dataset index of the sample at a place."""
        epoch, offset = divmod(position_of(place, self.left_out), self.length)
        return permute(offset, self.length, self.seed, epoch) if self.shuffle else offset

    def indices(self, first: int, last: int) -> list[int]:
        """Dataset indices of places [first, last): `index` of each, faster for up to 16 million samples."""
        found: list[int] = []
        for start, end in self._runs(first, last):
            found.extend(self._indices(start, end))
        return found

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Places [first, last) as runs of positions."""
        while first < last:
            start = position_of(first, self.left_out)
            ends = next((window[0] for window in self.left_out if window[0] > start), start + last - first)
            count = min(last - first, ends - start)
            yield start, start + count
            first += count

    def _indices(self, first: int, last: int) -> list[int]:
        found: list[int] = []
        while first < last:
            epoch, offset = divmod(first, self.length)
            count = min(last - first, self.length - offset)
            run = range(offset, offset + count)
            found.extend(_permuted(run, self.length, self.seed, epoch) if self.shuffle else run)
            first += count
        return found


@dataclass(frozen=True, slots=True)
class Slice:
    """Places [first, last) that one rank uses in one pass. `weight` is their share of the global batch (0..1);
    a pass with weight 0 is padding that keeps all ranks in the same number of collectives."""

    first: int
    last: int
    weight: float


def permute(offset: int, length: int, seed: int, epoch: int) -> int:
    """The image of `offset` under a permutation of range(length), one per (seed, epoch), without storing it.

    A balanced Feistel network over the next even power of two, walked until the image falls in range ("cycle walking").
    Source: J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = offset
    while True:
        left, right = value >> half, value & mask
        for round_ in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right, round_, seed, epoch) & mask)
        value = (left << half) | right
        if value < length:
            return value


def _permuted(offsets: Iterable[int], length: int, seed: int, epoch: int) -> list[int]:
    """`permute` of each offset. Up to 4**TABLE_BITS samples, the rounds are looked up; above, computed one by one."""
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    if half > TABLE_BITS:
        return [permute(offset, length, seed, epoch) for offset in offsets]
    mask = (1 << half) - 1
    t0, t1, t2, t3, t4, t5 = _round_tables(half, seed, epoch)
    found = []
    for value in offsets:
        while True:
            left, right = value >> half, value & mask
            left ^= t0[right]
            right ^= t1[left]
            left ^= t2[right]
            right ^= t3[left]
            left ^= t4[right]
            right ^= t5[left]
            value = (left << half) | right
            if value < length:
                break
        found.append(value)
    return found


@functools.lru_cache(maxsize=4)
def _round_tables(half: int, seed: int, epoch: int) -> tuple[tuple[int, ...], ...]:
    """What each round mixes in, for every half a value can have: some milliseconds of work, once per epoch."""
    mask = (1 << half) - 1
    rounds = range(FEISTEL_ROUNDS)
    return tuple(tuple(_mix(value, round_, seed, epoch) & mask for value in range(1 << half)) for round_ in rounds)


def share(step: int, *, global_batch: int, rank: int, world: int) -> Slice:
    """The run of step `step`'s positions (steps count from 0) that `rank` uses: sizes differ by at most one sample."""
    first = step * global_batch + rank * global_batch // world
    last = step * global_batch + (rank + 1) * global_batch // world
    return Slice(first, last, (last - first) / global_batch)


def micro_shares(step: int, *, global_batch: int, micro_batches: int, rank: int, world: int) -> tuple[Slice, ...]:
    """The micro-batches of a step that `rank` computes, one per round; round j, rank r takes micro-batch j * world + r.

    All ranks get the same number of rounds; a rank without a micro-batch in the last round repeats the step's last one
    with weight 0. The order (round, rank) is the micro-batch index at every world size: a sum in that order is
    the same sum for any number of ranks.
    """
    size = global_batch // micro_batches
    rounds = -(-micro_batches // world)
    slices = []
    for round_ in range(rounds):
        index = round_ * world + rank
        padded = index >= micro_batches
        first = step * global_batch + min(index, micro_batches - 1) * size
        slices.append(Slice(first, first + size, 0.0 if padded else 1 / micro_batches))
    return tuple(slices)


def digest(indices: Iterable[int]) -> str:
    """Hex BLAKE2b-8 of dataset indices, each as 8 bytes little-endian: the witness in the journal of what was used."""
    state = hashlib.blake2b(digest_size=8)
    for index in indices:
        state.update(index.to_bytes(8, "little"))
    return state.hexdigest()


def _mix(value: int, round_: int, seed: int, epoch: int) -> int:
    """A 64-bit hash of the round's input (splitmix64's finaliser; Steele, Lea, Flood, OOPSLA 2014)."""
    word = (value ^ _key(round_, seed, epoch)) % 2**64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def _key(round_: int, seed: int, epoch: int) -> int:
    """What a round mixes into its input: 64 bits."""
    return ((seed * 0x9E3779B97F4A7C15) ^ (epoch * 0xD1B54A32D192ED03) ^ (round_ * 0x8CB92BA72F3D8DD7)) % 2**64
