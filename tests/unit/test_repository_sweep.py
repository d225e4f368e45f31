"""Saves, commits and prunes side by side: whatever the order of their requests, every checkpoint restores bit by bit.

The explorer below runs all actors on one store, one request at a time, in every order. An actor is a plain function;
to take its next request it is run anew on the answers it has had so far. States that were seen (the same objects, the
same answers) are not explored twice. An actor that is never scheduled again is one that crashed, so every crash is in.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ray_dr.errors import Fenced, NotFound, StoreError
from ray_dr.model.checkpoint import Chunk, Manifest, Part, VersionId
from ray_dr.model.job import Keep
from ray_dr.repository import commit, layout, prune
from ray_dr.repository.chunks import KnownChunks, chunk_id, get_chunk
from ray_dr.repository.commit import CommitLog, LogView
from ray_dr.repository.parts import read_part
from ray_dr.repository.saving import SavedPart, save_part
from ray_dr.stores.base import Buffer, Entry, Store, Traits
from ray_dr.stores.disk import FileStore
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore

JOB = "j"
PIECE = 8


def stream_of(step: int) -> bytes:
    """Three chunks: one that never changes, one that goes back and forth, one of this step only."""
    return b"frozen  " + (b"even    " if step // 10 % 2 else b"odd     ") + f"{step:8d}".encode()


def sealed(step: int, *, attempt: int = 1, data: bytes | None = None) -> Part:
    data = stream_of(step) if data is None else data
    cut = range(0, len(data), PIECE)
    chunks = tuple(Chunk(chunk_id(data[at : at + PIECE]), at, len(data[at : at + PIECE])) for at in cut)
    return Part(VersionId(attempt, step), 0, 1, len(data), (), chunks)


def upload(store: Store, log: CommitLog, step: int, *, term: int = 1, attempt: int = 1) -> SavedPart:
    part, data = sealed(step, attempt=attempt), memoryview(stream_of(step))
    return save_part(store, log, JOB, part, data, term=term, known=KnownChunks())


def save(store: Store, step: int, *, term: int = 1, attempt: int = 1, log: CommitLog | None = None) -> None:
    """What a node agent does, then a supervisor with a log of its own."""
    saved = upload(store, CommitLog(store, JOB) if log is None else log, step, term=term, attempt=attempt)
    version = VersionId(attempt, step)
    (log or CommitLog(store, JOB)).commit(Manifest(1, JOB, term, version, 1, step, (saved.ref,), 1.0))


def restored(store: Store, manifest: Manifest) -> bytes:
    streams = []
    for part in (read_part(store, ref) for ref in manifest.parts):
        room = bytearray(part.size)
        for chunk in part.chunks:
            room[chunk.at : chunk.at + chunk.size] = get_chunk(store, manifest.job, chunk)
        streams.append(bytes(room))
    return b"".join(streams)


def expect_whole(store: Store) -> list[int]:
    """Steps of the checkpoints that exist; each restores bit by bit."""
    found = CommitLog(store, JOB).checkpoints()
    for manifest in found:
        assert restored(store, manifest) == stream_of(manifest.version.step)
    return [manifest.version.step for manifest in found]


def data_keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list(layout.JOBS_PREFIX) if layout.version_of(entry.key)]


def prepared(*, term: int = 1) -> dict[str, bytes]:
    """A store with two checkpoints, as its objects."""
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 0.0)
    for step in (20, 30):
        save(store, step)
    while log.term() < term:
        log.take_term("b", 0.0)
    return objects_of(store)


def objects_of(store: Store) -> dict[str, bytes]:
    return {entry.key: store.get(entry.key) for entry in store.list("")}


# --------------------------------------------------------------------------------------------------------- the explorer


class Paused(BaseException):
    """The actor has come to a request that has no answer yet."""


@dataclass(frozen=True)
class Replay:
    """A store that gives the answers known so far, and executes one more request."""

    answers: list[Any]
    more: list[Store]
    asked: list[int]

    traits = Traits(conditional_put=True, durable=True, shared=True)
    url = "replay://"

    def _answer(self, act: Callable[[Store], Any]) -> Any:
        self.asked[0] += 1
        if self.asked[0] > len(self.answers):
            if not self.more:
                raise Paused
            store = self.more.pop()
            try:
                self.answers.append(act(store))
            except StoreError as error:
                self.answers.append(error)
        answer = self.answers[self.asked[0] - 1]
        if isinstance(answer, StoreError):
            raise answer
        return answer

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        self._answer(lambda store: store.put(key, data, if_absent=if_absent))

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        found: bytes = self._answer(lambda store: store.get(key, start=start, size=size))
        return found

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        into[:] = self._answer(lambda store: store.get(key, start=start, size=into.nbytes))

    def list(self, prefix: str) -> Iterator[Entry]:
        found: tuple[Entry, ...] = self._answer(lambda store: tuple(store.list(prefix)))
        return iter(found)

    def delete(self, key: str) -> None:
        self._answer(lambda store: store.delete(key))


Actor = Callable[[Store], None]


@dataclass(frozen=True)
class World:
    """All objects, and what each actor has been answered; None for one that is through."""

    objects: Mapping[str, bytes]
    answers: tuple[tuple[Any, ...] | None, ...]
    told: tuple[int, ...]
    """A hash of the answers of each."""

    def store(self) -> MemoryStore:
        store = MemoryStore()
        store._space.objects.update(self.objects)
        return store

    def key(self) -> object:
        return hash(frozenset(self.objects.items())), self.told, tuple(answers is None for answers in self.answers)

    def after(self, number: int, actor: Actor) -> World:
        """One request of an actor later. Its requests are told apart by their answers, as it is deterministic."""
        known = self.answers[number]
        assert known is not None
        store, answers, through = self.store(), list(known), True
        try:
            actor(Replay(answers, [store], [0]))
        except Paused:
            through = False
        mine = None if through else tuple(answers)
        told = hash((self.told[number], repr(answers[len(known) :])))
        return World(store._space.objects, _with(self.answers, number, mine), _with(self.told, number, told))


def _with(values: tuple[Any, ...], number: int, value: Any) -> tuple[Any, ...]:
    return (*values[:number], value, *values[number + 1 :])


def explore(objects: Mapping[str, bytes], *actors: Actor) -> list[World]:
    """Every state that can be reached; in each one every checkpoint that exists was restored."""
    todo = [World(objects, ((),) * len(actors), (0,) * len(actors))]
    seen: dict[object, World] = {}
    whole: set[int] = set()
    while todo:
        world = todo.pop()
        if seen.setdefault(world.key(), world) is not world:
            continue
        if (objects_hash := hash(frozenset(world.objects.items()))) not in whole:
            whole.add(objects_hash)
            expect_whole(world.store())
        todo += [world.after(n, actor) for n, actor in enumerate(actors) if world.answers[n] is not None]
    return list(seen.values())


def view_of(start: Mapping[str, bytes]) -> LogView:
    before = MemoryStore()
    before._space.objects.update(start)
    return CommitLog(before, JOB).refresh()


def informed_log(store: Store, view: LogView) -> CommitLog:
    """A log that was read when the exploration began."""
    log = CommitLog(store, JOB)
    log._view = view
    return log


def writer(start: Mapping[str, bytes], *steps: int, term: int = 1, attempt: int = 1) -> Actor:
    view = view_of(start)

    def act(store: Store) -> None:
        log = informed_log(store, view)
        for step in steps:
            with contextlib.suppress(StoreError, Fenced):
                save(store, step, term=term, attempt=attempt, log=log)

    return act


def pruner(start: Mapping[str, bytes], *, term: int = 1, times: int = 1) -> Actor:
    view = view_of(start)

    def act(store: Store) -> None:
        log = informed_log(store, view)
        with contextlib.suppress(StoreError, Fenced):
            for _ in range(times):
                prune.execute(store, log, JOB, keep=Keep(1), term=term)

    return act


def stale_sweeper(start: Mapping[str, bytes]) -> Actor:
    """Of a supervisor that was fenced long ago, and does not know."""
    view = view_of(start)

    def act(store: Store) -> None:
        with contextlib.suppress(StoreError):
            prune.sweep(store, JOB, view.checkpoints)

    return act


class Serial:
    """A pool without threads, so that an actor asks in one order."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None: ...
    def map(self, function: Callable[[Any], Any], items: Any) -> list[Any]:
        return [function(item) for item in items]


