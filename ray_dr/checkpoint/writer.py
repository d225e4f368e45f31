"""From a staged slot outwards: hash it, copy it to a peer, put it in the store. Runs in the node agent.

One pass over the bytes seals them (BLAKE3 per chunk) and sends each chunk to the peer as soon as its hash is known; the
store follows in a thread of its own, so that a slow store never holds up the copies in memory.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ray_dr.checkpoint.described import describe
from ray_dr.checkpoint.sealing import seal
from ray_dr.checkpoint.vault import Holding, Vault
from ray_dr.errors import NotFound, StoreError
from ray_dr.model.checkpoint import Chunk, Part, PartRef, VersionId
from ray_dr.model.journal import Noted, PartSaved, Record, Where
from ray_dr.repository.chunks import KnownChunks
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.saving import save_part
from ray_dr.stores.base import Store
from ray_dr.stores.wire import Connection, connect

QUEUE_MAX = 1
"""Parts that wait for the store behind the one it is taking; only a final save lines up there."""
PUTS = 4
"""Chunks on their way to the store at a time: an fsync or a round trip of one is the time in which others are written."""
PEER_S = 10.0
"""A peer that takes no byte for so long is given up: a node that vanished without a word must not hold up the saves."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to do with a staged part. `part` has no chunks yet; `peer` is the copy's address or empty."""

    holding: Holding
    part: Part
    staged_at: float
    stall_s: float
    peer: str
    to_store: bool
    job: str
    term: int


class _Copy:
    """A part on its way to a peer, over a connection kept in `peers`. Does nothing for an empty address, nor after an
    error, which `error` then holds in words."""

    def __init__(self, peers: dict[str, Connection], address: str, token: bytes) -> None:
        self._peers, self._address, self._token = peers, address, token
        self._ready = bool(address)
        self.error = ""

    def begin(self, size: int) -> None:
        """Announce a part of `size` bytes."""
        self._try(lambda peer: peer.send({"op": "hold", "size": size}))

    def add(self, chunk: Chunk, piece: memoryview) -> None:
        """Send the next chunk."""
        self._try(lambda peer: peer.send({"id": chunk.id, "at": chunk.at}, piece))

    def end(self, part: Part) -> bool:
        """Whether the peer has verified all of it and holds it."""
        self._try(lambda peer: peer.request({"part": describe(part)}))
        return self._ready

    def _try(self, act: Callable[[Connection], object]) -> None:
        if not self._ready:
            return
        try:
            act(self._connection())
        except StoreError as error:
            self._ready, self.error = False, str(error)
            if (connection := self._peers.pop(self._address, None)) is not None:
                connection.close()

    def _connection(self) -> Connection:
        if self._address not in self._peers:
            self._peers[self._address] = connect(self._address, self._token)
            self._peers[self._address].timeout(PEER_S)
        return self._peers[self._address]


Report = Callable[[Record, PartRef | None], None]


