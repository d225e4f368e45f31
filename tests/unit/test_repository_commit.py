"""The commit log: one writer at a time, whatever the order of their requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ray_dr.errors import AlreadyExists, Fenced, StoreError, StoreUnavailable
from ray_dr.model.checkpoint import Manifest, PartRef, VersionId
from ray_dr.repository.commit import CommitLog, KeptEntry, TermEntry, decode, encode
from ray_dr.repository.layout import log_key, mark_key
from ray_dr.stores.base import Buffer, Entry, Store, Traits
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.retrying import Retry, Retrying

JOB = "job"


def manifest(step: int, *, term: int, attempt: int = 1) -> Manifest:
    part = PartRef(rank=0, key=f"jobs/{JOB}/parts/x/r00000.json", digest="0" * 64, size=10)
    return Manifest(1, JOB, term, VersionId(attempt, step), 1, step * 32, (part,), created_at=1000.5 + step)


def steps(log: CommitLog) -> list[tuple[int, int]]:
    return [(found.term, found.version.step) for found in log.checkpoints()]


def test_a_new_job_has_no_checkpoint_and_no_term() -> None:
    log = CommitLog(MemoryStore(), JOB)
    assert (log.term(), log.checkpoints(), log.newest()) == (0, (), None)


def test_what_was_committed_is_read_back_by_others_oldest_first() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    assert log.take_term("a", 1.0) == 1
    committed = [manifest(step, term=1) for step in (10, 20, 30)]
    for one in committed:
        log.commit(one)
    other = CommitLog(store, JOB)
    assert list(other.checkpoints()) == committed
    assert other.newest() == committed[-1]
    assert other.term() == 1


def test_appending_costs_one_request() -> None:
    store = FaultyStore(MemoryStore())
    log = CommitLog(store, JOB)
    term = log.take_term("a", 1.0)
    store.calls.clear()
    for step in range(3):
        log.commit(manifest(step, term=term))
    assert [operation for operation, _ in store.calls] == ["put"] * 3


def test_the_older_of_two_supervisors_is_fenced() -> None:
    store = MemoryStore()
    old, new = CommitLog(store, JOB), CommitLog(store, JOB)
    first = old.take_term("old", 1.0)
    old.commit(manifest(10, term=first))
    second = new.take_term("new", 2.0)
    assert second == first + 1
    with pytest.raises(Fenced) as caught:
        old.commit(manifest(20, term=first))
    assert (caught.value.mine, caught.value.newest) == (first, second)
    new.commit(manifest(11, term=second))
    with pytest.raises(Fenced):
        old.commit(manifest(20, term=first))
    assert steps(new) == steps(old) == [(1, 10), (2, 11)]


def test_committing_again_changes_nothing() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    log.commit(manifest(10, term=1))
    log.commit(manifest(10, term=1))
    CommitLog(store, JOB).commit(manifest(10, term=1))
    assert steps(log) == [(1, 10)]


@pytest.mark.parametrize("retried", [False, True])
def test_a_commit_whose_answer_is_lost_counts_once(retried: bool) -> None:
    faulty = FaultyStore(MemoryStore())
    store: Store = Retrying(faulty, Retry(), sleep=lambda _: None) if retried else faulty
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    faulty.apply_then_fail("put")
    if not retried:
        with pytest.raises(StoreUnavailable):
            log.commit(manifest(10, term=1))
    log.commit(manifest(10, term=1))
    log.commit(manifest(20, term=1))
    assert steps(CommitLog(faulty, JOB)) == [(1, 10), (1, 20)]


def test_a_takeover_whose_answer_is_lost_is_still_one_term() -> None:
    faulty = FaultyStore(MemoryStore())
    log = CommitLog(Retrying(faulty, Retry(), sleep=lambda _: None), JOB)
    faulty.apply_then_fail("put")
    assert log.take_term("a", 1.0) == 1
    assert CommitLog(faulty, JOB).term() == 1


def test_eight_racing_supervisors_get_eight_terms_and_one_can_commit() -> None:
    store = MemoryStore()
    logs = [CommitLog(store, JOB) for _ in range(8)]
    together = threading.Barrier(8)

    def take(log: CommitLog) -> int:
        together.wait()
        return log.take_term("same owner", 1.0)

    with ThreadPoolExecutor(8) as pool:
        terms = list(pool.map(take, logs))
    assert sorted(terms) == list(range(1, 9))

    def try_commit(log: CommitLog, term: int) -> bool:
        try:
            log.commit(manifest(term, term=term))
        except Fenced:
            return False
        return True

    assert [term for log, term in zip(logs, terms, strict=True) if try_commit(log, term)] == [8]


def test_every_damaged_byte_of_an_entry_is_noticed() -> None:
    data = encode(TermEntry(3, "owner", 1.5, "nonce"))
    assert decode(data) == TermEntry(3, "owner", 1.5, "nonce")
    for at in range(len(data)):
        assert decode(data[:at]) is None
        for bit in range(8):
            damaged = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            assert decode(damaged) is None, (at, bit)


def test_a_damaged_entry_costs_its_checkpoint_only_and_no_term_is_given_twice() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    log.commit(manifest(10, term=1))
    log.take_term("b", 1.0)
    log.commit(manifest(20, term=2))
    store.put(log_key(JOB, 3), b"{}")
    reader = CommitLog(store, JOB)
    assert steps(reader) == [(1, 10), (2, 20)]
    assert reader.take_term("c", 2.0) == 3
    store.put(log_key(JOB, 2), b"")
    assert steps(CommitLog(store, JOB)) == [(2, 20)]
    assert CommitLog(store, JOB).take_term("d", 2.0) > 3


def test_an_entry_of_a_newer_format_is_refused_not_skipped() -> None:
    store = MemoryStore()
    CommitLog(store, JOB).take_term("a", 1.0)
    entry = encode(TermEntry(2, "b", 1.0, "n"))
    from ray_dr.repository import commit

    body = {"entry": "term", "format": 2, "anything": 1}
    store.put(log_key(JOB, 2), commit._dump({**body, "digest": commit._digest(body)}))
    with pytest.raises(StoreError, match="newer"):
        CommitLog(store, JOB).term()
    assert decode(entry) is not None


def test_a_void_checkpoint_in_the_log_is_not_offered() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    log.take_term("b", 1.0)
    from ray_dr.repository.commit import CheckpointEntry

    store.put(log_key(JOB, 3), encode(CheckpointEntry(manifest(99, term=1))), if_absent=True)
    assert steps(log) == steps(CommitLog(store, JOB)) == []


def test_a_kept_entry_stands_for_everything_before_it() -> None:
    store = FaultyStore(MemoryStore())
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    for step in range(200):
        log.commit(manifest(step, term=1))
    assert log.keep(log.checkpoints()[-2:], term=1, seen=log.refresh())
    log.commit(manifest(200, term=1))
    store.calls.clear()
    reader = CommitLog(store, JOB)
    assert steps(reader) == [(1, 198), (1, 199), (1, 200)]
    assert reader.term() == 1
    assert sum(operation == "get" for operation, _ in store.calls) < 100
    assert isinstance(decode(store.get(log_key(JOB, 202))), KeptEntry)


def test_keeping_is_refused_when_the_log_has_grown_since() -> None:
    store = MemoryStore()
    log, other = CommitLog(store, JOB), CommitLog(store, JOB)
    log.take_term("a", 1.0)
    log.commit(manifest(1, term=1))
    seen = log.refresh()
    other.commit(manifest(2, term=1))
    assert not log.keep(seen.checkpoints, term=1, seen=seen)
    assert steps(log) == [(1, 1), (1, 2)]
    other.take_term("b", 1.0)
    with pytest.raises(Fenced):
        log.keep((), term=1, seen=log.refresh())


# ------------------------------------------------------------------------ every interleaving of a zombie and a takeover


class Gate:
    """Lets one request through at a time. `run` chooses whose, once every unfinished writer waits for its turn."""

    def __init__(self, writers: int) -> None:
        self._changed = threading.Condition()
        self._waiting = [0] * writers
        self._finished = [False] * writers
        self._admitted: int | None = None

    def pass_through(self, writer: int, act: Callable[[], object]) -> object:
        with self._changed:
            self._waiting[writer] += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._admitted == writer, timeout=20)
            self._waiting[writer] -= 1
            try:
                return act()
            finally:
                self._admitted = None
                self._changed.notify_all()

    def finish(self, writer: int) -> None:
        with self._changed:
            self._finished[writer] = True
            self._changed.notify_all()

    def run(self, prefix: tuple[int, ...]) -> list[tuple[int, list[int]]]:
        """Admit `prefix` first, then always the lowest. Returns each choice with the writers that were waiting."""
        trace: list[tuple[int, list[int]]] = []
        while True:
            with self._changed:
                assert self._changed.wait_for(self._settled, timeout=20)
                ready = [writer for writer, done in enumerate(self._finished) if not done]
                if not ready:
                    return trace
                chosen = prefix[len(trace)] if len(trace) < len(prefix) else ready[0]
                trace.append((chosen, ready))
                self._admitted = chosen
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._admitted is None, timeout=20)

    def _settled(self) -> bool:
        return all(done or waiting for done, waiting in zip(self._finished, self._waiting, strict=True))


class Gated:
    """A store whose every request waits for its turn."""

    def __init__(self, inner: MemoryStore, gate: Gate, writer: int) -> None:
        self._inner, self._gate, self._writer = inner, gate, writer

    @property
    def traits(self) -> Traits:
        return self._inner.traits

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        self._gate.pass_through(self._writer, lambda: self._inner.put(key, data, if_absent=if_absent))

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        found = self._gate.pass_through(self._writer, lambda: self._inner.get(key, start=start, size=size))
        assert isinstance(found, bytes)
        return found

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        self._gate.pass_through(self._writer, lambda: self._inner.readinto(key, into, start=start))

    def list(self, prefix: str) -> Iterator[Entry]:
        found = self._gate.pass_through(self._writer, lambda: tuple(self._inner.list(prefix)))
        assert isinstance(found, tuple)
        return iter(found)

    def delete(self, key: str) -> None:
        self._gate.pass_through(self._writer, lambda: self._inner.delete(key))


def interleave(prefix: tuple[int, ...], *, zombie: bool) -> list[tuple[int, list[int]]]:
    """One interleaving of two writers that each take the job (a zombie took it before) and commit two checkpoints."""
    space, gate = MemoryStore(), Gate(2)
    succeeded: list[tuple[int, int]] = []
    terms = [0, 0]
    logs = [CommitLog(Gated(space, gate, writer), JOB) for writer in (0, 1)]
    if zombie:
        terms[0] = CommitLog(space, JOB).take_term("zombie", 1.0)
        logs[0]._view = CommitLog(space, JOB).refresh()

    def write(writer: int) -> None:
        try:
            terms[writer] = terms[writer] or logs[writer].take_term("same owner", 2.0)
            for step in (10 * writer + 10, 10 * writer + 11):
                logs[writer].commit(manifest(step, term=terms[writer], attempt=terms[writer]))
                succeeded.append((terms[writer], step))
        except Fenced:
            pass
        finally:
            gate.finish(writer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in (0, 1)]
    for thread in threads:
        thread.start()
    trace = gate.run(prefix)
    for thread in threads:
        thread.join(20)
    check(CommitLog(space, JOB), succeeded, terms, tuple(chosen for chosen, _ in trace))
    return trace


def check(log: CommitLog, succeeded: list[tuple[int, int]], terms: list[int], schedule: tuple[int, ...]) -> None:
    """What was reported as committed is what a reader finds, terms never go down, and the newest term is not fenced.

    `succeeded` is in the order of the reports, which may differ from the log's by the request in between.
    """
    found = steps(log)
    assert sorted(found) == sorted(succeeded), schedule
    assert [term for term, _ in found] == sorted(term for term, _ in found), schedule
    assert terms[0] != terms[1], schedule
    winner = terms.index(max(terms))
    assert (max(terms), 10 * winner + 10) in found, schedule


@pytest.mark.parametrize("zombie", [True, False])
def test_a_zombie_never_commits_after_a_takeover_in_any_interleaving(zombie: bool) -> None:
    todo: list[tuple[int, ...]] = [()]
    seen: set[tuple[int, ...]] = set()
    while todo:
        prefix = todo.pop()
        trace = interleave(prefix, zombie=zombie)
        choices = tuple(chosen for chosen, _ in trace)
        assert choices not in seen
        seen.add(choices)
        for at in range(len(prefix), len(trace)):
            todo += [(*choices[:at], other) for other in trace[at][1] if other != choices[at]]
    assert len(seen) > 20


def test_a_manifest_is_read_back_exactly_as_it_was_committed() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    odd = replace(manifest(7, term=1), created_at=0.1 + 0.2, parts=())
    log.commit(odd)
    assert CommitLog(store, JOB).newest() == odd


def test_a_taken_number_is_never_overwritten() -> None:
    store = MemoryStore()
    CommitLog(store, JOB).take_term("a", 1.0)
    with pytest.raises(AlreadyExists):
        store.put(log_key(JOB, 1), b"x", if_absent=True)


def test_a_mark_tells_that_last_entries_are_lost_and_no_term_is_given_twice() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    log.mark()
    log.commit(manifest(1, term=1))
    log.take_term("b", 2.0)
    log.mark()
    assert [entry.key for entry in store.list("") if entry.size == 0] == [mark_key(JOB, 3)]
    for number in (2, 3):
        store.delete(log_key(JOB, number))
    view = CommitLog(store, JOB).refresh()
    assert (view.tail, view.checkpoints, view.doubtful) == (3, (), (2, 3))
    assert CommitLog(store, JOB).take_term("c", 3.0) > 2


def test_doubt_ends_with_the_next_checkpoint_and_damage_with_the_next_kept_entry() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    log.commit(manifest(1, term=1))
    log.commit(manifest(2, term=1))
    store.put(log_key(JOB, 3), store.get(log_key(JOB, 2)))
    assert CommitLog(store, JOB).refresh().doubtful == (3,)
    again = CommitLog(store, JOB)
    again.commit(manifest(3, term=1))
    assert (again.refresh().doubtful, again.refresh().unread) == ((), (3,))
    assert again.keep(again.checkpoints(), term=1, seen=again.refresh())
    view = CommitLog(store, JOB).refresh()
    assert (view.unread, view.damaged) == ((), 1)
    assert steps(again) == [(1, 1), (1, 3)]


@pytest.mark.parametrize("fold", [True, False])
def test_a_version_older_than_one_that_was_struck_is_refused(fold: bool) -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 1.0)
    for step in (1, 5):
        log.commit(manifest(step, term=1))
    assert log.keep(log.checkpoints()[:1], term=1, seen=log.refresh())
    with pytest.raises(StoreError, match="not newer"):
        (CommitLog(store, JOB) if fold else log).commit(manifest(3, term=1))
