"""The worker's side of `shared_fetch`: sources that ask the node's agent for what other ranks of the node want too."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray_dr.checkpoint.copies import Copy, locate
from ray_dr.checkpoint.memory import attach, copy_into
from ray_dr.checkpoint.reader import TURN_CHUNKS, Kind, Source
from ray_dr.checkpoint.restore_plan import needed_chunks, plan_restore
from ray_dr.errors import CorruptChunk, NotFound, ObjectTooShort, StoreError
from ray_dr.model import codec
from ray_dr.model.checkpoint import Box, Chunk, Part
from ray_dr.stores.wire import Connection, Header, connect

AFAR = ("peer", "store")
"""Kinds of source that are worth asking once only; a node's own disk is read quickly enough by each rank."""
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
            afar = [part for part in parts if any(source.kind in AFAR for source in sources.get(part.rank, ())[:1])]
            reads = plan_restore(parts, boxes) if afar else ()
            with contextlib.suppress(StoreError, OSError):
                self._wish([(part.rank, chunk) for part in afar for chunk in needed_chunks(part, reads)])
        if not self._chunks:
            return {rank: tuple(found) for rank, found in sources.items()}
        return {
            rank: tuple(SharedSource(source, self) if source.kind in AFAR else source for source in found)
            for rank, found in sources.items()
        }

    @property
    def turn(self) -> tuple[int, int]:
        """For `reader.read_state`: ranks that share begin at different chunks, else each would wait for the same one. Only
        where a rank that is a whole run ahead still finds places: else ranks could wait for each other."""
        ample = len(self._places) >= min(2 * TURN_CHUNKS, len({chunk.id for chunk in self._chunks.values()}))
        return (self._local, self._of) if self._chunks and ample else (0, 1)

    def recount(self, counted: Mapping[str, int]) -> dict[str, int]:
        """Bytes per kind of source, those apart ("shared") that another rank of this node had fetched already."""
        found = {kind: size - self._saved[kind] for kind, size in counted.items()}
        return {kind: size for kind, size in {**found, "shared": self._saved.total()}.items() if size > 0}

    def chunk(self, rank: int, at: int) -> Chunk | None:
        """The chunk that begins there, if other ranks want it too."""
        return self._chunks.get((rank, at))

    def take(self, chunk: Chunk, copy: Copy, into: Sequence[memoryview], source: Source) -> bool:
        """Fill all of `into`, one after the other, with the chunk, through the agent. False: it can't be had there now.
        Raises what reading the source would."""
        try:
            connection = self._borrow()
        except StoreError:
            self._silent = True
            return False
        try:
            answer, _ = connection.request({
                "op": "take", "restore": self._restore, "local": self._local, "chunk": codec.to_json(chunk),
                "copy": codec.to_json(copy, tagged=True),
            })  # fmt: skip
            if "place" in answer:
                at = 0
                for view in into:
                    copy_into(view, self._places[answer["place"]][at : at + view.nbytes])
                    at += view.nbytes
                connection.send({"op": "release"})
        except StoreError:
            connection.close()
            self._silent = True
            return False
        self._idle.put(connection)
        if "failed" in answer:
            raise _error(answer, chunk, source)
        if "place" in answer and not answer["fetched"]:
            with self._lock:
                self._saved[source.kind] += chunk.size
        return "place" in answer

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
            whole, place = attach(places["path"], places["size"]), places["place"]
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

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Fill `into`: through the agent if it is a whole chunk that others want, else from the source itself."""
        chunk = self.sharing.chunk(rank, start)
        if chunk is not None and chunk.size == into.nbytes and not self.sharing.silent:
            copy = locate(self.inner, chunk)
            if copy is not None and self.sharing.take(chunk, copy, (into,), self.inner):
                return
        self.inner.read(rank, start, into)


def _error(answer: Header, chunk: Chunk, source: Source) -> Exception:
    """What reading the source here would have raised."""
    name, what = str(answer["failed"]), str(answer["what"])
    if name == CorruptChunk.__name__:
        return CorruptChunk(chunk.id, source=source.name)
    kinds = {kind.__name__: kind for kind in (NotFound, ObjectTooShort)}
    return kinds.get(name, StoreError)(what)
