"""Saves on their way are seen while they last: from a chunk that was put to the words of `ray-dr status`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.uploads import TOLD_S, Uploads
from ray_dr.cli.status import describe, saves
from ray_dr.errors import StoreUnavailable
from ray_dr.model import codec
from ray_dr.model.checkpoint import Part, VersionId
from ray_dr.model.upload import Saving, Upload
from ray_dr.stores.base import Buffer
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.wire import Connection, connect
from ray_dr.telemetry.live import Live, LiveView, gather, live_key, read_live
from ray_dr.telemetry.timeline import JobStatus

WAIT_S = 60.0
TOKEN = b"secret"


def part(step: int = 1, rank: int = 0, *, world: int = 1, size: int = 100) -> Part:
    return Part(VersionId(1, step), rank, world, size, (), ())


class Clock:
    """The agent's wall clock and its monotonic one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.uploads = Uploads(clock=lambda: 1000.0 + self.now, monotonic=lambda: self.now)
        self.news = self.uploads.listener()

    def done(self) -> list[tuple[int, int, str]]:
        return [(upload.rank, upload.done, upload.outcome) for upload in self.news()]


def test_a_beginning_and_an_end_are_told_at_once_and_what_is_between_once_a_second() -> None:
    clock = Clock()
    with clock.uploads.under_way(part()) as upload:
        assert clock.done() == [(0, 0, "")]
        for _ in range(10):
            upload.put(5, 3)
            assert clock.done() == []
        clock.now += TOLD_S
        assert clock.done() == [(0, 50, "")]
        assert clock.done() == []
        upload.put(50, 50)
    (told,) = clock.news()
    assert told == Upload(VersionId(1, 1), 0, 1, 100, 100, 80, 1000.0, 1000.0 + TOLD_S, "stored")
    assert clock.done() == []


def test_a_save_that_is_given_up_ends_as_failed() -> None:
    clock = Clock()

    def give_up() -> None:
        with clock.uploads.under_way(part()) as upload:
            upload.put(5, 5)
            raise StoreUnavailable("gone")

    with pytest.raises(StoreUnavailable):
        give_up()
    assert clock.done() == [(0, 5, "failed")]


def test_only_what_changed_is_told_again() -> None:
    clock = Clock()
    with clock.uploads.under_way(part(rank=0, world=2)), clock.uploads.under_way(part(rank=1, world=2)) as second:
        assert len(clock.done()) == 2
        second.put(5, 5)
        clock.now += TOLD_S
        assert clock.done() == [(1, 5, "")]


def test_words_about_a_part_that_was_replaced_are_not_told() -> None:
    clock = Clock()
    with clock.uploads.under_way(part(1)) as old, clock.uploads.under_way(part(2)):
        old.put(5, 5)
        (told,) = clock.news()
        assert (told.version.step, told.done) == (2, 0)


def test_whoever_begins_to_listen_hears_everything() -> None:
    clock = Clock()
    for rank in (1, 0):
        with clock.uploads.under_way(part(rank=rank, world=2)):
            pass
    assert len(clock.done()) == 2
    assert clock.done() == []
    assert [upload.rank for upload in clock.uploads.listener()()] == [1, 0]


# ------------------------------------------------------------------------------------------------------- the supervisor


def upload(rank: int, done: int, outcome: str = "", *, step: int = 1, sent: int | None = None) -> Upload:
    moved = done if sent is None else sent
    return Upload(VersionId(1, step), rank, 2, 100, done, moved, 10.0 + rank, 20.0 + rank, outcome)


