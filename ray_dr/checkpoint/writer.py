"""From a staged slot outwards: hash it, copy it to peers, put it in the durable places. Runs in the node agent.

One thread seals (BLAKE3 per chunk); every copy and every place takes each chunk as soon as its hash is known, in a thread of
its own, so that a slow store never holds up the copies in memory.

Places give way to training (`throttle`), sealing doesn't. What a place takes is throttled so that it takes less of it: it falls
behind, and leaves saves out. Each seal would still be done, and costs full cores the same work however long it takes (0.2 s
per GB); until it is through, though, no copy of the version is whole anywhere, and its slot is not free for the next. So what
sealing costs is bounded by how often it is done: the cadence counts all of its time as lost (`Pace.cost_s`), and would count
pauses as well.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from ray_dr.checkpoint.described import describe
from ray_dr.checkpoint.lane import ChunkStream, Lane, Load
from ray_dr.checkpoint.sealing import Same, Sealer
from ray_dr.checkpoint.throttle import Throttle
from ray_dr.checkpoint.uploads import Uploads
from ray_dr.checkpoint.vault import Holding, Vault
from ray_dr.errors import CheckpointError, NotFound, StoreError
from ray_dr.model.checkpoint import Chunk, Part, PartRef, VersionId
from ray_dr.model.journal import Noted, PartSaved, Record, Where
from ray_dr.stores.base import Store
from ray_dr.stores.wire import Connection, connect

PEER_S = 10.0
"""A peer that takes no byte for so long is given up: a node that vanished without a word must not hold up the saves."""
COPIES_MAX = 8

Places = Mapping[Where, tuple[str, int]]
"""Durable places that a part goes to, with the job's name and term there."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to do with a staged part. `part` has no chunks yet; `peers` are addresses of the agents that get copies. `forced`:
    the job waits for it, so that no place may be too busy for it, nor give way to training meanwhile. `same`: what the
    worker says of the part before."""

    holding: Holding
    part: Part
    staged_at: float
    stall_s: float
    peers: tuple[str, ...]
    to: Places
    forced: bool = False
    same: Same = None


class _Copy:
    """A part on its way to a peer, over a connection kept in `peers`. Does nothing after an error, which `error` then holds
    in words."""

    def __init__(self, peers: dict[str, Connection], address: str, token: bytes) -> None:
        self._peers, self._address, self._token = peers, address, token
        self.node = self.error = ""

    def begin(self, size: int) -> None:
        """Announce a part of `size` bytes."""
        self._try(lambda peer: peer.send({"op": "hold", "size": size}))

    def add(self, chunk: Chunk, piece: memoryview) -> None:
        """Send the next chunk."""
        self._try(lambda peer: peer.send({"id": chunk.id, "at": chunk.at}, piece))

    def end(self, part: Part) -> bool:
        """Whether the peer, whose node's name is then known, has verified all of it and holds it."""
        self._try(lambda peer: self._named(peer.request({"part": describe(part)})[0]))
        return not self.error

    def _named(self, answer: dict[str, Any]) -> None:
        self.node = str(answer["node"])

    def break_off(self) -> None:
        """There is no more to come: the peer forgets what it has."""
        if (connection := self._peers.pop(self._address, None)) is not None:
            connection.close()

    def _try(self, act: Callable[[Connection], object]) -> None:
        if self.error:
            return
        try:
            act(self._connection())
        except StoreError as error:
            self.error = str(error)
            self.break_off()

    def _connection(self) -> Connection:
        if self._address not in self._peers:
            self._peers[self._address] = connect(self._address, self._token)
            self._peers[self._address].timeout(PEER_S)
        return self._peers[self._address]


Report = Callable[[Record, PartRef | None], None]


