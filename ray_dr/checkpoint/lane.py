"""One durable place of a node's parts (the store, the local disk, the second store): a thread that takes one after the other.

A part's chunks are put while later ones are still being hashed: both read them from the slot, and nothing is copied. So the
memory of a save is its slot; of what a put needs besides (a sealed chunk, a part of a multipart upload) there is at most one
per chunk under way, PUTS of them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_dr.checkpoint.throttle import Throttle
from ray_dr.checkpoint.uploads import Uploads
from ray_dr.checkpoint.vault import Holding
from ray_dr.errors import CheckpointError, StoreError
from ray_dr.model.checkpoint import Chunk, Part, PartRef, VersionId
from ray_dr.model.journal import PartSaved, Where
from ray_dr.repository.chunks import KnownChunks
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.saving import save_part
from ray_dr.stores.base import Store

PUTS = 4
"""Chunks on their way at a time: an fsync or a round trip of one is the time in which others are written."""


class ChunkStream:
    """The chunks of a part, in order, while they are being sealed. Any number of threads may iterate, each from the first."""

    def __init__(self, chunks: tuple[Chunk, ...] = ()) -> None:
        self._chunks = list(chunks)
        self._ended = bool(chunks)
        self._failed = False
        self._changed = threading.Condition()

    def add(self, chunk: Chunk) -> None:
        """The next one."""
        with self._changed:
            self._chunks.append(chunk)
            self._changed.notify_all()

    def end(self, *, failed: bool = False) -> None:
        """No more will come; or the part came to nothing, which raises CheckpointError in whoever iterates."""
        with self._changed:
            self._ended, self._failed = True, failed
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Chunk]:
        at = 0
        while (chunk := self._at(at)) is not None:
            yield chunk
            at += 1

    def _at(self, number: int) -> Chunk | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._chunks) > number)
            if self._failed:
                raise CheckpointError("the part could not be sealed")
            return self._chunks[number] if number < len(self._chunks) else None


@dataclass(frozen=True, slots=True)
class Load:
    """A part on its way to a place. `part` may have no chunks yet: `chunks` are them. `job` and `term` are those there.
    `forced`: somebody waits for it, and it gives way to nothing."""

    holding: Holding
    part: Part
    chunks: ChunkStream
    staged_at: float
    job: str
    term: int
    forced: bool = False


class Lane:
    """Takes loads to one place. `done` is called with each load that is through, whatever became of it; its bytes are no
    longer read then.

    open_it   gives the store when the first load comes; what it raises is that load's misfortune
    logged    whether the place has commit logs, so that chunks of its newest checkpoint need not be put again
    """

    def __init__(
        self, where: Where, open_it: Callable[[], Store], node: str, *, logged: bool, throttle: Throttle, uploads: Uploads,
        report: Callable[[PartSaved, PartRef], None], note: Callable[..., None], done: Callable[[Load], None],
    ) -> None:  # fmt: skip
        self.where, self._open_it, self._node, self._logged = where, open_it, node, logged
        self._throttle, self._uploads = throttle, uploads
        self._report, self._note, self._done = report, note, done
        self._store: Store | None = None
        self._known = KnownChunks()
        self._logs: dict[str, CommitLog] = {}
        self._queue: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._bound: set[tuple[VersionId, int]] = set()
        self._closing = False
        self._putting = ThreadPoolExecutor(PUTS, thread_name_prefix=f"writer-put-{where}")
        threading.Thread(target=self._run, name=f"writer-{where}", daemon=True).start()

    def offer(self, load: Load) -> bool:
        """Take a load on, unless one of another version is on its way: what waits for a slow place holds a slot that copies in
        memory need, so a save that comes too early is given up, and the next one catches up. The node's ranks line up."""
        with self._lock:
            behind = any(version != load.part.version for version, _ in self._bound)
        if behind:
            self._note(f"{self.where}.behind", step=load.part.version.step)
            return False
        return self.enqueue(load)

    def enqueue(self, load: Load) -> bool:
        """Line up; False when the same part is on its way already."""
        key = (load.part.version, load.part.rank)
        with self._lock:
            if key in self._bound:
                return False
            self._bound.add(key)
        self._queue.put(load)
        return True

    def close(self) -> None:
        """End the thread, after the chunks under way."""
        self._closing = True
        self._putting.shutdown(wait=False, cancel_futures=True)
        self._queue.put(None)

    def _run(self) -> None:
        while (load := self._queue.get()) is not None and not self._closing:
            try:
                self._put(load)
            except StoreError as error:
                url = self._store.url if self._store else str(self.where)
                self._note(f"{self.where}.unavailable", error=str(error), step=load.part.version.step, store=url)
            except Exception as error:
                self._note("writer.failed", error=repr(error), step=load.part.version.step, where=str(self.where))
            with self._lock:
                self._bound.discard((load.part.version, load.part.rank))
            self._done(load)

    def _put(self, load: Load) -> None:
        if self._store is None:
            self._store = self._open_it()
        store = self._store
        log = self._logs.setdefault(load.job, CommitLog(store, load.job)) if self._logged else None
        with self._uploads.under_way(load.part) as upload:
            turn = self._throttle.save(forced=load.forced)

            def passed(done: int, sent: int) -> None:
                upload.put(done, sent)
                turn.pass_chunk()

            saved = save_part(
                store, log, load.job, load.part, load.holding.view, term=load.term, known=self._known,
                pool=self._putting, chunks=load.chunks, each=passed,
            )  # fmt: skip
        now, part = time.time(), load.part
        record = PartSaved(
            now, part.version, part.rank, part.world, self.where, self._node, part.size,
            took_s=now - load.staged_at, sent=saved.sent,
        )  # fmt: skip
        self._report(record, saved.ref)