class Slow(MemoryStore):
    """Counts puts, and holds them up as long as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.puts = 0
        self.free = threading.Event()
        self.free.set()

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        assert self.free.wait(WAIT_S)
        super().put(key, data, if_absent=if_absent)
        self.puts += 1


@pytest.fixture
def store() -> Slow:
    return Slow()


@pytest.fixture
def live(store: Slow) -> Iterator[Live]:
    made = Live(store, "job", 7, clock=lambda: 30.0, write_s=0.001)
    yield made
    store.free.set()
    made.close()


def test_a_version_is_the_sum_of_its_parts_and_through_when_all_are(live: Live) -> None:
    live.heard(upload(0, 40))
    assert live.view() == LiveView(30.0, 7, Saving(VersionId(1, 1), 2, 1, 0, 100, 40, 40, 10.0, 20.0))
    live.heard(upload(0, 100, "stored", sent=60))
    live.heard(upload(1, 50))
    saving = live.view().saving
    assert saving == Saving(VersionId(1, 1), 2, 2, 1, 200, 150, 110, 10.0, 21.0)
    assert saving is not None
    assert saving.bytes_per_s == pytest.approx(10.0)
    live.heard(upload(1, 100, "stored"))
    assert live.view().saving is None
    assert live.view().saved == Saving(VersionId(1, 1), 2, 2, 2, 200, 200, 160, 10.0, 21.0)


def test_the_last_save_is_told_beside_the_next(live: Live) -> None:
    for rank in (0, 1):
        live.heard(upload(rank, 100, "stored"))
    live.heard(upload(0, 1, step=2))
    view = live.view()
    assert view.saved is not None
    assert view.saving is not None
    assert (view.saved.version.step, view.saving.version.step) == (1, 2)


def test_a_part_that_failed_is_under_way_again_when_it_is_put_again(live: Live) -> None:
    live.heard(upload(0, 100, "stored"))
    live.heard(upload(1, 50, "failed"))
    assert live.view().saving is None
    live.heard(upload(1, 0))
    assert live.view().saving is not None
    live.heard(upload(1, 100, "stored"))
    assert live.view().saved is not None


def test_what_was_on_its_way_from_lost_nodes_is_forgotten_with_a_new_attempt(live: Live) -> None:
    live.heard(upload(0, 40))
    live.begin()
    assert live.view().saving is None


def test_no_more_than_two_versions_are_remembered(live: Live) -> None:
    for step in range(1, 100):
        live.heard(upload(0, 40, step=step))
    assert len(live._parts) == len(live._stored) == 2


def until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_view_is_in_the_store_for_those_without_the_cluster(live: Live, store: Slow) -> None:
    assert read_live(store, "job") is None
    for rank in (0, 1):
        live.heard(upload(rank, 40))
    until(lambda: read_live(store, "job") == live.view())


def test_a_slow_store_gets_the_newest_view_and_no_backlog(live: Live, store: Slow) -> None:
    store.free.clear()
    for done in range(100):
        live.heard(upload(0, done))
    store.free.set()
    until(lambda: read_live(store, "job") == live.view())
    assert store.puts <= 2


def test_the_last_word_is_written_though_the_job_is_over(store: Slow) -> None:
    live = Live(store, "job", 7, clock=lambda: 30.0, write_s=3600.0)
    live.heard(upload(0, 40))
    until(lambda: store.puts == 1)
    live.heard(upload(0, 90))
    live.close()
    until(lambda: store.puts == 2)
    assert read_live(store, "job") == live.view()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"at": 1}', b'{"at": "x", "term": 1}'])
def test_a_view_in_another_form_is_none(store: Slow, data: bytes) -> None:
    store.put(live_key("job"), data)
    assert read_live(store, "job") is None


# ------------------------------------------------------------------------------------------------------------ the agent


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent("node-a", "127.0.0.1", "memory://live", TOKEN)
    yield made
    made.close()


def watch(agent: Agent) -> Connection:
    connection = connect(agent.address, TOKEN)
    connection.timeout(WAIT_S)
    connection.send({"op": "watch", "overhead": 0.02, "wait_most_s": 6.0})
    return connection


def heard(connection: Connection, outcome: str) -> tuple[list[Upload], int]:
    """Uploads of the reports up to one that ended so, and the number of the last numbered message."""
    told: list[Upload] = []
    while not told or told[-1].outcome != outcome:
        report, _ = connection.receive()
        told += [codec.from_json(Upload, m["upload"]) for m in report["messages"] if "upload" in m]
    return told, report["last"]


def test_an_agent_tells_its_supervisor_and_keeps_nothing_of_it(agent: Agent) -> None:
    connection = watch(agent)
    with agent.uploads.under_way(part()) as under_way:
        heard(connection, "")
        for _ in range(50):
            under_way.put(2, 2)
    told, last = heard(connection, "stored")
    assert told[-1].done == 100
    assert last == 0
    connection.close()
    again = watch(agent)
    assert heard(again, "stored")[0] == [told[-1]], "the newest alone, to whoever listens next"
    again.close()


def test_a_supervisor_says_what_the_jobs_saves_may_cost(agent: Agent) -> None:
    connection = watch(agent)
    connection.receive()
    assert agent.throttle.most_s == 6.0
    connection.close()


# --------------------------------------------------------------------------------------------------------------- status


SAVING = Saving(VersionId(2, 1200), 4, 3, 1, 6_000_000_000, 1_500_000_000, 1_200_000_000, 1000.0, 1010.0)


def test_status_shows_the_save_on_its_way_and_the_last() -> None:
    saved = replace(SAVING, version=VersionId(2, 1100), parts=4, stored=4, done=6_000_000_000, at=1060.0)
    told = JobStatus(phase="running", term=3)
    text = describe("job", "s3://x", told, None, LiveView(1010.0, 3, SAVING, saved), now=1012.0)
    assert "on its way" in text
    assert dict(saves(LiveView(1010.0, 3, SAVING, saved), told, now=1012.0)) == {
        "  on its way": "step 1200: 1.5 GB of 6.0 GB of 3 of 4 parts (25%), for 12.0 s, 120 MB/s, 300 MB were there already",
        "  last save": "step 1100: 6.0 GB in 1 min 0 s, 20.0 MB/s, 4.8 GB were there already",
    }


def test_status_says_that_a_save_is_silent() -> None:
    (line,) = saves(LiveView(1010.0, 3, SAVING), JobStatus(phase="running", term=3), now=1100.0)
    assert line[1].endswith("nothing new for 1 min 30 s")


@pytest.mark.parametrize("told", [JobStatus(phase="finished", term=3), JobStatus(phase="running", term=4)])
def test_nothing_is_on_its_way_of_a_job_that_is_over_or_of_a_supervisor_that_is_gone(told: JobStatus) -> None:
    assert list(saves(LiveView(1010.0, 3, SAVING), told, now=1012.0)) == []


def test_a_view_survives_the_way_through_the_store() -> None:
    view = LiveView(1010.0, 3, SAVING, gather([upload(0, 1)]))
    assert codec.from_json(LiveView, json.loads(json.dumps(codec.to_json(view)))) == view
