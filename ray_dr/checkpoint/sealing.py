"""A staged stream becomes chunks: cut, hashed, named; what did not change since the rank's last part keeps its names.

A chunk's name is the BLAKE3 hash of its bytes. Beside it a fingerprint (XXH3, 128 bits, nearly three times as fast) is kept
in memory: the same fingerprint at the same place means the same bytes, hence the same name. It names nothing, and nobody
else ever sees it; it only tells whether this process's own data is still what it was. Different bytes pass as the same
once in 2^128 comparisons: a thousand million chunks compared every second for a hundred years come to 1e-20. Whoever could
choose a state's bytes so that they collide with the state before could as well choose what is trained.

It is taken only where it pays: of a chunk that is new, and of one that was found unchanged. One that has changed is hashed
only, and its name then tells whether it stands still again. So a state that changes everywhere at each step, as in dense
training, is fingerprinted at its first two saves and never again. A worker that has found with fingerprints of its own that
stretches of its part stay what they were (`train.staging`) says so (`same`), and these are not looked at here at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import xxhash
from blake3 import blake3

from ray_dr.checkpoint.cut import cut
from ray_dr.model.checkpoint import Chunk, Part, VersionId

PARTS_KEPT = 64
"""Ranks remembered: their numbers change when a job's size does, and a node has few. About 300 bytes per chunk."""

Same = tuple[VersionId, tuple[tuple[int, int], ...]] | None
"""What a worker knows of a part that it has staged: the version of the part before, and the stretches [first, last) of the
stream, in order, in which its bytes are those of that part."""

_Run = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Known:
    """A chunk as it was last seen; `fingerprint` is empty where it had changed."""

    id: str
    fingerprint: bytes


class Sealer:
    """Seals parts, and remembers the last one of each rank. One `seal` at a time."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[VersionId, dict[_Run, _Known]]] = {}

    def seal(
        self, part: Part, stream: memoryview, pool: Executor | None = None, *, same: Same = None
    ) -> Iterator[tuple[Chunk, memoryview]]:
        """The chunks of a part whose bytes are `stream`, in order, each with its bytes, as soon as its name is known.

        pool   hashes several chunks at a time
        same   chunks in there are not looked at, if the part before is the one that is meant
        """
        (version, before), now = self._seen.get(part.rank, (None, {})), dict[_Run, _Known]()
        runs = cut(part.shards, part.size)
        kept = set(_inside(runs, same[1])) if same is not None and same[0] == version else set()

        def known(run: _Run) -> _Known:
            if run in kept and run in before:
                return before[run]
            return _name(stream[run[0] : run[0] + run[1]], before.get(run))

        for run, found in zip(runs, (pool.map if pool else map)(known, runs), strict=True):
            now[run] = found
            yield Chunk(found.id, *run), stream[run[0] : run[0] + run[1]]
        self._seen.pop(part.rank, None)
        self._seen[part.rank] = part.version, now
        if len(self._seen) > PARTS_KEPT:
            del self._seen[next(iter(self._seen))]


def _inside(runs: Iterable[_Run], stretches: Iterable[tuple[int, int]]) -> Iterator[_Run]:
    """The runs, in order, that lie in one of the stretches."""
    left = iter(stretches)
    first, last = next(left, (0, 0))
    for at, size in runs:
        while last <= at and (following := next(left, None)) is not None:
            first, last = following
        if first <= at and at + size <= last:
            yield at, size


def _name(piece: memoryview, before: _Known | None) -> _Known:
    if before is not None and before.fingerprint and xxhash.xxh3_128_digest(piece) == before.fingerprint:
        return before
    name = blake3(piece, max_threads=1).hexdigest()
    changed = before is not None and name != before.id
    return _Known(name, b"" if changed else xxhash.xxh3_128_digest(piece))
