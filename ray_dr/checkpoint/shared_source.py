"""The worker's side of `shared_fetch`: sources that ask the node's agent for what other ranks of the node want too.

What the agent lends was hashed by it where it lies, and only the agent can write there: a worker maps it to read. So
it is copied straight to its places, and not hashed once more by each rank.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ray_dr.checkpoint.copies import Copy, locate
from ray_dr.checkpoint.memory import attach
from ray_dr.checkpoint.reader import Kind, Source
from ray_dr.checkpoint.restore_plan import needed_chunks, plan_restore
from ray_dr.errors import CorruptChunk, NotFound, ObjectTooShort, StoreError
from ray_dr.model import codec
from ray_dr.model.checkpoint import Box, Chunk, Part
from ray_dr.stores.wire import Connection, Header, connect

ANSWER_S = 120.0
"""An agent that is silent for so long is asked no more: the rank reads for itself then."""


class Sharing:
    """One rank's part in a restore by `of` ranks of its node, the `local`-th of them. `restore` names it, the same for
    all of them. Thread-safe; used as a context."""

    def __init__(self, agent: str, token: bytes, *, restore: str, local: int, of: int) -> None:
        self._agent, self._token = agent, token
        self._restore, self._local, self._of = restore, local, of
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self._places: list[memoryview] = []
        self._lock = threading.Lock()
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._open: list[Connection] = []
        self._silent = of < 2
        self._saved: Counter[str] = Counter()

    def __enter__(self) -> Sharing:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._silent = True
            for connection in self._open:
                connection.close()
            self._places = []

    def join(
        self, parts: Sequence[Part], boxes: Iterable[Box], sources: Mapping[int, Sequence[Source]]
    ) -> dict[int, tuple[Source, ...]]:
        """The sources as this rank is to read its boxes from. Waits for the other ranks' wishes if this one has any."""
        if not self._silent:
            afar = [part for part in parts if any(map(_afar, sources.get(part.rank, ())[:1]))]
            reads = plan_restore(parts, boxes) if afar else ()
            with contextlib.suppress(StoreError, OSError):
                self._wish([(part.rank, chunk) for part in afar for chunk in needed_chunks(part, reads)])
        if not self._chunks:
            return {rank: tuple(found) for rank, found in sources.items()}
        return {
            rank: tuple(SharedSource(source, self) if _afar(source) else source for source in found)
            for rank, found in sources.items()
        }

    def recount(self, counted: Mapping[str, int]) -> dict[str, int]:
        """Bytes per kind of source, those apart ("shared") that another rank of this node had fetched already."""
        found = {kind: size - self._saved[kind] for kind, size in counted.items()}
        return {kind: size for kind, size in {**found, "shared": self._saved.total()}.items() if size > 0}

    def chunk(self, rank: int, at: int) -> Chunk | None:
        """The chunk that begins there, if other ranks want it too."""
        return self._chunks.get((rank, at))

    @contextlib.contextmanager
    def lend(self, chunk: Chunk, copy: Copy, source: Source) -> Iterator[memoryview | None]:
        """The chunk where the agent holds it, verified, until the context ends. None: it can't be had there now. Raises what
        reading the source would."""
        taken = self._take(chunk, copy)
        if taken is None:
            yield None
            return
        connection, answer = taken
        if "place" in answer:
            if not answer["fetched"]:
                with self._lock:
                    self._saved[source.kind] += chunk.size
            yield self._places[answer["place"]][: chunk.size]
            with contextlib.suppress(StoreError):  # the end of a connection releases it as well
                connection.send({"op": "release"})
        self._idle.put(connection)
        if "failed" in answer:
            raise _error(answer, chunk, source)
        if "place" not in answer:
            yield None

    def _take(self, chunk: Chunk, copy: Copy) -> tuple[Connection, Header] | None:
        """The agent's answer and the connection it came over; None when it answers no more."""
        try:
            connection = self._borrow()
        except StoreError:
            self._silent = True
            return None
        try:
            answer, _ = connection.request({
                "op": "take", "restore": self._restore, "local": self._local, "chunk": codec.to_json(chunk),
                "copy": codec.to_json(copy, tagged=True),
            })  # fmt: skip
        except StoreError:
            connection.close()
            self._silent = True
            return None
        return connection, answer

    @property
    def silent(self) -> bool:
        """Whether the agent answers no more."""
        return self._silent

    def _wish(self, wanted: Sequence[tuple[int, Chunk]]) -> None:
        connection = self._connect()
        ids = b"".join(bytes.fromhex(chunk.id) for _, chunk in wanted)
        largest = max((chunk.size for _, chunk in wanted), default=0)
        hello = {"op": "share", "restore": self._restore, "local": self._local, "of": self._of, "largest": largest}
        if not wanted:
            connection.send(hello)  # so that the others don't wait for it
            return
        places, size = connection.request(hello, ids)
        shared = bytearray(size)
        connection.read_into(memoryview(shared))
        if places["path"]:
            whole, place = attach(places["path"], places["size"], populate=False, writable=False), places["place"]
            self._places = [whole[at : at + place] for at in range(0, len(whole), place)]
            self._chunks = {(rank, c.at): c for (rank, c), common in zip(wanted, shared, strict=True) if common}

    def _borrow(self) -> Connection:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        return self._connect()

    def _connect(self) -> Connection:
        connection = connect(self._agent, self._token)
        connection.timeout(ANSWER_S)
        with self._lock:
            self._open.append(connection)
        return connection


@dataclass(frozen=True, slots=True)
class SharedSource:
    """A source far away, read once for all ranks of the node where several want the same."""

    inner: Source
    sharing: Sharing

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def kind(self) -> Kind:
        return self.inner.kind

    def lend(self, rank: int, chunk: Chunk) -> contextlib.AbstractContextManager[memoryview | None]:
        """The chunk in memory of the agent, if others want it too: see `reader.Lending`."""
        copy = locate(self.inner, chunk) if self.sharing.chunk(rank, chunk.at) == chunk and not self.sharing.silent else None
        return self.sharing.lend(chunk, copy, self.inner) if copy is not None else contextlib.nullcontext()

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Fill `into` from the source itself."""
        self.inner.read(rank, start, into)


def _afar(source: Source) -> bool:
    """Whether it is worth asking once only: for all ranks of a node, and for its hashes."""
    return source.kind != "memory"


def _error(answer: Header, chunk: Chunk, source: Source) -> Exception:
    """What reading the source here would have raised."""
    name, what = str(answer["failed"]), str(answer["what"])
    if name == CorruptChunk.__name__:
        return CorruptChunk(chunk.id, source=source.name)
    kinds = {kind.__name__: kind for kind in (NotFound, ObjectTooShort)}
    return kinds.get(name, StoreError)(what)
