"""Pruning: what it keeps stays whole, what it drops is gone, at whatever point it stops."""

from __future__ import annotations

import pytest

from ray_dr.errors import Fenced, StoreUnavailable
from ray_dr.model.checkpoint import Manifest, Part, VersionId
from ray_dr.model.job import Keep
from ray_dr.repository import layout, prune
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.parts import read_part, write_part
from ray_dr.stores.base import Store
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore


def save(store: Store, log: CommitLog, step: int, *, term: int = 1, attempt: int = 1) -> None:
    log.commit(upload(store, step, term=term, attempt=attempt))


def upload(store: Store, step: int, *, term: int = 1, attempt: int = 1) -> Manifest:
    version = VersionId(attempt, step)
    refs = tuple(write_part(store, "j", Part(version, rank, 2, 0, (), ()), term=term) for rank in (0, 1))
    return Manifest(1, "j", term, version, 2, step, refs, 1.0)


def kept_steps(store: Store) -> list[int]:
    """Steps of the checkpoints a new reader finds; each must be readable."""
    found = CommitLog(store, "j").checkpoints()
    for manifest in found:
        for ref in manifest.parts:
            read_part(store, ref)
    return [manifest.version.step for manifest in found]


def stored_steps(store: Store) -> set[int]:
    versions = [layout.version_of(entry.key) for entry in store.list(layout.parts_prefix("j"))]
    return {version.step for version in versions if version}


def test_a_plan_keeps_the_last_and_says_why() -> None:
    manifests = [Manifest(1, "j", 1, VersionId(1, step), 1, 0, (), 0.0) for step in range(5)]
    plan = prune.plan_prune(manifests, Keep(2))
    assert [verdict.manifest.version.step for verdict in plan.keep] == [3, 4]
    assert [verdict.manifest.version.step for verdict in plan.drop] == [0, 1, 2]
    assert plan.keep[-1].reason == "number 1 of the last 2"
    assert all(verdict.reason for verdict in plan.drop)
    assert prune.plan_prune([], Keep(2)) == prune.PrunePlan((), ())


def test_dropped_checkpoints_lose_their_parts_and_kept_ones_stay() -> None:
    store = MemoryStore()
    log = CommitLog(store, "j")
    log.take_term("a", 0.0)
    for step in range(6):
        save(store, log, step)
    done = prune.execute(store, log, "j", keep=Keep(2), term=1)
    assert done.parts_removed == 8
    assert kept_steps(store) == [4, 5]
    assert stored_steps(store) == {4, 5}
    assert prune.execute(store, log, "j", keep=Keep(2), term=1).parts_removed == 0
    save(store, log, 6)
    assert kept_steps(store) == [4, 5, 6]


def test_a_save_under_way_is_left_alone_and_an_old_unfinished_one_removed() -> None:
    store = MemoryStore()
    log = CommitLog(store, "j")
    log.take_term("a", 0.0)
    upload(store, 1)
    for step in (2, 3, 4):
        save(store, log, step)
    coming = upload(store, 5)
    prune.execute(store, log, "j", keep=Keep(2), term=1)
    assert stored_steps(store) == {3, 4, 5}
    log.commit(coming)
    assert kept_steps(store) == [3, 4, 5]


def test_a_fenced_supervisor_prunes_nothing() -> None:
    store = MemoryStore()
    log = CommitLog(store, "j")
    log.take_term("a", 0.0)
    for step in range(4):
        save(store, log, step)
    CommitLog(store, "j").take_term("b", 0.0)
    with pytest.raises(Fenced):
        prune.execute(store, log, "j", keep=Keep(1), term=1)
    assert kept_steps(store) == [0, 1, 2, 3]


@pytest.mark.parametrize("operation", ["put", "delete", "list"])
def test_stopping_at_any_request_damages_nothing_and_the_next_run_finishes(operation: str) -> None:
    for survived in range(8):
        store = FaultyStore(MemoryStore())
        log = CommitLog(store, "j")
        log.take_term("a", 0.0)
        for step in range(5):
            save(store, log, step)
        store.slow(operation, 0.0, times=survived)  # type: ignore[arg-type]
        store.fail(operation)  # type: ignore[arg-type]
        try:
            prune.execute(store, log, "j", keep=Keep(2), term=1)
        except StoreUnavailable:
            assert kept_steps(store)[-2:] == [3, 4]
        store._faults.clear()
        prune.execute(store, log, "j", keep=Keep(2), term=1)
        assert kept_steps(store) == [3, 4]
        assert stored_steps(store) == {3, 4}