@pytest.fixture(params=["each time", "never"])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How often all chunks are listed."""
    monkeypatch.setattr(prune, "SWEEP_EVERY", 1 if request.param == "each time" else 10**9)
    monkeypatch.setattr(prune, "ThreadPoolExecutor", Serial)
    monkeypatch.setattr(commit, "ThreadPoolExecutor", Serial)
    return str(request.param)


def expect_no_garbage(world: World) -> None:
    """One more sweep, by whoever comes next, leaves nothing but what is named or may still be committed."""
    store = world.store()
    kept = CommitLog(store, JOB).checkpoints()
    prune.sweep(store, JOB, kept)
    expect_whole(store)
    named = {ref.key for manifest in kept for ref in manifest.parts}
    named |= {layout.chunk_key(JOB, c) for m in kept for ref in m.parts for c in read_part(store, ref).chunks}
    oldest = min(manifest.version for manifest in kept)
    left = [key for key in data_keys(store) if key not in named]
    assert all((layout.version_of(key) or oldest) >= oldest for key in left)


@pytest.mark.slow
def test_a_prune_beside_saves_harms_no_checkpoint_in_any_order(whole: str) -> None:
    start = prepared()
    worlds = explore(start, writer(start, 40, 50), pruner(start, times=2))
    assert len(worlds) > 200
    for world in worlds:
        if world.answers[0] is None:
            expect_no_garbage(world)
    assert {tuple(expect_whole(world.store())) for world in worlds if world.answers == (None, None)} >= {
        (50,),
        (40, 50),
    }


@pytest.mark.slow
def test_two_saves_at_once_and_a_prune_harm_no_checkpoint_in_any_order(whole: str) -> None:
    start = prepared()
    worlds = explore(start, writer(start, 40), writer(start, 50), pruner(start))
    ends = {tuple(expect_whole(world.store())) for world in worlds if world.answers == (None,) * 3}
    assert ends >= {(50,), (40, 50)}


def test_a_zombie_of_an_older_term_harms_no_checkpoint_in_any_order(whole: str) -> None:
    start = prepared(term=2)
    zombie = writer(start, 31, term=1)
    worlds = explore(start, zombie, writer(start, 40, term=2, attempt=2), pruner(start, term=2))
    ends = {tuple(expect_whole(world.store())) for world in worlds if world.answers == (None,) * 3}
    assert all(31 not in steps and 40 in steps for steps in ends)
    for world in worlds:
        if world.answers[1:] == (None, None):
            expect_no_garbage(world)


def test_a_sweep_of_a_fenced_supervisor_harms_no_checkpoint_in_any_order(whole: str) -> None:
    start = prepared()
    explore(start, stale_sweeper(start), writer(start, 40), pruner(start))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["not newer", "reuses chunks"])
@pytest.mark.parametrize("whole", ["each time"], indirect=True)
def test_both_rules_of_the_log_are_needed(rule: str, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without either, the explorer finds a checkpoint with missing objects: the tests above could fail."""
    real, start = commit.too_late, prepared()
    monkeypatch.setattr(commit, "too_late", lambda m, view: "" if rule in (why := real(m, view)) else why)
    with pytest.raises(NotFound):
        explore(start, writer(start, 40), writer(start, 50), pruner(start))


