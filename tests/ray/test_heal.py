"""Healing in place on a real cluster: a killed worker costs no step, and not one bit, however seldom the job saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_dr import Context
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.actions import FormGroup
from ray_dr.model.events import Rescued
from ray_dr.model.job import Every, Job, MemoryTier, StoreTier
from ray_dr.model.journal import Decided, Stepped
from ray_dr.telemetry.timeline import incidents
from tests.ray import jobs
from tests.ray.programs import loop, model, replicated

pytestmark = pytest.mark.ray
STEPS, KILL_AT, SELDOM = 120, 30, 50


def hybrid(ctx: Context) -> None:
    """FSDP2 over two shards, each on two ranks."""
    plain = model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for layer in plain:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(plain, mesh=mesh)
    loop(ctx, plain, plain.parameters())


def seldom(spec: Job) -> Job:
    """The same job, which saves at every 50th step only."""
    return replace(spec, memory=MemoryTier(Every(steps=SELDOM)), store=StoreTier(spec.store.url, Every(steps=SELDOM)))


def killed_and_compared(train: Any, spec: Job, undisturbed: dict[str, bytes], world: int) -> None:
    running = jobs.start(train, spec)
    running.wait_for_step(KILL_AT)
    standbys = spec.workers.standby_processes * spec.workers.nodes_max
    jobs.until(lambda: len(running.snapshot()["standbys"]) == standbys, "those that stand by")
    jobs.sigkill(next(worker["pid"] for worker in running.workers() if worker["rank"] == world - 1))
    running.wait_for_world(world, KILL_AT)
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)
    assert jobs.final_state(spec) == undisturbed
    records = running.records()
    broken = next(report for report in incidents(records))
    assert broken.restored is not None
    assert broken.steps_lost == 0
    assert broken.restored.step % SELDOM, "it is no step at which the job saves"
    assert broken.restored.step >= broken.incident.step >= KILL_AT
    done = [record.record.step for record in records if isinstance(record, Stepped) and record.record.attempt == 1]
    assert broken.restored.step == max(done)
    rescued = [record for record in records if isinstance(record, Decided) and isinstance(record.event, Rescued)]
    assert [record.event.failed for record in rescued if isinstance(record.event, Rescued)][:1] == [""]
    formed = [action.group for record in records if isinstance(record, Decided)
              for action in record.actions if isinstance(action, FormGroup)]  # fmt: skip
    assert formed[1].restore == broken.restored


def test_a_killed_worker_of_two_costs_no_step_and_no_bit(cluster: LocalCluster, tmp_path: Path) -> None:
    calm = jobs.at_once(jobs.job("calm", f"file://{tmp_path}/calm", STEPS))
    assert jobs.start(replicated, calm).outcome().step == STEPS
    spec = seldom(jobs.held("healed", f"file://{tmp_path}", STEPS))
    killed_and_compared(replicated, spec, jobs.final_state(calm), 2)


def test_a_killed_worker_of_four_hybrid_ones_costs_no_step_and_no_bit(cluster: LocalCluster, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"nodes": (2, 2, 2), "deterministic": False}
    calm = jobs.job("calm-hybrid", f"file://{tmp_path}/calm", STEPS, **shape)
    four = replace(calm.workers, per_node=2, cpus_per_worker=0.5)
    calm = replace(jobs.at_once(calm), workers=four)
    calm = replace(calm, settings={**calm.settings, "micro": 0})
    assert jobs.start(hybrid, calm).outcome().step == STEPS
    spec = replace(seldom(jobs.held("healed-hybrid", f"file://{tmp_path}", STEPS, **shape)), workers=four)
    spec = replace(spec, workers=replace(four, standby_processes=1))  # the program's mesh needs four
    spec = replace(spec, settings={**spec.settings, "micro": 0})
    killed_and_compared(hybrid, spec, jobs.final_state(calm), 4)
