"""What goes wrong besides dying machines: stores that fail, checkpoints that do not fit, programs with mistakes, two masters."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from ray_dr.actors.leaks import find_leaks
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.errors import JobFailed
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.job import Every, Job, MemoryTier, StoreTier
from ray_dr.model.journal import Noted, Restored, VersionSaved, Where
from ray_dr.repository.commit import CommitLog
from ray_dr.stores.open import open_store
from tests.ray import jobs
from tests.ray.programs import another, failing, failing_once, replicated, sharded

pytestmark = pytest.mark.ray


def test_the_same_error_twice_ends_the_job_and_says_not_to_resubmit(cluster: LocalCluster, tmp_path: Path) -> None:
    running = jobs.start(failing, jobs.job("mistake", f"file://{tmp_path}", 50))
    with pytest.raises(JobFailed, match="a mistake in the loss") as caught:
        running.outcome()
    assert not caught.value.resubmit
    assert "do not resubmit" in str(caught.value)
    assert find_leaks(cluster).total == 0


def test_an_error_that_does_not_come_back_is_survived(cluster: LocalCluster, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    spec = jobs.job("passing", f"file://{tmp_path}", 30)
    running = jobs.start(failing_once, replace(spec, settings={**spec.settings, "marker": str(marker)}))
    assert running.outcome().step == 30
    jobs.assert_exact_data(running)


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(cluster: LocalCluster, tmp_path: Path) -> None:
    spec = jobs.job("other", f"file://{tmp_path}", 10)
    assert jobs.start(replicated, spec).outcome().step == 10
    before = jobs.final_state(spec)
    with pytest.raises(JobFailed, match="does not fit this program") as caught:
        jobs.start(another, spec).outcome()
    for difference in ("model/0.weight", "model/3.weight", "optimizer/"):
        assert difference in str(caught.value)
    assert jobs.final_state(spec) == before


def test_training_goes_on_while_the_store_is_away_and_catches_up(cluster: LocalCluster, tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    running = jobs.start(replicated, jobs.job("store-away", f"file://{home}", 160))
    running.wait_for_step(30)
    home.rename(away)
    running.wait_for_step(80)
    away.rename(home)
    assert running.outcome().step == 160
    records = running.records()
    assert [r for r in records if isinstance(r, Noted) and r.name == "store.unavailable"]
    assert [r for r in records if isinstance(r, VersionSaved) and r.where is Where.STORE][-1].version.step == 160
    jobs.assert_exact_data(running)


def damage(store: Path, version: VersionId) -> None:
    """Flip a bit of every chunk that a version's save put."""
    folder = f"{version.attempt:06d}-{version.step:012d}-*"
    chunks = [path for path in (store / "jobs" / "corrupt" / "chunks").glob(f"{folder}/*") if path.is_file()]
    assert chunks
    for chunk in chunks:
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)


def test_a_corrupt_version_in_the_store_is_never_restored_an_older_one_is(cluster: LocalCluster, tmp_path: Path) -> None:
    spec = jobs.job("corrupt", f"file://{tmp_path}", 60)
    spec = replace(spec, store=StoreTier(f"file://{tmp_path}", Every(steps=20)))
    assert jobs.start(replicated, spec).outcome().step == 60
    good = jobs.final_state(spec)
    versions = [m.version for m in CommitLog(open_store(spec.store.url), spec.name).checkpoints()]
    assert [version.step for version in versions] == [20, 40, 60]
    damage(tmp_path, versions[-1])
    again = jobs.start(replicated, spec)
    assert again.outcome().step == 60
    assert jobs.final_state(spec) == good
    assert {r.version.step for r in again.records() if isinstance(r, Restored)} == {40}
    assert {"chunk.corrupt", "version.unreadable"} <= {r.name for r in again.records() if isinstance(r, Noted)}


def test_when_every_version_is_corrupt_the_job_says_so(cluster: LocalCluster, tmp_path: Path) -> None:
    spec = jobs.job("corrupt", f"file://{tmp_path}", 10)
    assert jobs.start(replicated, spec).outcome().step == 10
    for manifest in CommitLog(open_store(spec.store.url), spec.name).checkpoints():
        damage(tmp_path, manifest.version)
    longer = replace(spec, settings={**spec.settings, "steps": 20})
    with pytest.raises(JobFailed, match=r"no good copy|does not match its hash|CheckpointError"):
        jobs.start(replicated, longer).outcome()
    notes = [r for r in jobs.Running(spec, None, None, {}).records() if isinstance(r, Noted)]  # type: ignore[arg-type]
    assert "chunk.corrupt" in {note.name for note in notes}


def test_a_supervisor_of_an_older_term_is_fenced(cluster: LocalCluster, tmp_path: Path) -> None:
    running = jobs.start(replicated, jobs.job("fenced", f"file://{tmp_path}", 400))
    running.wait_for_step(20)
    CommitLog(open_store(running.spec.store.url), "fenced").take_term("another cluster", time.time())
    with pytest.raises(JobFailed, match="term 2 owns the job"):
        running.outcome()
    newest = CommitLog(open_store(running.spec.store.url), "fenced").newest()
    assert newest is None or newest.term == 1
    assert find_leaks(cluster).total == 0


def test_sharded_state_survives_a_kill_and_a_resize_to_the_same_bytes(cluster: LocalCluster, tmp_path: Path) -> None:
    calm = jobs.at_once(jobs.job("sharded-calm", f"file://{tmp_path / 'calm'}", 120))
    assert jobs.start(sharded, calm).outcome().step == 120
    running = jobs.start(sharded, jobs.held("sharded", f"file://{tmp_path / 'killed'}", 120))
    running.wait_for_step(30)
    jobs.sigkill(running.workers()[0]["pid"])
    running.wait_for_world(1)
    running.wait_for_world(2)
    assert running.outcome().step == 120
    assert jobs.final_state(running.spec) == jobs.final_state(calm)
    kinds = {kind for record in running.records() if isinstance(record, Restored) for kind in record.sources}
    assert kinds, "it was restored"
    assert kinds <= {"memory", "peer"}, "from memory, its own nodes' or another's"


def test_without_deterministic_the_same_world_gives_the_same_bytes(cluster: LocalCluster, tmp_path: Path) -> None:
    """Waits for the replacement instead of going on smaller: the number of workers is the same all the time."""

    def plain(name: str) -> Job:
        spec = jobs.held(name, f"file://{tmp_path / name}", 80, nodes=(2, 2, 2), deterministic=False)
        return replace(spec, settings={**spec.settings, "micro": 0}, memory=MemoryTier(Every(steps=1)))

    calm = jobs.at_once(plain("calm"))
    assert jobs.start(replicated, calm).outcome().step == 80
    running = jobs.start(replicated, plain("disturbed"))
    lost = running.wait_for_step(20)["nodes"][0]
    cluster.kill_node(lost)
    assert running.outcome().step == 80
    assert {r.record.world for r in running.records() if type(r).__name__ == "Stepped"} == {2}
    jobs.assert_exact_data(running)
    assert jobs.final_state(running.spec) == jobs.final_state(calm)