# ------------------------------------------------------------------------------------------------ plans, size and costs


def test_a_sweep_plan_says_why_objects_stay() -> None:
    def key(step: int, name: str) -> str:
        chunk = Chunk(name * 64, 0, 1, layout.save_folder(VersionId(1, step), 1))
        return layout.chunk_key(JOB, chunk)

    listed = [key(1, "a"), key(1, "b"), key(2, "a"), key(3, "c"), "jobs/j/chunks/strange"]
    plan = prune.plan_sweep(listed, frozenset([key(1, "b")]), VersionId(1, 2))
    assert plan.remove == (key(1, "a"),)
    assert plan.stay == {
        "named by a kept checkpoint": 1,
        "of a kept version, or of a save under way": 2,
        "not an object of a save": 1,
    }


def test_only_what_changed_since_the_newest_checkpoint_is_sent() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 0.0)
    save(store, 10, log=log)
    assert upload(store, log, 11).sent == PIECE
    assert upload(store, log, 20).sent == 2 * PIECE
    assert upload(store, log, 11).ref.base == CommitLog(store, JOB).checkpoints()[-1].parts[0].digest


def test_a_save_that_is_repeated_sends_only_what_is_missing() -> None:
    faulty, known = FaultyStore(MemoryStore()), KnownChunks()
    log = CommitLog(faulty, JOB)
    part, data = sealed(10), memoryview(stream_of(10))
    faulty.slow("put", 0.0, times=2)
    faulty.fail("put")
    with pytest.raises(StoreError):
        save_part(faulty, log, JOB, part, data, term=1, known=known)
    assert save_part(faulty, log, JOB, part, data, term=1, known=known).sent == PIECE


