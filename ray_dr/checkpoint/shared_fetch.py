"""The agent's side of a restore by several ranks of one node: what more than one of them wants is fetched once.

First every local rank says which chunks it wants from elsewhere, and is told which of these others want too: only those
come through here. A node of ranks that want different boxes thus reads as if this did not exist, and nobody but its own
process moves its bytes.

    share     restore, local, of, largest + ids      a rank's wishes; answered when the last local rank has told its own.
                                                     Open for as long as the rank reads: its end is the rank's end
    take      restore, local, chunk, copy            on a connection per reading thread: fetch the chunk from that copy
                                                     unless somebody did already, and say in which place it lies
    release                                          the place is read (the next take, or the connection's end, says so too)

Places are of one size, in one run of shared memory that every rank maps; each gets its memory when it is first used, and
ranks that read in step need few. A place is used again when nobody holds it and no rank is still to take it; a rank that
lags behind is waited for a little, then there are more places, and in the end it has to have its chunks fetched again.

Each chunk is hashed once per node: here, where it lies, when all of it has come and before anybody sees it. An error
reaches all who asked for that copy. The ranks map the places to read only, so what they copy is what was hashed: from then
until the last of them has released it, only this process could change it, and it does not.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ray_dr.checkpoint.copies import Copies, Copy
from ray_dr.checkpoint.memory import Pool, available_bytes
from ray_dr.errors import CorruptChunk, NotFound, ObjectTooShort
from ray_dr.model import codec
from ray_dr.model.checkpoint import Chunk
from ray_dr.stores.base import Store
from ray_dr.stores.wire import Connection, Header

POOL_BYTES = 256 * 2**20
"""At most so much memory for chunks on their way to the ranks."""
KEPT_BYTES = 128 * 2**20
"""So much of it is taken at once, and kept for the next restore; more when a fetch found no place for GROW_S. Fresh memory
costs as much time as a chunk's fetch and hash."""
GROW_S = 0.01
PAGE_BYTES = 4096
ID_BYTES = 32
GATHER_S = 5.0
"""The first rank waits so long for the last one's wishes: they all begin at about the same time."""
PATIENCE_S = 2.0
"""How long a fetch waits for a place that no rank is still to take, before it uses one that some rank is. A rank that
took nothing for so long is not waited for again."""

NOTHING_SHARED: Header = {"path": "", "size": 0, "place": 0}
LASTING = (CorruptChunk.__name__, NotFound.__name__, ObjectTooShort.__name__)
"""Errors that the next who asks for the same copy would meet as well."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What reading a copy raised: the name of its class, and its words."""

    name: str
    what: str


@dataclass(slots=True, eq=False)
class Place:
    """Room for one chunk. Nobody changes its bytes while it has holders."""

    index: int
    view: memoryview
    reserved: bool = False
    chunk: str = ""
    holders: int = 0
    used: int = 0


@dataclass(slots=True, eq=False)
class _Flight:
    """A chunk on its way here."""

    copy: Copy
    landed: threading.Event = field(default_factory=threading.Event)
    failure: Failure | None = None


