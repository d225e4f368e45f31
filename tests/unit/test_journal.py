"""The journal: in order, nothing twice, nothing lost while the store is away, and never in the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from ray_dr.errors import StoreUnavailable
from ray_dr.model.actions import FormGroup
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.events import Opened
from ray_dr.model.journal import Decided, JobOpened, Noted, PartSaved, Record, Stepped, Where
from ray_dr.model.recovery import Group, Queued, Starting, State
from ray_dr.stores.base import Buffer, Entry, Store, Traits
from ray_dr.stores.memory import MemoryStore
from ray_dr.telemetry.journal import (
    ATTEMPTS,
    READERS,
    Journal,
    Reader,
    last_known,
    read_journal,
    read_tail,
    segment_key,
)


class Outage:
    """A store that is away while `away` is set, and that may lose the answer of puts that arrived."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.away = threading.Event()
        self.refused = threading.Event()
        self.lose_answers = 0

    @property
    def traits(self) -> Traits:
        return self._inner.traits

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        self._check()
        self._inner.put(key, data, if_absent=if_absent)
        if self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailable("no answer", key=key)

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        self._check()
        return self._inner.get(key, start=start, size=size)

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        self._inner.readinto(key, into, start=start)

    def list(self, prefix: str) -> Iterator[Entry]:
        self._check()
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def _check(self) -> None:
        if self.away.is_set():
            self.refused.set()
            raise StoreUnavailable("away")


def stepped(step: int, attempt: int = 1, rank: int = 0) -> Stepped:
    return Stepped(100.0 + step, StepRecord(attempt, step, rank, 2, ((0, 4),), "00", 0.1, {"loss": 1.5}))


def open_journal(store: Store, term: int = 1, **limits: int) -> Journal:
    return Journal(store, "job", term, lambda: 7.0, **limits)


def part_saved(step: int) -> PartSaved:
    return PartSaved(1.0, VersionId(1, step), 0, 2, Where.MEMORY, "node", 100, 0.1)


def noted(records: list[Record]) -> list[str]:
    return [record.name for record in records if isinstance(record, Noted)]


def test_gives_back_every_kind_of_record_in_order() -> None:
    store = MemoryStore()
    group = Group(1, ("a/0.1", "b/0.1"), VersionId(1, 4))
    state = State(Starting(group, 2.0), attempt=1)
    records: list[Record] = [
        JobOpened(1.0, 1, "job", {"name": "job", "seed": 3}),
        Decided(2.0, 1, 1, Opened(2.0, 1, 0), State(Queued()), (), "opened"),
        Decided(3.0, 1, 2, Opened(3.0, 1, 0), state, (FormGroup(group),), "all up"),
        stepped(1),
        part_saved(1),
        Noted(4.0, "store.unavailable", {"error": "gone", "tries": 3}),
    ]
    journal = open_journal(store)
    for record in records:
        journal.append(record)
    assert journal.close()
    assert list(read_journal(store, "job")) == records


def test_flush_means_stored_and_no_lag() -> None:
    store = MemoryStore()
    journal = open_journal(store)
    assert journal.lag_s == 0.0
    journal.append(stepped(1))
    assert journal.flush(10.0)
    assert list(read_journal(store, "job")) == [stepped(1)]
    assert journal.lag_s == 0.0
    journal.close()


def test_writes_by_itself_without_being_asked() -> None:
    store = MemoryStore()
    arrived = threading.Event()

    class Watched(Outage):
        def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
            super().put(key, data, if_absent=if_absent)
            arrived.set()

    journal = open_journal(Watched(store))
    journal.append(stepped(1))
    assert arrived.wait(10.0)
    journal.close()


def test_large_appends_make_several_segments_in_order() -> None:
    store = MemoryStore()
    journal = open_journal(store)
    for step in range(5000):
        journal.append(stepped(step))
    assert journal.close()
    assert len(list(store.list("jobs/job/journal/"))) > 1
    assert list(read_journal(store, "job")) == [stepped(step) for step in range(5000)]


def test_a_later_journal_of_the_same_term_goes_on_numbering_and_terms_come_in_order() -> None:
    store = MemoryStore()
    for term, step in ((2, 1), (2, 2), (10, 3), (3, 9)):
        journal = open_journal(store, term)
        journal.append(stepped(step))
        assert journal.close()
    steps = [record.record.step for record in read_journal(store, "job") if isinstance(record, Stepped)]
    assert steps == [1, 2, 9, 3]
    assert [entry.key for entry in store.list("jobs/job/journal/000002")] == [
        segment_key("job", 2, 0),
        segment_key("job", 2, 1),
    ]


def test_two_journals_of_one_term_do_not_overwrite_each_other() -> None:
    store = MemoryStore()
    first, second = open_journal(store), open_journal(store)
    for step in range(6):
        writer = (first, second)[step % 2]
        writer.append(stepped(step))
        assert writer.flush(10.0)
    first.close()
    second.close()
    assert list(read_journal(store, "job")) == [stepped(step) for step in range(6)]


def test_an_outage_delays_and_loses_nothing_and_is_told() -> None:
    store = Outage(MemoryStore())
    journal = open_journal(store)
    store.away.set()
    journal.append(stepped(1))
    assert store.refused.wait(10.0)
    journal.append(stepped(2))
    assert not journal.flush(0.0)
    assert journal.lag_s > 0.0
    store.away.clear()
    assert journal.flush(20.0)
    assert journal.close()
    records = list(read_journal(store, "job"))
    assert [record for record in records if isinstance(record, Stepped)] == [stepped(1), stepped(2)]
    assert noted(records) == ["journal.lagging", "journal.caught_up"]


