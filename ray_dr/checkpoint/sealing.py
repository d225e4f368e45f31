"""A staged stream becomes chunks: cut, hashed, named."""

from __future__ import annotations

from collections.abc import Iterator

from blake3 import blake3

from ray_dr.model.checkpoint import CHUNK_BYTES, Chunk, Part


def seal(part: Part, stream: memoryview) -> Iterator[tuple[Chunk, memoryview]]:
    """The chunks of a part whose bytes are `stream`, in order, each with its bytes, as soon as its name is known."""
    for at in range(0, part.size, CHUNK_BYTES):
        piece = stream[at : min(at + CHUNK_BYTES, part.size)]
        yield Chunk(blake3(piece, max_threads=1).hexdigest(), at, len(piece)), piece
