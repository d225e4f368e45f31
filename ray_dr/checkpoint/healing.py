"""After a restore: a copy of a chunk that turned out damaged or missing gets the bytes that another copy gave.

The ranks tell their agent what they met; it repairs in the background, one chunk at a time, each once however many ranks
met it. Ranks of other nodes may have met the same, so a copy is looked at again before it is written: a repaired one is
left alone, and writing it twice would do no harm, since a chunk's name says what its bytes are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray_dr.checkpoint.copies import Copies, Copy, HeldCopy, locate
from ray_dr.checkpoint.reader import MemorySource, Source
from ray_dr.checkpoint.shared_source import SharedSource
from ray_dr.errors import CorruptChunk, NotFound, ObjectTooShort, RayDrError
from ray_dr.model import codec
from ray_dr.model.checkpoint import Chunk, VersionId
from ray_dr.stores.base import Store
from ray_dr.stores.wire import Header

WAITING_MAX = 10_000
"""Damages that wait to be repaired; a store that lost more is no case for this."""

DAMAGED = (CorruptChunk, NotFound, ObjectTooShort)


class Damages:
    """What one rank's restore met; `add` is for `reader.read_state`. Thread-safe.

    agent   address of the agent whose memory a MemorySource is
    """

    def __init__(self, agent: str, version: VersionId) -> None:
        self._agent, self._version = agent, version
        self._found: dict[tuple[Copy, Chunk], Header] = {}
        self._lock = threading.Lock()

    def add(self, source: Source, rank: int, chunk: Chunk) -> None:
        """This source's copy of the chunk is damaged or missing."""
        bad = self._locate(source, rank, chunk)
        if bad is None:
            return
        with self._lock:
            self._found[bad, chunk] = {
                "rank_of_part": rank, "chunk": codec.to_json(chunk), "bad": codec.to_json(bad, tagged=True),
                "source": source.name,
            }  # fmt: skip

    def described(self, sources: Mapping[int, Sequence[Source]]) -> list[Header]:
        """Each damage with the other copies of the chunk, for the agent. Empty: all was well."""
        with self._lock:
            found = dict(self._found)
        out = []
        for (bad, chunk), header in found.items():
            rank = header["rank_of_part"]
            copies = (self._locate(source, rank, chunk) for source in sources.get(rank, ()))
            good = [copy for copy in copies if copy is not None and copy != bad and (copy, chunk) not in found]
            out.append({**header, "good": [codec.to_json(copy, tagged=True) for copy in good]})
        return out

    def _locate(self, source: Source, rank: int, chunk: Chunk) -> Copy | None:
        inner = source.inner if isinstance(source, SharedSource) else source
        if isinstance(inner, MemorySource):
            return HeldCopy(self._agent, self._version, rank)
        return locate(inner, chunk)


class Healer:
    """Repairs in a thread that ends when there is nothing left. Thread-safe. `note(name, fields)` hears of each repair
    and of each that failed."""

    def __init__(self, token: bytes, stores: Iterable[Callable[[], Store]], note: Callable[[str, dict[str, Any]], None]) -> None:
        self._token, self._stores, self._note = token, tuple(stores), note
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, Header]] = deque()
        self._known: set[tuple[str, str]] = set()
        self._running = self._closed = False

    def submit(self, rank: int, damages: Sequence[Header]) -> None:
        """Repair what a rank met; returns at once. What another rank told already is done once."""
        with self._lock:
            for damage in damages[: max(0, WAITING_MAX - len(self._waiting))]:
                key = (str(damage["bad"]), str(damage["chunk"]["id"]))
                if key not in self._known and not self._closed:
                    self._known.add(key)
                    self._waiting.append((rank, damage))
            if self._waiting and not self._running:
                self._running = True
                threading.Thread(target=self._run, name="healer", daemon=True).start()

    def close(self) -> None:
        """Begin no further repair."""
        with self._lock:
            self._closed = True
            self._waiting.clear()

    def _run(self) -> None:
        copies = Copies(self._token, self._stores)
        try:
            while (task := self._next()) is not None:
                self._try(copies, *task)
        finally:
            copies.close()

    def _next(self) -> tuple[int, Header] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._known.clear()
            self._running = False
            return None

    def _try(self, copies: Copies, rank: int, damage: Header) -> None:
        fields = {"chunk": damage["chunk"]["id"], "source": damage["source"], "rank": rank}
        try:
            if _heal(copies, damage):
                self._note("chunk.healed", fields)
        except Exception as error:  # the restore is through: a repair that fails is news, no failure
            self._note("chunk.not_healed", {**fields, "error": str(error) or repr(error)})


def _heal(copies: Copies, damage: Header) -> bool:
    """Repair one copy, and read it back; False when it is good already. Raises the last error when that can't be."""
    chunk = codec.from_json(Chunk, damage["chunk"])
    bad, *good = (codec.from_json(Copy, copy) for copy in (damage["bad"], *damage["good"]))
    buffer = memoryview(bytearray(chunk.size))
    try:
        copies.read(bad, chunk, buffer)
        return False
    except DAMAGED:
        pass
    failure: RayDrError = NotFound("no other copy that this node's agent could read")
    for copy in good:
        try:
            copies.read(copy, chunk, buffer)
            break
        except RayDrError as error:
            failure = error
    else:
        raise failure
    copies.mend(bad, chunk, buffer)
    copies.read(bad, chunk, buffer)
    return True
