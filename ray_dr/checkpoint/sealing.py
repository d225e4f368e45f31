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

Small tensors are cut finely (`checkpoint.cut`), for the sake of those that change alone. Where all of a block's chunks have
changed, it becomes one chunk instead, so that many small tensors cost what few large ones do. What is in memory of a part
to tell so are its *traces*, eight bytes of each page (adding 1.0 may leave the first two of a float alone): those of a chunk
differ only if the chunk does. A block stays one chunk until something in it changes and something does not: then it is cut
finely again, and what of it had not changed is sent once more; so is what another process goes on from that has never seen
it change. What never changed is never joined, so that the chunks of frozen tensors keep the names that other saves and
jobs give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field

import xxhash
from blake3 import blake3

from ray_dr.checkpoint.cut import PAGE_BYTES, Block, Span, blocks, joined
from ray_dr.model.checkpoint import Chunk, Part, Shard, VersionId

PARTS_KEPT = 64
"""Ranks remembered: their numbers change when a job's size does, and a node has few. About 300 bytes per chunk."""

Same = tuple[VersionId, tuple[tuple[int, int], ...]] | None
"""What a worker knows of a part that it has staged: the version of the part before, and the stretches [first, last) of the
stream, in order, in which its bytes are those of that part."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A chunk as it was last seen; `fingerprint` is empty where it had changed."""

    id: str
    fingerprint: bytes


_CHANGED = _Known("", b"")
Named = tuple[Span, _Known]


@dataclass(slots=True)
class _Seen:
    """A rank's last part: how it was cut, its chunks, and the traces of those chunks that could be joined."""

    version: VersionId | None
    shards: tuple[Shard, ...]
    size: int
    blocks: tuple[Block, ...]
    chunks: dict[Span, _Known] = field(default_factory=dict)
    traces: dict[Span, bytes] = field(default_factory=dict)


_NOTHING = _Seen(None, (), 0, ())


class Sealer:
    """Seals parts, and remembers the last one of each rank. One `seal` at a time."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def seal(
        self, part: Part, stream: memoryview, pool: Executor | None = None, *, same: Same = None
    ) -> Iterator[tuple[Chunk, memoryview]]:
        """The chunks of a part whose bytes are `stream`, in order, each with its bytes, as soon as its name is known.

        pool   hashes several chunks at a time
        same   chunks in there are not looked at, if the part before is the one that is meant
        """
        before = self._seen.get(part.rank, _NOTHING)
        known = before.shards is part.shards and before.size == part.size  # of a plan, and so by identity
        cut = before.blocks if known else blocks(part.shards, part.size)
        now = _Seen(part.version, part.shards, part.size, cut)
        kept = _kept(cut, same[1]) if same is not None and same[0] == before.version else frozenset[Span]()

        def named(block: Block) -> tuple[Named, ...]:
            return _name_block(block, stream, before, now, kept)

        for found in (pool.map if pool else map)(named, cut):
            for span, chunk in found:
                now.chunks[span] = chunk
                yield Chunk(chunk.id, *span), _piece(stream, span)
        self._seen.pop(part.rank, None)
        self._seen[part.rank] = now
        if len(self._seen) > PARTS_KEPT:
            del self._seen[next(iter(self._seen))]


def _kept(cut: Iterable[Block], stretches: tuple[tuple[int, int], ...]) -> frozenset[Span]:
    """The chunks that lie in one of the stretches, those that blocks would be among them."""
    cut = tuple(cut)
    spans = (span for block in cut for span in block)
    return frozenset(_inside(spans, stretches)).union(_inside(map(joined, cut), stretches))


def _inside(spans: Iterable[Span], stretches: Iterable[tuple[int, int]]) -> Iterator[Span]:
    """The spans, in order, that lie in one of the stretches."""
    left = iter(stretches)
    first, last = next(left, (0, 0))
    for at, size in spans:
        while last <= at and (following := next(left, None)) is not None:
            first, last = following
        if first <= at and at + size <= last:
            yield at, size


def _name_block(
    block: Block, stream: memoryview, before: _Seen, now: _Seen, kept: frozenset[Span]
) -> tuple[Named, ...]:
    """The chunks of a block: one, or those it is made of. Traces are added to `now`."""

    def name(span: Span) -> Named:
        old = before.chunks.get(span)
        return (span, old if old is not None and span in kept else _name(_piece(stream, span), old))

    if len(block) > 1:
        whole = joined(block)
        changed = [_trace(span, stream, before, now, kept) for span in block]
        if all(changed):
            return ((whole, _name(_piece(stream, whole), before.chunks.get(whole, _CHANGED))),)
        if not any(changed) and (old := before.chunks.get(whole)) is not None:
            found = name(whole)
            if found[1].id == old.id:
                return (found,)
    return tuple(map(name, block))


def _trace(span: Span, stream: memoryview, before: _Seen, now: _Seen, kept: frozenset[Span]) -> bool:
    """Whether a chunk is known to have changed."""
    old = before.traces.get(span)
    new = old if old is not None and span in kept else _words(_piece(stream, span))
    now.traces[span] = new
    return old is not None and old != new


def _words(piece: memoryview) -> bytes:
    """The first eight bytes of each page."""
    whole = len(piece) // 8 * 8
    return bytes(piece[:whole].cast("Q")[:: PAGE_BYTES // 8]) if whole else bytes(piece)


def _piece(stream: memoryview, span: Span) -> memoryview:
    return stream[span[0] : span[0] + span[1]]


def _name(piece: memoryview, before: _Known | None) -> _Known:
    if before is not None and before.fingerprint and xxhash.xxh3_128_digest(piece) == before.fingerprint:
        return before
    name = blake3(piece, max_threads=1).hexdigest()
    changed = before is not None and name != before.id
    return _Known(name, b"" if changed else xxhash.xxh3_128_digest(piece))
