"""Checkpoints kept with gaps between them, damaged ones struck, and objects that stay for a grace: in any order.

With the explorer of the sweep's tests: all actors on one store, one request at a time, every order, every crash.
"""

from __future__ import annotations

import contextlib

import pytest

from ray_dr.errors import Fenced, NotFound, StoreError
from ray_dr.model.checkpoint import Manifest, VersionId
from ray_dr.model.job import Keep
from ray_dr.repository import commit, layout, prune
from ray_dr.repository.commit import CommitLog, LogView
from ray_dr.repository.parts import read_part
from ray_dr.stores.base import Store
from ray_dr.stores.memory import MemoryStore
from tests.unit.test_repository_sweep import (
    JOB,
    Actor,
    Serial,
    data_keys,
    ends,
    expect_whole,
    explore,
    informed_log,
    objects_of,
    restored,
    save,
    stream_of,
    view_of,
    writer,
)


@pytest.fixture(autouse=True)
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "ThreadPoolExecutor", Serial)
    monkeypatch.setattr(commit, "ThreadPoolExecutor", Serial)


def saved(*steps: int) -> MemoryStore:
    store = MemoryStore()
    CommitLog(store, JOB).take_term("a", 0.0)
    for step in steps:
        save(store, step)
    return store


def all_but(*steps: int) -> prune.Judge:
    """Takes some for damaged, which is a way to have any set of checkpoints kept."""
    return lambda manifests: {m.version: "damaged" for m in manifests if m.version.step in steps}


def pruner(start: dict[str, bytes], *dropped: int, grace_s: float = 0.0, whole: bool = True) -> Actor:
    """Somebody who doesn't own the job."""
    view = view_of(start)

    def act(store: Store) -> None:
        log = informed_log(store, view)
        with contextlib.suppress(StoreError, Fenced):
            prune.execute(
                store, log, JOB, keep=Keep(9), term=None, judge=all_but(*dropped), grace_s=grace_s, now=1.0, whole=whole
            )

    return act


@pytest.mark.parametrize("whole", [True, False])
def test_a_prune_that_leaves_gaps_beside_a_save_harms_no_checkpoint_in_any_order(whole: bool) -> None:
    start = objects_of(saved(20, 30, 40))
    worlds = explore(start, writer(start, 50), pruner(start, 30, whole=whole))
    assert ends(worlds) == {(20, 40, 50)}


def test_dropping_the_newest_beside_a_save_that_builds_on_it_harms_no_checkpoint_in_any_order() -> None:
    start = objects_of(saved(20, 40))
    worlds = explore(start, writer(start, 30, 50), pruner(start, 40))
    assert ends(worlds) >= {(20,), (20, 50)}
    assert all(30 not in steps for steps in ends(worlds))  # a version is never older than one that ever was


def test_that_versions_ascend_for_ever_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were only those that exist compared, a slow sweep would take what a struck version's elder has put."""
    start = objects_of(saved(20, 40))
    stale = view_of(start)

    def sweeper(store: Store) -> None:
        with contextlib.suppress(StoreError):
            prune.sweep(store, JOB, stale.checkpoints)

    def forgetful(manifest: Manifest, view: LogView) -> str:
        newest = max(known.version for known in view.checkpoints)
        named = {ref.digest for known in view.checkpoints for ref in known.parts}
        late = manifest.version <= newest or any(ref.base and ref.base not in named for ref in manifest.parts)
        return "too late" if late else ""

    explore(start, sweeper, writer(start, 30), pruner(start, 40))
    monkeypatch.setattr(commit, "too_late", forgetful)
    with pytest.raises(NotFound):
        explore(start, sweeper, writer(start, 30), pruner(start, 40))


def test_a_reader_has_the_grace_to_finish_in_any_order() -> None:
    start = objects_of(saved(20, 30, 40))
    old = next(m for m in view_of(start).checkpoints if m.version.step == 20)
    failed: list[str] = []

    def read(store: Store) -> None:
        try:
            assert restored(store, old) == stream_of(20)
        except NotFound as error:
            failed.append(error.key)

    explore(start, read, pruner(start, 20, 30, grace_s=60.0), writer(start, 50))
    assert not failed
    explore(start, read, pruner(start, 20, 30))
    assert failed


def test_dropped_objects_go_with_the_first_prune_after_the_grace() -> None:
    store = saved(20, 30, 40)
    log = CommitLog(store, JOB)
    before = data_keys(store)
    done = prune.execute(store, log, JOB, keep=Keep(1), term=None, grace_s=60.0, now=100.0, whole=True)
    assert (done.parts_removed, done.chunks_removed) == (0, 0)
    assert [(each.manifest.version.step, each.until) for each in done.pending] == [(20, 160.0), (30, 160.0)]
    assert expect_whole(store) == [40]
    assert data_keys(store) == before
    early = prune.execute(store, CommitLog(store, JOB), JOB, keep=Keep(1), term=1, now=159.0)
    assert len(early.pending) == 2
    assert data_keys(store) == before
    save(store, 50)
    late = prune.execute(store, CommitLog(store, JOB), JOB, keep=Keep(9), term=1, now=160.0, whole=True)
    assert not late.pending
    assert late.parts_removed == 2
    assert expect_whole(store) == [40, 50]
    assert CommitLog(store, JOB).refresh().pending == ()
    assert prune.sweep(store, JOB, CommitLog(store, JOB).checkpoints()) == (0, 0)


def test_what_lies_between_kept_checkpoints_goes() -> None:
    store = saved(10, 20, 30, 40, 50)
    log = CommitLog(store, JOB)
    prune.execute(store, log, JOB, keep=Keep(9), term=1, judge=all_but(20, 30, 40), whole=True)
    assert expect_whole(store) == [10, 50]
    kept = log.checkpoints()
    named = {layout.chunk_key(JOB, chunk) for m in kept for chunk in read_part(store, m.parts[0]).chunks}
    folders = {layout.folder_of(ref.key) for m in kept for ref in m.parts}
    assert all(key in named or layout.folder_of(key) in folders for key in data_keys(store))


def test_a_damaged_checkpoint_that_waits_does_not_stop_the_sweep() -> None:
    store = saved(20, 30, 40)
    log = CommitLog(store, JOB)
    store.put(log.checkpoints()[0].parts[0].key, b"{}")
    done = prune.execute(store, log, JOB, keep=Keep(1), term=1, judge=all_but(20), grace_s=9.0, now=0.0, whole=True)
    assert [verdict.manifest.version.step for verdict in done.plan.drop] == [20, 30]
    assert expect_whole(store) == [40]


def test_somebody_who_does_not_own_the_job_is_not_fenced_but_decides_anew() -> None:
    store = saved(20, 30)
    mine, other = CommitLog(store, JOB), CommitLog(store, JOB)
    seen = mine.refresh()
    other.take_term("b", 1.0)
    assert not mine.keep(seen.checkpoints[-1:], term=None, seen=seen)
    prune.execute(store, mine, JOB, keep=Keep(1), term=None)
    assert [m.version for m in other.checkpoints()] == [VersionId(1, 30)]
    assert other.refresh().term == 2