class Writer:
    """Carries staged parts to peers and to durable places. `report` gets a record for every place reached.

    places   how to open the store of each place; the local disk has no commit log
    """

    def __init__(self, vault: Vault, places: Mapping[Where, Callable[[], Store]], token: bytes, report: Report, *,
                 throttle: Throttle | None = None, uploads: Uploads | None = None) -> None:  # fmt: skip
        self._vault, self._token, self._report = vault, token, report
        self._throttle, self._uploads = throttle or Throttle(), uploads or Uploads()
        self._peers: dict[str, Connection] = {}
        self._sealer = Sealer()
        self._sealing: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._busy = self._unsealed = 0
        self._idle = threading.Condition()
        self._copying = ThreadPoolExecutor(COPIES_MAX, thread_name_prefix="writer-copy")
        self._lanes = {where: self._lane(where, open_it) for where, open_it in places.items()}
        threading.Thread(target=self._seal_loop, name="writer-seal", daemon=True).start()

    def _lane(self, where: Where, open_it: Callable[[], Store]) -> Lane:
        return Lane(
            where, open_it, self._vault.node, logged=where is not Where.DISK, throttle=self._throttle,
            uploads=self._uploads if where is Where.STORE else Uploads(),
            report=self._report, note=self._note, done=self._through,
        )  # fmt: skip

    def submit(self, task: Task) -> None:
        """Take a staged part on; returns at once. The holding was staged with one reader, which ends here."""
        with self._idle:
            self._busy += 1
            self._unsealed += 1
        self._sealing.put(task)

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that was submitted is sealed (hashed, and copied to its peers or given up)."""
        with self._idle:
            return self._idle.wait_for(lambda: self._unsealed == 0, timeout_s)

    def store_again(self, version: VersionId, to: Places, orphans: Collection[int] = ()) -> int:
        """Put this node's own parts of a version into places once more, and its copies of those whose rank is an orphan; how
        many are on their way."""
        held = [each for each in self._vault.held() if each.version == version]
        own = sorted({each.rank for each in held if each.own or each.rank in orphans})
        return sum(self._store_again(version, rank, where, to[where]) for rank in own for where in to)

    def _store_again(self, version: VersionId, rank: int, where: Where, there: tuple[str, int]) -> bool:
        try:
            holding = self._vault.read(version, rank)
        except NotFound:
            return False  # overtaken in this very moment
        assert holding.part is not None
        chunks = ChunkStream(holding.part.chunks)
        taken = self._load(self._lanes[where].enqueue, Load(holding, holding.part, chunks, time.time(), *there, forced=True))
        self._vault.done(holding)
        return taken

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was submitted has arrived everywhere or was given up; False when time ran out."""
        with self._idle:
            return self._idle.wait_for(lambda: self._busy == 0, timeout_s)

    def close(self) -> None:
        """Stop the threads and close the connections to peers."""
        self._sealing.put(None)
        for lane in self._lanes.values():
            lane.close()
        for connection in tuple(self._peers.values()):
            connection.close()
        self._copying.shutdown(wait=False)

    def _seal_loop(self) -> None:
        while (task := self._sealing.get()) is not None:
            try:
                self._seal(task)
            except Exception as error:
                self._vault.abandon(task.holding)
                self._note("writer.failed", error=repr(error), step=task.part.version.step)
            self._vault.done(task.holding)
            with self._idle:
                self._unsealed -= 1
                self._busy -= 1
                self._idle.notify_all()

    def _seal(self, task: Task) -> None:
        """Hash the part; copies and places take its chunks meanwhile. Returns when the copies are through."""
        chunks = ChunkStream()
        for where, there in task.to.items():
            take = self._lanes[where].enqueue if task.forced else self._lanes[where].offer
            self._load(take, Load(task.holding, task.part, chunks, task.staged_at, *there, forced=task.forced))
        copies = [self._copying.submit(self._copy, task, chunks, address) for address in task.peers]
        try:
            sealed = []
            for chunk, _ in self._sealer.seal(task.part, task.holding.view, same=task.same):
                sealed.append(chunk)
                chunks.add(chunk)
            task.holding.part = replace(task.part, chunks=tuple(sealed))
            self._saved(task, Where.MEMORY, self._vault.node, task.stall_s)
            chunks.end()
        except BaseException:
            chunks.end(failed=True)
            raise
        finally:
            wait(copies)
        for copy in copies:
            copy.result()

    def _load(self, take: Callable[[Load], bool], load: Load) -> bool:
        """Hand a load to a lane, whose reader of the holding it then is."""
        self._vault.pin(load.holding)
        with self._idle:
            self._busy += 1
        taken = take(load)
        if not taken:
            self._through(load)
        return taken

    def _through(self, load: Load) -> None:
        self._vault.done(load.holding)
        with self._idle:
            self._busy -= 1
            self._idle.notify_all()

    def _copy(self, task: Task, chunks: ChunkStream, address: str) -> None:
        view = task.holding.view
        copy = _Copy(self._peers, address, self._token)
        copy.begin(len(view))
        try:
            for chunk in chunks:
                copy.add(chunk, view[chunk.at : chunk.at + chunk.size])
        except CheckpointError:
            copy.break_off()
            return
        assert task.holding.part is not None, "the stream ends after the part is sealed"
        if copy.end(task.holding.part):
            self._saved(task, Where.PEER, copy.node, 0.0, sent=len(view))
        else:
            self._note("peer.unreachable", peer=address, step=task.part.version.step, error=copy.error)

    def _saved(self, task: Task, where: Where, node: str, stall_s: float, sent: int = 0) -> None:
        now, part = time.time(), task.part
        record = PartSaved(
            now, part.version, part.rank, part.world, where, node, part.size,
            took_s=now - task.staged_at, stall_s=stall_s, sent=sent,
        )  # fmt: skip
        self._report(record, None)

    def _note(self, name: str, **fields: Any) -> None:
        self._report(Noted(time.time(), name, {"node": self._vault.node, **fields}), None)