class Writer:
    """Carries staged parts to peers and to the store. `report` gets a record for every place reached."""

    def __init__(self, vault: Vault, store: Store, token: bytes, report: Report) -> None:
        self._vault, self._store, self._token, self._report = vault, store, token, report
        self._known = KnownChunks()
        self._logs: dict[str, CommitLog] = {}
        self._peers: dict[str, Connection] = {}
        self._sealing: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._storing: queue.Queue[Task | None] = queue.Queue(QUEUE_MAX)
        self._busy = self._unsealed = self._bound_for_store = 0
        self._closing = False
        self._putting = ThreadPoolExecutor(PUTS, thread_name_prefix="writer-put")
        self._idle = threading.Condition()
        for name, loop in (("seal", self._seal_loop), ("store", self._store_loop)):
            threading.Thread(target=loop, name=f"writer-{name}", daemon=True).start()

    def submit(self, task: Task) -> None:
        """Take a staged part on; returns at once. The holding was staged with one reader, which ends here."""
        with self._idle:
            self._busy += 1
            self._unsealed += 1
        self._sealing.put(task)

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that was submitted is sealed (hashed, and copied to its peer or given up)."""
        with self._idle:
            return self._idle.wait_for(lambda: self._unsealed == 0, timeout_s)

    def store_again(self, version: VersionId, job: str, term: int) -> int:
        """Put this node's own parts of a version into the store once more; how many there are."""
        own = [held.rank for held in self._vault.held() if held.own and held.version == version]
        return sum(self._store_again(version, rank, job, term) for rank in own)

    def _store_again(self, version: VersionId, rank: int, job: str, term: int) -> bool:
        try:
            holding = self._vault.read(version, rank)
        except NotFound:
            return False  # overtaken in this very moment
        assert holding.part is not None
        task = Task(holding, holding.part, time.time(), 0.0, "", True, job, term)
        with self._idle:
            self._busy += 1
        if not self._enqueue(task):
            self._finish(task)
            return False
        return True

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was submitted has arrived everywhere or was given up; False when time ran out."""
        with self._idle:
            return self._idle.wait_for(lambda: self._busy == 0, timeout_s)

    def close(self) -> None:
        """Stop both threads and close the connections to peers."""
        self._sealing.put(None)
        self._closing = True
        self._putting.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(queue.Full):
            self._storing.put_nowait(None)  # when it is full, the thread sees `_closing` after its task
        for connection in tuple(self._peers.values()):
            connection.close()

    def _seal_loop(self) -> None:
        while (task := self._sealing.get()) is not None:
            try:
                sealed: Task | None = self._seal(task)
            except Exception as error:
                sealed = None
                self._vault.abandon(task.holding)
                self._note("writer.failed", error=repr(error), step=task.part.version.step)
            with self._idle:
                self._unsealed -= 1
                self._idle.notify_all()
            if sealed is None or not task.to_store or not self._offer(sealed):
                self._finish(task)

    def _offer(self, task: Task) -> bool:
        """Line up for the store when it is idle. A part that waits for a slow store holds a slot that copies in memory need, so
        a save that comes while another is on its way is given up: the next one catches up."""
        if self._bound_for_store:
            self._note("store.behind", step=task.part.version.step)
            return False
        return self._enqueue(task)

    def _enqueue(self, task: Task) -> bool:
        """Line up for the store; False when somebody waits there already."""
        with self._idle:
            try:
                self._storing.put_nowait(task)
            except queue.Full:
                return False
            self._bound_for_store += 1
            return True

    def _seal(self, task: Task) -> Task:
        """Hash the part and copy it to the peer in one pass."""
        view, version = task.holding.view, task.part.version
        copy = _Copy(self._peers, task.peer, self._token)
        copy.begin(len(view))
        chunks = []
        for chunk, piece in seal(task.part, view):
            chunks.append(chunk)
            copy.add(chunk, piece)
        part = replace(task.part, chunks=tuple(chunks))
        task.holding.part = part
        self._saved(task, part, Where.MEMORY, task.stall_s, 0)
        if copy.end(part):
            self._saved(task, part, Where.PEER, 0.0, part.size)
        elif task.peer:
            self._note("peer.unreachable", peer=task.peer, step=version.step, error=copy.error)
        return replace(task, part=part)

    def _store_loop(self) -> None:
        while (task := self._storing.get()) is not None and not self._closing:
            try:
                self._put(task)
            except StoreError as error:
                self._note("store.unavailable", error=str(error), step=task.part.version.step, store=self._store.url)
            except Exception as error:
                self._note("writer.failed", error=repr(error), step=task.part.version.step)
            with self._idle:
                self._bound_for_store -= 1
            self._finish(task)

    def _put(self, task: Task) -> None:
        log = self._logs.setdefault(task.job, CommitLog(self._store, task.job))
        saved = save_part(
            self._store, log, task.job, task.part, task.holding.view, term=task.term, known=self._known, pool=self._putting
        )
        self._saved(task, task.part, Where.STORE, 0.0, saved.sent, saved.ref)

    def _saved(
        self, task: Task, part: Part, where: Where, stall_s: float, sent: int, ref: PartRef | None = None
    ) -> None:
        now = time.time()
        record = PartSaved(
            now, part.version, part.rank, part.world, where, self._vault.node, part.size,
            took_s=now - task.staged_at, stall_s=stall_s, sent=sent,
        )  # fmt: skip
        self._report(record, ref)

    def _note(self, name: str, **fields: Any) -> None:
        self._report(Noted(time.time(), name, {"node": self._vault.node, **fields}), None)

    def _finish(self, task: Task) -> None:
        self._vault.done(task.holding)
        with self._idle:
            self._busy -= 1
            self._idle.notify_all()
