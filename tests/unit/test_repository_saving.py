"""Chunks that are put several at a time: really at once, and never a list that names one which is not there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_dr.errors import StoreError, StoreUnavailable
from ray_dr.model.checkpoint import Chunk, Manifest, Part, VersionId
from ray_dr.repository import saving
from ray_dr.repository.chunks import LISTS_LIMIT, KnownChunks, chunk_id
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.saving import SavedPart, save_part
from ray_dr.stores.base import Buffer
from ray_dr.stores.memory import MemoryStore

CHUNKS, PIECE, THREADS = 12, 8, 4
DATA = b"".join(b"%08d" % number for number in range(CHUNKS))
WAIT_S = 10.0


class Watched(MemoryStore):
    """Counts the chunks that are put, and may refuse some or wait until several are under way."""

    def __init__(self, *, refuse_after: int = CHUNKS, together: int = 1) -> None:
        super().__init__()
        self.begun = 0
        self._left, self._lock = refuse_after, threading.Lock()
        self._meeting = threading.Barrier(together)

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        if "/chunks/" in key:
            with self._lock:
                self.begun += 1
                refused = self.begun > self._left
            self._meeting.wait(WAIT_S)
            if refused:
                raise StoreUnavailable("no", key=key)
        super().put(key, data, if_absent=if_absent)


def save(
    store: MemoryStore, pool: ThreadPoolExecutor, known: KnownChunks, told: list[tuple[int, int]] | None = None
) -> SavedPart:
    cut = range(0, len(DATA), PIECE)
    chunks = tuple(Chunk(chunk_id(DATA[at : at + PIECE]), at, PIECE) for at in cut)
    part = Part(VersionId(1, 1), 0, 1, len(DATA), (), chunks)
    log = CommitLog(store, "j")
    log.take_term("a", 0.0)
    return save_part(store, log, "j", part, memoryview(DATA), term=1, known=known, pool=pool,
                     each=lambda done, sent: (told if told is not None else []).append((done, sent)))  # fmt: skip


def lists(store: MemoryStore) -> list[str]:
    return [entry.key for entry in store.list("jobs/j/parts/")]


def test_as_many_chunks_as_there_are_threads_are_put_at_once() -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        store = Watched(together=THREADS)  # none returns before so many have begun
        assert save(store, pool, KnownChunks()).sent == len(DATA)
    assert len(list(store.list("jobs/j/chunks/"))) == CHUNKS
    assert len(lists(store)) == 1


def test_after_an_error_nothing_is_listed_and_the_next_try_sends_what_is_missing() -> None:
    known = KnownChunks()
    with ThreadPoolExecutor(1) as pool:
        store = Watched(refuse_after=5)
        with pytest.raises(StoreUnavailable):
            save(store, pool, known)
        assert store.begun < CHUNKS
        assert lists(store) == []
        store._left = 10**6
        assert save(store, pool, known).sent == len(DATA) - 5 * PIECE
    assert len(lists(store)) == 1


def test_a_pool_that_is_closed_in_the_middle_leaves_no_list() -> None:
    store = Watched(together=2)
    pool = ThreadPoolExecutor(1)
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            save(store, pool, KnownChunks())
        except StoreError as error:
            errors.append(error)

    saver = threading.Thread(target=begin)
    saver.start()
    while not store.begun:
        saver.join(0.01)
    pool.shutdown(wait=False, cancel_futures=True)
    store._meeting.wait(WAIT_S)  # lets the one that has begun end well
    saver.join(WAIT_S)
    assert len(errors) == 1
    assert "closing" in str(errors[0])
    assert lists(store) == []


def test_each_chunk_is_told_once_and_whether_it_moved() -> None:
    known, first, again = KnownChunks(), [], []
    with ThreadPoolExecutor(THREADS) as pool:
        store = Watched()
        save(store, pool, known, first)
        save(store, pool, known, again)
    assert first == [(PIECE, PIECE)] * CHUNKS
    assert [done for done, _ in again] == [PIECE] * CHUNKS
    assert sum(sent for _, sent in again) == 0


def test_the_list_this_process_wrote_is_verified_for_the_next_save_but_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, known = MemoryStore(), KnownChunks()
    log = CommitLog(store, "j")
    log.take_term("a", 0.0)
    chunks = tuple(Chunk(chunk_id(DATA[at : at + PIECE]), at, PIECE) for at in range(0, len(DATA), PIECE))

    def put(step: int, known: KnownChunks) -> SavedPart:
        part = Part(VersionId(1, step), 0, 1, len(DATA), (), chunks)
        return save_part(store, log, "j", part, memoryview(DATA), term=1, known=known)

    first = put(1, known)
    log.commit(Manifest(1, "j", 1, VersionId(1, 1), 1, 0, (first.ref,), 0.0))
    other = put(2, KnownChunks())  # another process parses it
    monkeypatch.setattr(saving, "parse_part", None)
    again = put(2, known)
    assert again == other
    assert (first.sent, again.sent, again.ref.base) == (len(DATA), 0, first.ref.digest)
    store.put(first.ref.key, b"damaged")
    broken = put(3, known)
    assert (broken.sent, broken.ref.base) == (len(DATA), "")


def test_only_so_many_lists_are_remembered() -> None:
    known = KnownChunks()
    for number in range(LISTS_LIMIT + 1):
        known.wrote_list(str(number), [Chunk("id", 0, 1, f"folder {number}")])
    assert known.named_by("0") is None
    assert known.named_by(str(LISTS_LIMIT)) == {"id": f"folder {LISTS_LIMIT}"}
