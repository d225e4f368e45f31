"""Chunks: runs of bytes named by their BLAKE3 hash. What is read is always checked against its name."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from blake3 import blake3

from ray_dr.errors import CorruptChunk
from ray_dr.model.checkpoint import Chunk
from ray_dr.repository.layout import chunk_key
from ray_dr.stores.base import Buffer, Store

KNOWN_LIMIT = 2**16
"""Keys remembered: a save of 512 GiB in whole chunks, about 18 MB of memory."""
LISTS_LIMIT = 16
"""Part lists remembered: a node's ranks, each with the newest one."""


class KnownChunks:
    """Keys of chunks that this process saw arrive in a store, and what the part lists name that it put there; the least recently
    used are forgotten. Thread-safe."""

    def __init__(self, limit: int = KNOWN_LIMIT) -> None:
        self._limit = limit
        self._keys: OrderedDict[str, None] = OrderedDict()
        self._lists: OrderedDict[str, Mapping[str, str]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        with self._lock:
            if key not in self._keys:
                return False
            self._keys.move_to_end(key)
            return True

    def add(self, key: str) -> None:
        with self._lock:
            self._keys[key] = None
            self._keys.move_to_end(key)
            if len(self._keys) > self._limit:
                self._keys.popitem(last=False)

    def discard(self, key: str) -> None:
        """Forget a key: its copy turned out to be missing or bad, and shall be sent again."""
        with self._lock:
            self._keys.pop(key, None)

    def wrote_list(self, digest: str, chunks: Iterable[Chunk]) -> None:
        """Remember what the part list of this hash names."""
        with self._lock:
            self._lists[digest] = folders(chunks)
            self._lists.move_to_end(digest)
            if len(self._lists) > LISTS_LIMIT:
                self._lists.popitem(last=False)

    def named_by(self, digest: str) -> Mapping[str, str] | None:
        """Id -> folder of the chunks that the part list of this hash names, if it is remembered."""
        with self._lock:
            return self._lists.get(digest)


def folders(chunks: Iterable[Chunk]) -> dict[str, str]:
    """Id -> folder of chunks."""
    return {chunk.id: chunk.folder for chunk in chunks}


def chunk_id(data: Buffer) -> str:
    """Hex BLAKE3 of the bytes: the chunk's name."""
    return str(blake3(data).hexdigest())


def put_chunk(store: Store, job: str, chunk: Chunk, data: Buffer, *, known: KnownChunks) -> bool:
    """Store a chunk whose id the caller has computed. False: this save had put it already, nothing was sent.

    The put is unconditional: same name, same bytes; and a copy that was damaged is thereby repaired.
    """
    key = chunk_key(job, chunk)
    if key in known:
        return False
    store.put(key, data)
    known.add(key)
    return True


def get_chunk(store: Store, job: str, chunk: Chunk) -> bytes:
    """A chunk's bytes, verified. Raises NotFound; CorruptChunk when they do not match the id."""
    data = store.get(chunk_key(job, chunk))
    if chunk_id(data) != chunk.id:
        raise CorruptChunk(chunk.id, source=f"{store.url}/{chunk_key(job, chunk)}")
    return data