class _Gathering:
    """One restore of the node's ranks. Thread-safe."""

    def __init__(self, of: int, copies: Copies, kept: list[Pool]) -> None:
        self._of, self._copies, self._kept = of, copies, kept
        self._changed = threading.Condition()
        self._wishes: dict[int, Counter[str]] = {}
        self._come: set[int] = set()
        self._largest = self._size = 0
        self._formed = False
        self._wanted: Counter[str] = Counter()
        self._pool: Pool | None = None
        self._places: list[Place] = []
        self._by_chunk: dict[str, Place] = {}
        self._flights: dict[str, _Flight] = {}
        self._failed: dict[tuple[str, Copy], Failure] = {}
        self._clock = itertools.count(1)
        self._took_at: dict[int, float] = {}

    # -- coming and going

    def come(self, local: int, ids: Sequence[str], largest: int) -> None:
        """A rank's wishes, one id for each time it will ask; the largest of these chunks has so many bytes."""
        with self._changed:
            self._come.add(local)
            self._largest = max(self._largest, largest)
            self._wishes[local] = Counter(() if self._formed else ids)
            self._changed.notify_all()

    def form(self) -> tuple[Header, frozenset[str]]:
        """Wait for the others' wishes, and say where the places are and which chunks come through them."""
        with self._changed:
            self._changed.wait_for(lambda: self._formed or len(self._come) >= self._of, GATHER_S)
            if not self._formed:
                self._formed = True
                self._make_places()
            if self._pool is None:
                return NOTHING_SHARED, frozenset()
            return {"path": self._pool.path, "size": self._pool.size, "place": self._size}, frozenset(self._wanted)

    def _make_places(self) -> None:
        ranks = Counter(itertools.chain.from_iterable(self._wishes.values()))
        shared = {chunk for chunk, count in ranks.items() if count > 1}
        self._size = place = max(1, -(-self._largest // PAGE_BYTES)) * PAGE_BYTES
        count = min(len(shared), POOL_BYTES // place)
        if not count or available_bytes() < count * place:
            return
        try:
            self._pool = pool = self._kept.pop() if self._kept else Pool.sparse(POOL_BYTES)
        except OSError:
            return  # no memory to spare: each rank reads for itself
        ready = pool.reserved // place
        self._places = [Place(i, pool.view[i * place : (i + 1) * place], i < ready) for i in range(count)]
        for wishes in self._wishes.values():
            for chunk in wishes.keys() - shared:
                del wishes[chunk]
            self._wanted.update(wishes)

    def leave(self, local: int) -> bool:
        """The rank takes nothing more. Whether nobody is left who could."""
        with self._changed:
            self._forget(local)
            self._wishes.pop(local, None)
            self._changed.notify_all()
            return not self._wishes and (self._formed or len(self._come) >= self._of)

    def deserted(self) -> bool:
        """Whether nobody who came is still here."""
        with self._changed:
            return not self._wishes

    def close(self, *, keep: bool = True) -> None:
        """Give the memory back, but for what the next restore is to find; who waits for a place gets none. Without `keep` all
        of it, with the last who has mapped it: ranks may still copy from it, though their connections are gone."""
        with self._changed:
            self._formed = True
            places, self._places, self._by_chunk = self._places, [], {}
            pool, self._pool = self._pool, None
            self._changed.notify_all()
        ready = len(list(itertools.takewhile(lambda pair: pair[1].reserved and pair[1].index == pair[0], enumerate(places))))
        if pool is not None and (not keep or self._flights or any(place.holders for place in places)):
            pool.close()  # with the last who still reads or fills it
        elif pool is not None:
            pool.keep(min(ready * self._size, KEPT_BYTES))
            self._kept.append(pool)
        self._copies.close()

    # -- chunks

    def take(self, local: int, chunk: Chunk, copy: Copy) -> tuple[Place, bool] | Failure | None:
        """A place that holds the chunk, and whether this call is what fetched it; `release` must follow. Or what reading
        the copy raised; or None: every place is being read."""
        waits = deque((GROW_S, PATIENCE_S))
        while True:
            with self._changed:
                if (found := self._by_chunk.get(chunk.id)) is not None:
                    return self._hold(found, local), False
                if (known := self._failed.get((chunk.id, copy))) is not None:
                    return known
                if (flight := self._flights.get(chunk.id)) is None:
                    if (place := self._vacant(len(waits))) is not None:
                        self._by_chunk.pop(place.chunk, None)
                        self._flights[chunk.id] = flight = _Flight(copy)
                        place.holders = 1
                        break
                    if not waits or not self._places:
                        return None
                    if not self._changed.wait_for(lambda: self._may_go_on(chunk, len(waits)), waits[0]):
                        waits.popleft()
                        if not waits:
                            self._forget_the_idle()
                    continue
            flight.landed.wait()
            if flight.failure is not None and flight.copy == copy:
                return flight.failure
        if not self._reserve(place):
            self._lacking(chunk, place, flight)
            return None
        flight.failure = self._fetch(chunk, copy, place)
        return self._landed(local, chunk, place, flight)

    def release(self, place: Place) -> None:
        """One holder less."""
        with self._changed:
            place.holders -= 1
            self._changed.notify_all()

    def _reserve(self, place: Place) -> bool:
        """Whether there is memory for a place that the caller alone holds."""
        if not place.reserved and (pool := self._pool) is not None:
            with contextlib.suppress(OSError):
                pool.reserve(place.index * self._size, self._size)
                place.reserved = True
        return place.reserved

    def _lacking(self, chunk: Chunk, place: Place, flight: _Flight) -> None:
        """No memory to spare: there is one place less."""
        with self._changed:
            self._places = [other for other in self._places if other is not place]
            self._land(chunk, flight)

    def _land(self, chunk: Chunk, flight: _Flight) -> None:
        del self._flights[chunk.id]
        flight.landed.set()
        self._changed.notify_all()

    def _fetch(self, chunk: Chunk, copy: Copy, place: Place) -> Failure | None:
        try:
            self._copies.read(copy, chunk, place.view[: chunk.size])
        except Exception as error:  # told to those who asked, in words: an exception would hold on to the place
            return Failure(type(error).__name__, str(error))
        return None

    def _landed(self, local: int, chunk: Chunk, place: Place, flight: _Flight) -> tuple[Place, bool] | Failure:
        with self._changed:
            place.holders, place.chunk = 0, ""
            self._land(chunk, flight)
            if flight.failure is not None:
                if flight.failure.name in LASTING:
                    self._failed[chunk.id, flight.copy] = flight.failure
                return flight.failure
            place.chunk = chunk.id
            self._by_chunk[chunk.id] = place
            return self._hold(place, local), True

    def _hold(self, place: Place, local: int) -> Place:
        place.holders += 1
        place.used = next(self._clock)
        self._took_at[local] = time.monotonic()
        if self._wishes.get(local, Counter())[place.chunk] > 0:
            self._wishes[local][place.chunk] -= 1
            self._wanted[place.chunk] -= 1
        return place

    def _forget_the_idle(self) -> None:
        for local in self._wishes:
            if time.monotonic() - self._took_at.get(local, 0.0) >= PATIENCE_S:
                self._forget(local)

    def _forget(self, local: int) -> None:
        """Wait for this rank no more; it may still take what is there."""
        if local in self._wishes:
            self._wanted.subtract(self._wishes[local])
            self._wishes[local] = Counter()

    def _may_go_on(self, chunk: Chunk, patience: int) -> bool:
        arrived = chunk.id in self._by_chunk or chunk.id in self._flights
        return arrived or not self._places or self._vacant(patience) is not None

    def _vacant(self, patience: int) -> Place | None:
        """A place to fetch into: the last used of those that no rank is still to take (the processor's cache may hold it);
        one without memory so far, if few have any or patience is below 2; without patience, any that nobody holds, the
        least recently used."""
        idle = [place for place in self._places if not place.holders]
        spare = [place for place in idle if self._wanted[place.chunk] <= 0]
        if ready := [place for place in spare if place.reserved]:
            return max(ready, key=lambda place: place.used)
        if spare and (patience < 2 or spare[0].index < max(1, KEPT_BYTES // self._size)):
            return spare[0]
        return min(idle, key=lambda place: place.used, default=None) if not patience else None


class SharedFetch:
    """Every restore of this node that is under way. Thread-safe."""

    def __init__(self, token: bytes, stores: Iterable[Callable[[], Store]]) -> None:
        self._token, self._stores = token, tuple(stores)
        self._lock = threading.Lock()
        self._under_way: dict[str, _Gathering] = {}
        self._over = ""
        self._kept: list[Pool] = []
        self._closed = False

    def serve(self, connection: Connection, header: Header, size: int) -> None:
        """All that comes over a connection which began with `share` or `take`."""
        if header["op"] == "share":
            self._serve_rank(connection, header, size)
        else:
            self._serve_thread(connection, header)

    def close(self) -> None:
        """Give all memory back."""
        with self._lock:
            self._closed = True
            under_way, self._under_way = tuple(self._under_way.values()), {}
        for gathering in under_way:
            gathering.close(keep=False)
        while self._kept:
            self._kept.pop().close()

    def _serve_rank(self, connection: Connection, header: Header, size: int) -> None:
        data = bytearray(size)
        connection.read_into(memoryview(data))
        ids = [data[at : at + ID_BYTES].hex() for at in range(0, size, ID_BYTES)]
        key, local = str(header["restore"]), int(header["local"])
        gathering = self._join(key, int(header["of"]))
        if gathering is None:
            connection.send(NOTHING_SHARED)
            return
        gathering.come(local, ids, int(header["largest"]))
        try:
            if ids:
                places, shared = gathering.form()
                connection.send(places, bytes(chunk in shared for chunk in ids) if shared else b"")
            while True:
                connection.receive()
        finally:
            if gathering.leave(local):
                self._end(key, gathering)

    def _join(self, key: str, of: int) -> _Gathering | None:
        """None: the others have gone already."""
        with self._lock:
            if key == self._over or self._closed:
                return None
            if key not in self._under_way:
                for old in [old for old, found in self._under_way.items() if found.deserted()]:
                    self._under_way.pop(old).close()  # some of its ranks never came
                self._under_way[key] = _Gathering(of, Copies(self._token, self._stores), self._kept)
            return self._under_way[key]

    def _end(self, key: str, gathering: _Gathering) -> None:
        with self._lock:
            if self._under_way.get(key) is gathering and gathering.deserted():
                del self._under_way[key]
                self._over = key
                gathering.close()

    def _serve_thread(self, connection: Connection, header: Header) -> None:
        gathering = self._under_way.get(str(header["restore"]))
        held: Place | None = None
        try:
            while True:
                if gathering is not None and held is not None:
                    gathering.release(held)
                    held = None
                if header["op"] == "take":
                    answer, held = _take(gathering, header)
                    connection.send(answer)
                header, _ = connection.receive()
        finally:
            if gathering is not None and held is not None:
                gathering.release(held)


def _take(gathering: _Gathering | None, header: Header) -> tuple[Header, Place | None]:
    if gathering is None:
        return {"full": True}, None
    chunk = codec.from_json(Chunk, header["chunk"])
    taken = gathering.take(int(header["local"]), chunk, codec.from_json(Copy, header["copy"]))
    match taken:
        case None:
            return {"full": True}, None
        case Failure(name, what):
            return {"failed": name, "what": what}, None
        case place, fetched:
            return {"place": place.index, "fetched": fetched}, place
