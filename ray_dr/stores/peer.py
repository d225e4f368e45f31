"""Reading parts from another node agent's memory: a run of a part's stream per request, into the caller's memory."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ray_dr.errors import NotFound, StoreError
from ray_dr.model import codec
from ray_dr.model.checkpoint import Chunk, VersionId
from ray_dr.stores.wire import Connection, Header, connect

ANSWER_S = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part's stream of `size` bytes lies: `offset` bytes into the shared memory at `path`.

    good    place in the stream -> id of the chunks that the agent found good since it was told what is to be restored
    """

    path: str
    offset: int
    size: int
    good: dict[int, str]


class PeerReader:
    """Reads from one agent. Thread-safe: each concurrent request has a connection of its own, kept for the next."""

    def __init__(self, address: str, token: bytes) -> None:
        self.address, self._token = address, token
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._all: list[Connection] = []

    def part(self, version: VersionId, rank: int) -> Header:
        """The description of a part it holds, as `checkpoint.described` reads it. Raises NotFound."""
        header, _ = self._ask({"op": "part", "version": codec.to_json(version), "rank": rank}, ())
        return dict(header["part"])

    def place(self, version: VersionId, rank: int) -> Place | None:
        """What to map, for a process on the agent's own node; None when it lies in no shared memory. The answer waits until
        the agent has looked through it."""
        return self._place("place", version, rank)

    def where(self, version: VersionId, rank: int) -> Place | None:
        """As `place`, at once: what of it is good is not said."""
        return self._place("where", version, rank)

    def _place(self, ask: str, version: VersionId, rank: int) -> Place | None:
        header, _ = self._ask({"op": ask, "version": codec.to_json(version), "rank": rank}, ())
        if not header["path"]:
            return None
        good = {int(at): str(id) for at, id in header["good"]}
        return Place(str(header["path"]), int(header["offset"]), int(header["size"]), good)

    def source(self, version: VersionId, rank: int) -> PeerSource:
        """A source of this part's bytes."""
        return PeerSource(self, version, rank)

    def read(self, version: VersionId, rank: int, start: int, into: Sequence[memoryview]) -> None:
        """Fill all of `into`, one after the other, from the part's stream at `start`."""
        size = sum(len(view) for view in into)
        header = {"op": "read", "version": codec.to_json(version), "rank": rank, "start": start, "size": size}
        self._ask(header, into)

    def mend(self, version: VersionId, rank: int, chunk: Chunk, data: memoryview) -> None:
        """Give it a chunk of a part it holds once more; it checks the bytes. Raises NotFound."""
        header = {"op": "mend", "version": codec.to_json(version), "rank": rank, "chunk": codec.to_json(chunk)}
        self._ask(header, (), data)

    def close(self) -> None:
        for connection in self._all:
            connection.close()

    def _ask(
        self, header: Header, into: Sequence[memoryview], payload: memoryview | bytes = b""
    ) -> tuple[Header, int]:
        connection = self._borrow()
        try:
            answer, size = connection.request(header, payload)
            if size != header.get("size", 0):
                raise StoreError(f"{self.address} sent {size} bytes where {header.get('size', 0)} were asked for")
            for view in into:
                connection.read_into(view)
        except StoreError as error:
            connection.close()
            if "does not hold" in str(error):
                raise NotFound(str(error)) from error
            raise
        self._idle.put(connection)
        return answer, size

    def _borrow(self) -> Connection:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            connection = connect(self.address, self._token)
            connection.timeout(ANSWER_S)
            self._all.append(connection)
            return connection


@dataclass(frozen=True, slots=True)
class PeerSource:
    """One part in another agent's memory."""

    reader: PeerReader
    version: VersionId
    rank: int
    kind: Literal["memory", "peer", "store"] = "peer"

    @property
    def name(self) -> str:
        return f"peer {self.reader.address}"

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Fill `into` from the stream at `start`."""
        self.reader.read(self.version, rank, start, (into,))

    def read_each(self, rank: int, start: int, into: Sequence[memoryview]) -> None:
        """Fill all of `into`, one after the other, from the stream at `start`."""
        self.reader.read(self.version, rank, start, into)
