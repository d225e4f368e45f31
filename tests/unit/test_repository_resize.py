"""Chunks reused after a change of the world size: what is sent, and that pruning harms nothing, in any order."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pytest

from ray_dr.errors import Fenced, NotFound, StoreError
from ray_dr.model.checkpoint import Chunk, Manifest, Part, VersionId
from ray_dr.repository import commit, prune, saving
from ray_dr.repository.chunks import KnownChunks, chunk_id
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.parts import read_part
from ray_dr.repository.saving import SavedPart, save_part
from ray_dr.stores.base import Store
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore
from tests.unit.test_repository_sweep import (
    JOB,
    PIECE,
    Actor,
    distinct,
    ends,
    expect_no_garbage,
    expect_whole,
    explore,
    informed_log,
    objects_of,
    pruner,
    stream_of,
    view_of,
    whole,
)

__all__ = ["whole"]


def upload(store: Store, log: CommitLog, step: int, *, world: int, attempt: int) -> list[SavedPart]:
    """The stream of a step, its three pieces dealt to the ranks from the first to the last."""
    version, data, found = VersionId(attempt, step), stream_of(step), []
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    for rank in range(world):
        mine = pieces[rank * 3 // world : (rank + 1) * 3 // world]
        chunks = tuple(Chunk(chunk_id(piece), n * PIECE, PIECE) for n, piece in enumerate(mine))
        part = Part(version, rank, world, len(mine) * PIECE, (), chunks)
        found.append(save_part(store, log, JOB, part, memoryview(b"".join(mine)), term=1, known=KnownChunks()))
    return found


def save(store: Store, log: CommitLog, step: int, *, world: int, attempt: int) -> int:
    saved = upload(store, log, step, world=world, attempt=attempt)
    refs = tuple(each.ref for each in saved)
    log.commit(Manifest(1, JOB, 1, VersionId(attempt, step), world, step, refs, 1.0))
    return sum(each.sent for each in saved)


def started(*worlds: int) -> tuple[MemoryStore, CommitLog]:
    """Checkpoints at steps 20, 40, ..., which have two of three pieces in common, each of another world."""
    store = MemoryStore()
    log = CommitLog(store, JOB)
    log.take_term("a", 0.0)
    for number, world in enumerate(worlds, 1):
        save(store, log, 20 * number, world=world, attempt=number)
    return store, log


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (3, 2), (2, 3), (1, 3), (3, 1)])
def test_another_world_sends_only_what_changed(worlds: tuple[int, int]) -> None:
    store, log = started(worlds[0])
    assert save(store, log, 40, world=worlds[1], attempt=2) == PIECE
    assert expect_whole(store) == [20, 40]
    base = {ref.base for ref in log.checkpoints()[-1].parts if ref.base}
    assert base <= {ref.digest for ref in log.checkpoints()[0].parts}
    assert base


def test_the_same_world_reads_its_own_part_list_alone() -> None:
    memory, _ = started(3)
    store = FaultyStore(memory)
    log = CommitLog(store, JOB)
    log.refresh()
    store.calls.clear()
    upload(store, log, 40, world=3, attempt=1)
    lists = [call for call in store.calls if call[0] == "get" and "/parts/" in call[1]]
    assert len(lists) == len(set(lists)) == 3


def test_the_part_lists_read_after_a_resize_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LISTS_MAX", 1)
    store, log = started(3)
    saved = upload(store, log, 40, world=1, attempt=2)
    assert saved[0].sent == 2 * PIECE  # of rank 1, the nearest, alone
    (base,) = (ref.digest for ref in log.checkpoints()[0].parts if ref.rank == 1)
    assert saved[0].ref.base == base


def test_a_list_that_is_damaged_costs_only_its_own_chunks() -> None:
    store, log = started(3)
    store.put(log.checkpoints()[0].parts[0].key, b"{}")
    assert save(store, log, 40, world=1, attempt=2) == 2 * PIECE
    assert CommitLog(store, JOB).checkpoints()[-1].parts[0].base == log.checkpoints()[0].parts[1].digest
    assert read_part(store, log.checkpoints()[-1].parts[0]).size == 3 * PIECE


def test_a_checkpoint_that_reuses_a_dropped_one_of_another_world_is_refused() -> None:
    store, log = started(3)
    saved = upload(store, log, 40, world=1, attempt=3)
    save(store, CommitLog(store, JOB), 30, world=1, attempt=2)
    seen = log.refresh()
    assert log.keep(seen.checkpoints[-1:], term=1, seen=seen)
    with pytest.raises(StoreError, match="dropped meanwhile"):
        log.commit(Manifest(1, JOB, 1, VersionId(3, 40), 1, 0, (saved[0].ref,), 1.0))


def writer(start: Mapping[str, bytes], step: int, *, world: int, attempt: int) -> Actor:
    view = view_of(start)

    def act(store: Store) -> None:
        with contextlib.suppress(StoreError, Fenced):
            save(store, informed_log(store, view), step, world=world, attempt=attempt)

    return act


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2)])
def test_a_prune_beside_saves_of_another_world_harms_nothing_in_any_order(worlds: tuple[int, int], whole: str) -> None:
    store, _ = started(worlds[0], worlds[0])
    start = objects_of(store)
    worlds_seen = explore(start, writer(start, 60, world=worlds[1], attempt=3), pruner(start))
    assert len(worlds_seen) > 50
    for world in distinct(world for world in worlds_seen if world.answers[0] is None):
        expect_no_garbage(world)
    assert ends(worlds_seen) >= {(60,), (40, 60)}


@pytest.mark.parametrize("grounded", [True, False])
@pytest.mark.parametrize("whole", ["each time"], indirect=True)
def test_a_base_of_another_world_that_is_dropped_is_noticed(
    grounded: bool, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rule that a base exists, the explorer finds a checkpoint with missing objects."""
    real = commit.too_late
    if not grounded:
        monkeypatch.setattr(commit, "too_late", lambda m, view: "" if "reuses" in (why := real(m, view)) else why)
    store, _ = started(2)
    start = objects_of(store)
    actors = writer(start, 50, world=2, attempt=2), writer(start, 60, world=1, attempt=3), pruner(start)
    if grounded:
        assert len(explore(start, *actors)) > 1000
    else:
        with pytest.raises(NotFound):
            explore(start, *actors)


def test_a_prune_removes_nothing_that_only_another_worlds_checkpoint_still_names() -> None:
    store, log = started(2, 1)
    prune.execute(store, log, JOB, keep=prune.Keep(1), term=1, whole=True)
    assert expect_whole(store) == [40]
