"""One copy of a chunk, named so that another process can read it: in an agent's memory, or in a store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from ray_dr.checkpoint.listed import ListedSource
from ray_dr.checkpoint.reader import Source, StoreSource
from ray_dr.errors import CorruptChunk, StoreError
from ray_dr.model.checkpoint import Chunk, VersionId
from ray_dr.repository.layout import chunk_key
from ray_dr.stores.base import Store
from ray_dr.stores.peer import PeerReader, PeerSource


@dataclass(frozen=True, slots=True)
class HeldCopy:
    """In the memory of the agent at `address`, as a run of rank's part."""

    address: str
    version: VersionId
    rank: int


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """An object of the store that calls itself `url`."""

    url: str
    key: str


Copy = HeldCopy | StoredCopy


def locate(source: Source, chunk: Chunk) -> Copy | None:
    """Where a source has a chunk; None when no other process could be told, or the source names no such chunk."""
    if isinstance(source, ListedSource):
        try:
            source = source.opened()
        except StoreError:
            return None
    if isinstance(source, PeerSource):
        return HeldCopy(source.reader.address, source.version, source.rank)
    if isinstance(source, StoreSource):
        stored = source.chunk_at(chunk.at)
        if stored is not None and (stored.id, stored.size) == (chunk.id, chunk.size):
            return StoredCopy(source.store.url, chunk_key(source.job, stored))
    return None


class Copies:
    """Reads copies, with connections to agents that are opened once each. Thread-safe.

    stores   how to open those of this node's agent; one that can't be opened is not known
    """

    def __init__(self, token: bytes, stores: Iterable[Callable[[], Store]]) -> None:
        self._token, self._openers = token, tuple(stores)
        self._stores: dict[str, Store] = {}
        self._peers: dict[str, PeerReader] = {}
        self._lock = threading.Lock()

    def read(self, copy: Copy, chunk: Chunk, into: memoryview) -> None:
        """Fill `into` (chunk.size bytes) with the chunk, verified. Raises CorruptChunk, StoreError."""
        if isinstance(copy, HeldCopy):
            self._peer(copy.address).read(copy.version, copy.rank, chunk.at, (into,))
        else:
            self._store(copy.url).readinto(copy.key, into)
        if blake3(into, max_threads=1).hexdigest() != chunk.id:
            raise CorruptChunk(chunk.id, source=_name(copy))

    def mend(self, copy: Copy, chunk: Chunk, data: memoryview) -> None:
        """Write the chunk's bytes, which are known to be good, over a damaged or missing copy. Raises StoreError."""
        if isinstance(copy, HeldCopy):
            self._peer(copy.address).mend(copy.version, copy.rank, chunk, data)
        else:
            self._store(copy.url).put(copy.key, data)

    def close(self) -> None:
        """End the connections."""
        with self._lock:
            for peer in self._peers.values():
                peer.close()

    def _peer(self, address: str) -> PeerReader:
        with self._lock:
            if address not in self._peers:
                self._peers[address] = PeerReader(address, self._token)
            return self._peers[address]

    def _store(self, url: str) -> Store:
        if url not in self._stores:
            for open_it in self._openers:
                with suppress(StoreError):
                    store = open_it()
                    self._stores.setdefault(store.url, store)
        if url not in self._stores:
            raise StoreError(f"this node's agent does not know the store {url}")
        return self._stores[url]


def _name(copy: Copy) -> str:
    return f"peer {copy.address}" if isinstance(copy, HeldCopy) else f"{copy.url}/{copy.key}"