def test_a_lost_answer_writes_nothing_twice() -> None:
    store = Outage(MemoryStore())
    store.lose_answers = 2
    journal = open_journal(store)
    journal.append(stepped(1))
    assert journal.flush(20.0)
    journal.append(stepped(2))
    assert journal.close(20.0)
    records = list(read_journal(store, "job"))
    assert [record for record in records if isinstance(record, Stepped)] == [stepped(1), stepped(2)]


def test_a_full_buffer_refuses_what_describes_before_what_proves_and_decides() -> None:
    store = Outage(MemoryStore())
    store.away.set()
    journal = open_journal(store, capacity_bytes=8000)
    decided = Decided(1.0, 1, 1, Opened(1.0, 1, 0), State(Queued()), (), "opened")
    for step in range(200):
        journal.append(part_saved(step))
    for step in range(200):
        journal.append(stepped(step))
    journal.append(decided)
    store.away.clear()
    assert journal.close(20.0)
    records = list(read_journal(store, "job"))
    parts = [record for record in records if isinstance(record, PartSaved)]
    steps = [record for record in records if isinstance(record, Stepped)]
    assert parts == [part_saved(step) for step in range(len(parts))]
    assert steps == [stepped(step) for step in range(len(steps))]
    assert 0 < len(parts) < 200
    assert 0 < len(steps) < 200
    assert decided in records
    notes = [record.fields for record in records if isinstance(record, Noted)]
    refused = [fields["refused"] for fields in notes if "refused" in fields]
    assert refused == [400 - len(parts) - len(steps)]


def test_closing_during_an_outage_says_that_something_is_missing() -> None:
    store = Outage(MemoryStore())
    store.away.set()
    journal = open_journal(store)
    journal.append(stepped(1))
    assert not journal.close(0.2)


@pytest.mark.parametrize("line", [b"{", b'{"type": "Nothing"}', b'{"type": "Noted", "at": ""}', b"3", b"\xff", b"null"])
def test_a_damaged_line_is_named(line: bytes) -> None:
    store = MemoryStore()
    store.put(segment_key("job", 1, 0), line + b"\n")
    with pytest.raises(ValueError, match=r"jobs/job/journal/000001-00000000\.jsonl: line 1 is damaged"):
        list(read_journal(store, "job"))


def test_a_missing_segment_is_named_and_a_missing_tail_is_not_missed() -> None:
    store = MemoryStore()
    for step in range(3):
        journal = open_journal(store)
        journal.append(stepped(step))
        journal.close()
    store.delete(segment_key("job", 1, 2))
    assert list(read_journal(store, "job")) == [stepped(0), stepped(1)]
    store.put(segment_key("job", 1, 2), b"")
    store.delete(segment_key("job", 1, 1))
    with pytest.raises(ValueError, match=r"000001-00000001\.jsonl: the journal's segment is missing"):
        list(read_journal(store, "job"))


def test_a_reader_gives_only_what_is_new() -> None:
    store = MemoryStore()
    reader, journal = Reader(store, "job"), open_journal(store)
    assert reader.more() == ()
    for step in range(2):
        journal.append(stepped(step))
        assert journal.flush(10.0)
        assert reader.more() == (stepped(step),)
    assert reader.more() == ()
    journal.close()


def test_knows_the_last_attempt_from_the_journal_alone() -> None:
    store = MemoryStore()
    assert last_known(store, "job")[0] == 0
    journal = open_journal(store)
    journal.append(stepped(1, attempt=3))
    assert journal.flush(10.0)
    assert last_known(store, "job")[0] == 3
    journal.append(Decided(1.0, 1, 1, Opened(1.0, 1, 3), State(Queued(), attempt=4), (), "opened"))
    assert journal.flush(10.0)
    journal.append(stepped(1, attempt=2))
    journal.close()
    assert last_known(store, "job")[0] == 4


def test_the_last_attempt_of_a_long_calm_life_is_told_by_its_newest_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = MemoryStore(), list[str]()
    for number in range(300):
        journal = open_journal(store)
        journal.append(stepped(number, attempt=7))
        if number == 0:
            journal.append(Decided(1.0, 1, 1, Opened(1.0, 1, 3), State(Queued(), attempt=8), (), "opened"))
        if number == 250:
            journal.append(Noted(1.0, "counted", {ATTEMPTS: 8}))
        assert journal.close()
    get = MemoryStore.get
    monkeypatch.setattr(MemoryStore, "get", lambda self, key, **piece: (read.append(key), get(self, key, **piece))[1])
    assert last_known(store, "job")[0] == 8, "late steps of an older attempt tell less"
    assert 300 - 250 <= len(read) <= 50 + READERS


def test_the_end_of_a_journal_is_read_from_its_newest_beginning_on_and_no_further_than_allowed() -> None:
    store = MemoryStore()
    for term, names in ((1, ("a", "mark", "b")), (2, ("mark", "c")), (3, ("d",)), (4, ("own",))):
        for name in names:
            journal = open_journal(store, term)
            journal.append(Noted(1.0, name))
            journal.append(Noted(1.0, f"{name}, too"))
            assert journal.close()

    def tail(most: int, begins: str = "mark") -> list[str]:
        records = read_tail(store, "job", before=4, most=most, begins=lambda r: isinstance(r, Noted) and r.name == begins)
        return [record.name for record in records if isinstance(record, Noted)]

    assert tail(100) == ["mark", "mark, too", "c", "c, too", "d", "d, too"]
    assert tail(1) == ["d", "d, too"]
    assert tail(100, "nothing")[:2] == ["a", "a, too"]
    assert read_tail(store, "other", before=4, most=9, begins=lambda _: True) == ()