def test_a_base_that_cannot_be_read_costs_only_its_reuse() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 0.0)
    save(store, 10, log=log)
    store.put(log.checkpoints()[-1].parts[0].key, b"{}")
    saved = upload(store, log, 11)
    assert (saved.sent, saved.ref.base) == (3 * PIECE, "")


def test_a_version_committed_twice_is_the_one_that_was_there() -> None:
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 0.0)
    save(store, 10, log=log)
    there = log.checkpoints()[0]
    assert log.commit(replace(there, created_at=2.0)) == there
    with pytest.raises(StoreError, match="not newer"):
        log.commit(replace(there, version=VersionId(1, 9)))
    assert log.checkpoints() == (there,)


@pytest.mark.parametrize("keep_last", [2, 20])
def test_a_prune_costs_a_few_requests_and_one_per_object_removed(keep_last: int) -> None:
    store = FaultyStore(MemoryStore())
    log = CommitLog(store, JOB)
    log.take_term("a", 0.0)
    for step in range(100, 151):
        part, data = sealed(step, data=f"{step:8d}".encode()), memoryview(f"{step:8d}".encode())
        ref = save_part(store, log, JOB, part, data, term=1, known=KnownChunks()).ref
        log.commit(Manifest(1, JOB, 1, part.version, 1, step, (ref,), 1.0))
        store.calls.clear()
        done = prune.execute(store, log, JOB, keep=Keep(keep_last), term=1)
        assert len(store.calls) - done.parts_removed - done.chunks_removed <= 5
        assert done.swept or done.parts_removed == done.chunks_removed == len(done.plan.drop)


def test_two_hundred_saves_leave_no_more_than_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some uploads are never committed, some prunes never run: nothing of it adds up."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # how durable the files are is not the question here
    store = FileStore(tmp_path)
    log = CommitLog(store, JOB)
    log.take_term("a", 0.0)
    per_save, most, since_swept = 4, 0, 0
    for number in range(1, 201):
        step = 10 * number
        if number % 7 == 0:
            upload(store, log, step - 1)
        save(store, step, log=log)
        if number % 11:
            done = prune.execute(store, log, JOB, keep=Keep(3), term=1)
            since_swept = 0 if done.swept else since_swept + 1
            assert since_swept <= prune.SWEEP_EVERY
        most = max(most, len(data_keys(store)))
    assert most <= per_save * (3 + prune.SWEEP_EVERY)
    assert expect_whole(store) == [1980, 1990, 2000]
    prune.sweep(store, JOB, log.checkpoints())
    assert len(data_keys(store)) <= per_save * 3 + 2


def test_what_the_log_holds_is_readable_without_this_program(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    CommitLog(store, JOB).take_term("a", 0.0)
    save(store, 10)
    save(store, 11)
    part = json.loads(store.get(CommitLog(store, JOB).checkpoints()[-1].parts[0].key))
    found = b"".join((tmp_path / f"jobs/{JOB}/chunks/{c['folder']}/{c['id']}").read_bytes() for c in part["chunks"])
    assert found == stream_of(11)
