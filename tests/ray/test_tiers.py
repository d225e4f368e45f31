"""What a job goes on from when memory, the nodes' disks or its first store are lost: the nearest tier that is left."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import ray

from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.job import DiskTier, Every, Job, MemoryTier, StoreTier, Workers
from ray_dr.model.journal import Record, Restored, VersionSaved, Where
from ray_dr.repository.commit import CommitLog
from ray_dr.stores.open import open_store
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = pytest.mark.ray
STEPS = 120
SELDOM = Every(steps=40)


def spec_of(name: str, root: Path, **changes: object) -> Job:
    spec = jobs.held(name, f"file://{root}/store", STEPS)
    return jobs.replace(
        spec,
        store=StoreTier(f"file://{root}/store", SELDOM),
        second=StoreTier(f"file://{root}/second", SELDOM),
        disk=DiskTier(f"file://{root}/disk", Every(steps=7)),
        **changes,
    )


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    spec = jobs.at_once(spec_of("undisturbed", tmp_path_factory.mktemp("undisturbed")))
    running = jobs.start(replicated, spec)
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)
    first, second = jobs.final_state(spec), jobs.final_state(jobs.replace(spec, store=spec.second))
    assert first == second, "the second store has the final checkpoint too"
    return first


def restores(running: jobs.Running) -> list[Restored]:
    return [record for record in running.records() if isinstance(record, Restored)]


def sources(records: list[Record], attempt: int) -> Counter[str]:
    total: Counter[str] = Counter()
    for record in records:
        if isinstance(record, Restored) and record.attempt == attempt:
            total.update(record.sources)
    return total


def test_with_all_nodes_and_the_supervisor_gone_at_once_the_job_goes_on_from_the_nodes_disks(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    spec = spec_of("disks", tmp_path)
    running = jobs.start(replicated, spec)

    def on_disk() -> bool:
        rows = [row for row in running.snapshot()["tiers"]["rows"] if row["where"] == "disk"]
        return any(row["version"]["step"] > 42 and len(row["copies"]) == 2 for row in rows)

    jobs.until(on_disk, "a version on both disks that is newer than the store's")
    now = running.snapshot()
    for node in now["nodes"]:
        cluster.kill_node(node)
    if now["supervisor"]["node"] not in now["nodes"]:
        jobs.sigkill(now["supervisor"]["pid"])
    jobs.until(lambda: any(r.version.step > 40 for r in restores(running)), "a restore of more than the store has")
    again = next(record for record in restores(running) if record.version.step > 40)
    assert set(sources(running.records(), again.attempt)) == {"disk"}
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)
    assert jobs.final_state(spec) == undisturbed


def test_with_the_first_store_and_the_disks_lost_the_job_goes_on_from_the_second_store(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    spec = spec_of("second", tmp_path)
    running = jobs.start(replicated, spec)
    stopped = running.wait_for_step(50)["step"]
    ray.get(running.handle.stop.remote(60.0, "a test"))
    assert running.outcome().drained
    for lost in ("store", "disk"):
        shutil.rmtree(tmp_path / lost)
    running = jobs.start(replicated, spec)
    assert running.outcome().step == STEPS
    again = restores(running)[-1]
    assert again.version.step >= stopped
    assert set(sources(running.records(), again.attempt)) == {"second"}
    assert jobs.final_state(spec) == undisturbed
    assert jobs.final_state(jobs.replace(spec, store=spec.second)) == undisturbed


def test_a_finished_job_run_again_without_its_first_store_leaves_its_last_version_there(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    spec = jobs.at_once(spec_of("finished", tmp_path))
    assert jobs.start(replicated, spec).outcome().step == STEPS
    for lost in ("store", "disk"):
        shutil.rmtree(tmp_path / lost)
    running = jobs.start(replicated, spec)
    assert running.outcome().step == STEPS
    (again,) = {record.version for record in restores(running)}
    assert again.step == STEPS
    for tier in (spec, jobs.replace(spec, store=spec.second)):
        assert jobs.final_state(tier) == undisturbed
    running = jobs.start(replicated, spec)
    assert running.outcome().step == STEPS
    newest = [m.version for m in CommitLog(open_store(spec.store.url), spec.name).checkpoints()]
    assert newest == [restores(running)[-1].version], "both have it: nothing is saved once more"


def test_the_parts_of_several_workers_of_a_node_reach_every_place(cluster: LocalCluster, tmp_path: Path) -> None:
    spec = spec_of("two-per-node", tmp_path, workers=Workers(1, 1, 1, per_node=2, cpus_per_worker=0.5))
    running = jobs.start(replicated, spec)
    running.wait_for_step(50)
    rows = running.snapshot()["tiers"]["rows"]
    assert any(row["where"] == "disk" and len({rank for rank, _ in row["copies"]}) == 2 for row in rows)
    assert running.outcome().step == STEPS
    for tier in (spec.store, spec.second):
        assert tier is not None
        steps = [manifest.version.step for manifest in CommitLog(open_store(tier.url), spec.name).checkpoints()]
        assert 40 in steps
        assert STEPS in steps
    jobs.assert_exact_data(running)


def test_three_copies_outlive_two_nodes_at_once(cluster: LocalCluster, tmp_path: Path) -> None:
    spec = jobs.held("copies", f"file://{tmp_path}/store", STEPS, nodes=(3, 3, 1))
    spec = jobs.replace(spec, store=StoreTier(f"file://{tmp_path}/store", SELDOM), memory=MemoryTier(Every(steps=1), 3))
    running = jobs.start(replicated, spec)
    now = running.wait_for_step(50)
    armed = jobs.until(lambda: running.snapshot()["tiers"]["armed"], "a version with three copies of each part")
    assert armed["step"] > 40
    keep = now["supervisor"]["node"] if now["supervisor"]["node"] in now["nodes"] else now["nodes"][0]
    for node in now["nodes"]:
        if node != keep:
            cluster.kill_node(node)
    jobs.until(lambda: restores(running), "a restore")
    running.outcome()
    records = running.records()
    first = next(r for r in records if isinstance(r, Restored))
    assert first.version.step > 40, "not from the store"
    assert "store" not in first.sources
    assert any(isinstance(r, VersionSaved) and r.where is Where.PEER for r in records)
