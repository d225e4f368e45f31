"""A job that begins at another one's checkpoint: what it sends, and that neither's pruning harms the other, in any order.

With the explorer of the sweep's tests: both jobs in one store, one request at a time, every order, every crash.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import ray_dr
from ray_dr.cli.main import main
from ray_dr.errors import ConfigError, Fenced, NoCheckpoint, NotFound, StoreError
from ray_dr.model.checkpoint import Chunk, Manifest, Part, VersionId
from ray_dr.model.job import Keep
from ray_dr.repository import commit, layout, prune
from ray_dr.repository.check import chunk_units, take_inventory
from ray_dr.repository.chunks import KnownChunks, chunk_id
from ray_dr.repository.commit import BaseEntry, CommitLog, LogView
from ray_dr.repository.saving import SavedPart, save_part
from ray_dr.repository.sharing import take_base
from ray_dr.stores.base import Store
from ray_dr.stores.disk import FileStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.open import open_store
from tests.unit import test_repository_sweep
from tests.unit.test_repository_sweep import PIECE, Actor, World, distinct, ends, explore, objects_of, restored, whole

__all__ = ["whole"]

ROOT = Path(__file__).parents[2]
A, B, C = "base", "tuned", "third"
BYTES = {"frozen": b"frozen  ", "a": b"of A    ", "b": b"of B    ", "new": b"of B new"}
"""What streams are made of: one piece each."""


def stream_of(step: int) -> bytes:
    """A's are at steps from 10, all from 30 on lack `frozen`. Of the others' 5 to 7 have nothing that A has, and 9 has
    nothing that anybody has."""
    names = {5: ("new", "b"), 6: ("new", "b"), 7: ("new", "b"), 9: ("new", "new")}.get(step, ("frozen", "b"))
    names = ("a", "a") if step >= 30 else ("frozen", "a") if step >= 10 else names
    return b"".join(BYTES[name] for name in names) + f"{step:8d}".encode()


def upload(store: Store, log: CommitLog, job: str, step: int) -> SavedPart:
    data = stream_of(step)
    chunks = tuple(Chunk(chunk_id(data[at : at + PIECE]), at, PIECE) for at in range(0, len(data), PIECE))
    part = Part(VersionId(1, step), 0, 1, len(data), (), chunks)
    return save_part(store, log, job, part, memoryview(data), term=1, known=KnownChunks())


def put(store: Store, log: CommitLog, job: str, step: int) -> tuple[Manifest, int]:
    """What is to be committed, and how many bytes were sent."""
    saved = upload(store, log, job, step)
    return Manifest(1, job, 1, VersionId(1, step), 1, step, (saved.ref,), 1.0), saved.sent


def save(store: Store, log: CommitLog, job: str, step: int) -> int:
    manifest, sent = put(store, log, job, step)
    log.commit(manifest)
    return sent


def started(*jobs: str) -> MemoryStore:
    """Jobs that have begun; A has a checkpoint at step 20."""
    store = MemoryStore()
    for job in jobs:
        CommitLog(store, job).take_term("x", 0.0)
    save(store, CommitLog(store, A), A, 20)
    return store


def expect_whole(store: Store) -> list[int]:
    """Steps of all checkpoints, of both jobs; each restores bit by bit."""
    found = [manifest for job in (A, B) for manifest in CommitLog(store, job).checkpoints()]
    for manifest in found:
        assert restored(store, manifest) == stream_of(manifest.version.step)
    return [manifest.version.step for manifest in found]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_repository_sweep, "expect_whole", expect_whole)
    monkeypatch.setattr(prune, "SWEEP_EVERY", 1)
    monkeypatch.setattr(prune, "ThreadPoolExecutor", test_repository_sweep.Serial)
    monkeypatch.setattr(commit, "ThreadPoolExecutor", test_repository_sweep.Serial)


def known(start: Mapping[str, bytes], job: str) -> LogView:
    store = MemoryStore()
    store._space.objects.update(start)
    return CommitLog(store, job).refresh()


def actor(start: Mapping[str, bytes], job: str, *does: str | int | Manifest) -> Actor:
    """What one process of a job does: a step to save, a manifest to commit, "base" to take, or "prune"."""
    view = known(start, job)

    def act(store: Store) -> None:
        log = CommitLog(store, job)
        log._view = view
        for what in does:
            with contextlib.suppress(StoreError, Fenced):
                if what == "base":
                    take_base(store, log, job, A)
                elif what == "prune":
                    prune.execute(store, log, job, keep=Keep(1), term=1, whole=True)
                elif isinstance(what, Manifest):
                    log.commit(what)
                else:
                    assert isinstance(what, int)
                    save(store, log, job, what)

    return act


def swept(worlds: Sequence[World]) -> None:
    """After one more prune of each job nothing is left but what is named or held."""
    for world in distinct(world for world in worlds if set(world.answers) == {None}):
        store = world.store()
        for job in (B, A):
            prune.execute(store, CommitLog(store, job), job, keep=Keep(1), term=1, whole=True)
        expect_whole(store)
        views = [CommitLog(store, job).refresh() for job in (A, B)]
        if views[0].holds:
            assert views[1].base is not None
            assert views[1].base.manifest == views[0].holds[0].manifest
        kept = [m for view in views for m in (*view.checkpoints, *(hold.manifest for hold in view.holds))]
        folders = {layout.folder_of(ref.key) for manifest in kept for ref in manifest.parts}
        named = set(take_inventory(store, A, views[0]).chunks) | set(take_inventory(store, B, views[1]).chunks)
        newest = {job: view.newest for job, view in zip((A, B), views, strict=True)}
        for entry in store.list("jobs/"):
            version = layout.version_of(entry.key)
            if version and layout.folder_of(entry.key) not in folders:
                assert entry.key in named or version > (newest[entry.key.split("/")[1]] or VersionId(0, 0))


# ---------------------------------------------------------------------------------------------------- one after another


def test_a_tuned_job_sends_only_what_its_base_lacks() -> None:
    store = started(A, B)
    log = CommitLog(store, B)
    taken = take_base(store, log, B, A)
    assert taken is not None
    assert save(store, log, B, 1) == 2 * PIECE
    assert save(store, log, B, 2) == PIECE
    assert expect_whole(store) == [20, 1, 2]
    chunks = take_inventory(store, B, log.refresh())
    assert chunks.damaged == ()
    assert sum(layout.chunks_prefix(A) in key for key in chunks.chunks) == 1
    assert all(not unit.look() for unit in chunk_units(store, B, chunks))


def test_a_check_of_the_tuned_job_sees_what_the_base_lost() -> None:
    store = started(A, B)
    log = CommitLog(store, B)
    take_base(store, log, B, A)
    save(store, log, B, 1)
    (key,) = (key for key in take_inventory(store, B, log.refresh()).chunks if key.startswith(layout.chunks_prefix(A)))
    store.delete(key)
    (damage,) = take_inventory(store, B, log.refresh()).damaged
    assert (damage.key, damage.what, damage.versions) == (key, "is missing", (VersionId(1, 1),))


def test_the_base_keeps_what_is_held_and_lets_it_go_with_the_last_checkpoint_that_needs_it(both: None) -> None:
    store = started(A, B)
    a, b = CommitLog(store, A), CommitLog(store, B)
    take_base(store, b, B, A)
    save(store, b, B, 1)
    held = next(iter(a.refresh().holds)).manifest.parts[0].key
    for step in (30, 40):
        save(store, a, A, step)
        prune.execute(store, a, A, keep=Keep(1), term=1)
    assert [each.version.step for each in a.checkpoints()] == [40]
    assert store.get(held)
    assert CommitLog(store, A).refresh().holds == a.refresh().holds, "a kept entry repeats them"
    for step in (2, 5):
        assert CommitLog(store, B).refresh().base == b.refresh().base
        prune.execute(store, b, B, keep=Keep(1), term=1)
        assert a.refresh().holds
        save(store, b, B, step)
    prune.execute(store, b, B, keep=Keep(1), term=1)
    assert a.refresh().holds == ()
    assert b.refresh().base == BaseEntry(A, None)
    prune.execute(store, a, A, keep=Keep(1), term=1, whole=True)
    with pytest.raises(NotFound):
        store.get(held)
    assert expect_whole(store) == [40, 5]


def test_a_base_is_taken_once_and_never_again(both: None) -> None:
    store = started(A, B)
    a, b = CommitLog(store, A), CommitLog(store, B)
    taken = take_base(store, b, B, A)
    save(store, a, A, 30)
    assert take_base(store, CommitLog(store, B), B, A) == taken
    assert not CommitLog(store, B).base(BaseEntry(A, a.checkpoints()[-1]), seen=LogView())
    save(store, b, B, 5)
    prune.execute(store, b, B, keep=Keep(1), term=1)
    assert take_base(store, b, B, A) is None
    assert a.refresh().holds == ()


def test_a_job_with_checkpoints_goes_its_own_way() -> None:
    store = started(A, B)
    b = CommitLog(store, B)
    save(store, b, B, 1)
    assert take_base(store, b, B, A) is None
    assert CommitLog(store, A).refresh().holds == ()


def test_a_base_that_was_dropped_or_never_was_is_refused() -> None:
    store = started(A, B)
    a = CommitLog(store, A)
    old = a.checkpoints()[0]
    save(store, a, A, 30)
    assert a.keep(a.checkpoints()[-1:], term=1, seen=a.refresh())
    assert not a.hold(old, B)
    assert a.refresh().holds == ()
    with pytest.raises(NoCheckpoint, match="job third has no committed checkpoint"):
        take_base(store, CommitLog(store, B), B, C)
    with pytest.raises(ConfigError, match="itself"):
        take_base(store, CommitLog(store, B), B, B)


def test_a_hold_that_was_left_by_a_crash_is_released_with_the_next_start() -> None:
    store = started(A, B)
    a, b = CommitLog(store, A), CommitLog(store, B)
    assert a.hold(a.checkpoints()[-1], B)  # and then it dies
    save(store, a, A, 30)
    assert take_base(store, b, B, A) == a.checkpoints()[-1]
    assert take_base(store, b, B, A) == a.checkpoints()[-1]
    assert [hold.manifest.version.step for hold in a.refresh().holds] == [30]


def test_what_a_base_has_from_a_third_job_stays_as_long_as_the_last_needs_it(both: None) -> None:
    store = started(A, B, C)
    for job, other in ((B, A), (C, B)):
        take_base(store, CommitLog(store, job), job, other)
        save(store, CommitLog(store, job), job, 1)
    save(store, CommitLog(store, A), A, 30)
    save(store, CommitLog(store, B), B, 5)
    for _ in range(2):
        for job in (A, B, C):
            prune.execute(store, CommitLog(store, job), job, keep=Keep(1), term=1)
    (third,) = CommitLog(store, C).checkpoints()
    assert restored(store, third) == stream_of(1)
    save(store, CommitLog(store, C), C, 9)
    for _ in range(2):
        for job in (C, B, A):
            prune.execute(store, CommitLog(store, job), job, keep=Keep(1), term=1)
    assert [CommitLog(store, job).refresh().holds for job in (A, B)] == [(), ()]


def test_an_entry_without_holds_is_written_as_before(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    log = CommitLog(store, A)
    log.take_term("x", 0.0)
    save(store, log, A, 20)
    assert log.keep(log.checkpoints(), term=1, seen=log.refresh())
    assert b"holds" not in store.get(layout.log_key(A, 3))
    assert b'"base":null' not in store.get(layout.log_key(A, 3))


@pytest.mark.parametrize("key", ["", "?key=env:SHARING_KEY"])
def test_a_fine_tune_is_saved_restored_and_rescued(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARING_KEY", "5a" * 32)
    url = f"file://{tmp_path / 'store'}{key}"
    base = {"frozen": torch.rand(1000, 200), "head": torch.rand(300, 1000)}
    tuned = base | {"head": base["head"] + 1}
    ray_dr.save({"model": base}, url, job=A)
    assert ray_dr.save({"model": tuned}, url, job=B, share_with=A).sent <= tuned["head"].nbytes + 4096
    ray_dr.save({"model": {"frozen": torch.rand(1000, 200)}}, url, job=A)
    store = open_store(url)
    prune.execute(store, CommitLog(store, A), A, keep=Keep(1), term=None, whole=True)
    told = CliRunner().invoke(main, ["prune", A, "--store", url, "--keep", "last=1"]).output
    assert "the objects of step 0 stay: job tuned shares them" in told
    found = {"model": {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}}
    ray_dr.load(found, url, job=B)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in tuned.items())
    if not key:
        target = tmp_path / "found"
        command = [sys.executable, str(ROOT / "rescue.py"), str(tmp_path / "store"), B, "--to", str(target)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        for name, tensor in tuned.items():
            assert np.array_equal(np.load(target / f"model%2F{name}.npy"), tensor.numpy())


# ------------------------------------------------------------------------------------------------------ in every order


def test_a_base_that_prunes_while_another_job_begins_harms_neither(both: None) -> None:
    start, *actors = beginning()
    worlds = explore(start, *actors)
    assert len(worlds) > 100
    assert ends(worlds) >= {(30, 1)}
    swept(worlds)


def beginning() -> tuple[dict[str, bytes], Actor, Actor]:
    """A is about to commit a checkpoint that names little of the one before, and to drop that; B begins at either."""
    store = started(A, B)
    coming, _ = put(store, CommitLog(store, A), A, 30)
    start = objects_of(store)
    return start, actor(start, A, coming, "prune"), actor(start, B, "base", 1)


def save_under_way() -> tuple[dict[str, bytes], Actor, Actor, Actor]:
    """B has put a part that names what A's checkpoint has, and is about to commit it; meanwhile it committed one that does
    not, and prunes, as A does."""
    store = started(A, B)
    log = CommitLog(store, B)
    take_base(store, log, B, A)
    coming, _ = put(store, log, B, 8)
    save(store, log, B, 5)
    save(store, CommitLog(store, A), A, 30)
    start = objects_of(store)
    return start, actor(start, B, coming), actor(start, B, "prune"), actor(start, A, "prune")


def test_a_base_that_is_closed_beside_a_save_that_needs_it_harms_nothing(both: None) -> None:
    start, *actors = save_under_way()
    worlds = explore(start, *actors)
    assert len(worlds) > 100
    swept(worlds)
    assert ends(worlds) == {(30, 5), (30, 8), (30, 5, 8)}
    released = {bool(CommitLog(world.store(), A).refresh().holds) for world in distinct(worlds)}
    assert released == {True, False}


@pytest.mark.parametrize("broken", ["no hold", "closed base", "unseen holds", "released first"])
def test_each_rule_is_needed(broken: str, both: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any of them the explorer finds a checkpoint with missing objects: the tests above could fail."""
    start, *actors = save_under_way()
    match broken:
        case "no hold":
            monkeypatch.setattr(CommitLog, "hold", lambda log, manifest, holder: True)
            start, *actors = beginning()
        case "closed base":
            real = commit.too_late
            monkeypatch.setattr(commit, "too_late", lambda m, v: "" if "reuses" in (why := real(m, v)) else why)
        case "unseen holds":
            remove = prune._remove
            monkeypatch.setattr(prune, "_remove", lambda *given: remove(*given[:6]))
        case "released first":
            monkeypatch.setattr(prune, "let_go", lambda store, log, job: CommitLog(store, A).release(B))
    with pytest.raises(NotFound):
        explore(start, *actors)
