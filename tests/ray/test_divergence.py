"""Training that goes wrong by itself: bad numbers in the data, and a machine that remembers wrongly."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from ray_dr import Context
from ray_dr.actors.leaks import find_leaks
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.events import Corrupted, Diverged
from ray_dr.model.job import Every, Health, Job, StoreTier
from ray_dr.model.journal import DataOpened, Decided, Noted, Stepped
from tests.ray import jobs
from tests.ray.programs import Numbers, model

pytestmark = pytest.mark.ray
STEPS, BATCH = 60, 12
FLIPPED_AT = 25


class Doubtful(Numbers):
    """Samples without those in [gap], and those in [bad] are no numbers; both are ranges of indices."""

    def __init__(self, bad: range, gap: range) -> None:
        super().__init__(1000 - len(gap))
        self.bad, self.gap = bad, gap

    def __getitem__(self, index: Any) -> Any:
        index += len(self.gap) if self.gap and index >= self.gap.start else 0
        return super().__getitem__(index) * (float("nan") if index in self.bad else 1.0)


def train(ctx: Context) -> None:
    """DDP over samples in their order. `bad` and `gap` are samples [first, last); `flip` the path of a marker."""
    bad, gap = (range(*map(int, str(ctx.settings.get(name, "0 0")).split())) for name in ("bad", "gap"))
    plain = model()
    wrapped = DistributedDataParallel(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.9)
    data = ctx.data(Doubtful(bad, gap), global_batch=BATCH, micro_batches=6, shuffle=False)
    state = ctx.restore(model=wrapped, optimizer=optimizer, schedule=schedule, data=data)
    for batch in ctx.steps(state, until=STEPS):
        for part in ctx.micro_batches(batch):
            (wrapped(part) - part.flip(-1)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ctx.log(skipped=ctx.skipped)
        flip_once(ctx, state.step + 1, plain)
        time.sleep(float(ctx.settings.get("pace", 0.0)))


def flip_once(ctx: Context, step: int, plain: torch.nn.Module) -> None:
    """`flip` is the path of a marker: the last rank of three that finds it takes it away and has one bit wrong from then on."""
    marker = Path(str(ctx.settings.get("flip", "")))
    if step == FLIPPED_AT and ctx.world.rank == ctx.world.size - 1 == 2 and marker.is_file():
        marker.unlink()
        with torch.no_grad():
            next(iter(plain.parameters())).data.view(torch.int32)[3, 5] ^= 1 << 18


def spec(name: str, path: Path, *, nodes: int = 2, health: Health | None = None, **settings: Any) -> Job:
    plain = jobs.job(name, f"file://{path}", STEPS, nodes=(nodes, nodes, 1), health=health or Health(skips_in_a_row=3))
    store = StoreTier(plain.store.url, Every(steps=5))
    return replace(plain, store=store, settings={"pace": 0.05, "steps": STEPS, **settings})


def undisturbed(name: str, path: Path, gap: range | None = None) -> dict[str, bytes]:
    """The final state of a job whose data never had the samples in `gap`."""
    extra = {"gap": f"{gap.start} {gap.stop}"} if gap else {}
    calm = spec(name, path, nodes=1, pace=0.0, **extra)
    running = jobs.start(train, calm)
    assert running.outcome().step == STEPS
    records = running.records()
    assert not [r for r in records if isinstance(r, Decided) and isinstance(r.event, Diverged | Corrupted)]
    assert not [r for r in records if isinstance(r, Noted) and r.name in ("finding", "step.skipped")]
    return jobs.final_state(calm)


def finite(state: dict[str, bytes]) -> bool:
    return all(torch.isfinite(torch.frombuffer(bytearray(state[name]), dtype=torch.float32)).all()
               for name in state if name.startswith("model/"))  # fmt: skip


def test_one_bad_batch_is_skipped_by_all_ranks_and_the_job_goes_on(cluster: LocalCluster, tmp_path: Path) -> None:
    bad = spec("once", tmp_path, bad="365 367")
    running = jobs.start(train, bad)
    assert running.outcome().step == STEPS
    records = running.records()
    skipped = {(r.record.rank, r.record.step): r.record for r in records if isinstance(r, Stepped) and r.record.skipped}
    assert set(skipped) == {(0, 31), (1, 31)}
    assert all(record.logs["skipped"] == 1.0 for record in skipped.values()), "the program was told"
    assert [r.fields["step"] for r in records if isinstance(r, Noted) and r.name == "step.skipped"] == [31]
    assert not [r for r in records if isinstance(r, Decided) and isinstance(r.event, Diverged)]
    jobs.assert_exact_data(running)
    assert finite(jobs.final_state(bad))
    assert find_leaks(cluster).total == 0


def test_bad_samples_that_stay_are_left_out_as_if_they_had_never_been_there(cluster: LocalCluster, tmp_path: Path) -> None:
    bad = spec("stays", tmp_path / "bad", bad=f"{20 * BATCH} {23 * BATCH}")
    running = jobs.start(train, bad)
    assert running.outcome().step == STEPS
    records = running.records()
    (diverged,) = [r.event for r in records if isinstance(r, Decided) and isinstance(r.event, Diverged)]
    assert (diverged.onset, diverged.step, diverged.batch) == (21, 23, BATCH)
    (left_out,) = {r.left_out for r in records if isinstance(r, DataOpened) and r.left_out}
    ((first, last),) = left_out
    assert first <= 20 * BATCH
    assert last == 23 * BATCH
    jobs.assert_exact_data(running)
    final = jobs.final_state(bad)
    assert finite(final)
    assert final == undisturbed("never-there", tmp_path / "good", range(first, last))
    assert find_leaks(cluster).total == 0


def test_a_wrong_bit_in_one_replica_names_its_rank_and_leaves_no_trace(cluster: LocalCluster, tmp_path: Path) -> None:
    marker = tmp_path / "flip"
    marker.touch()
    flipped = spec("flipped", tmp_path / "bad", nodes=3, flip=str(marker), health=Health(check_every=10), pace=0.1)
    running = jobs.start(train, flipped)
    running.wait_for_step(3)
    (wrong,) = [said["worker"] for said in running.workers() if said["rank"] == 2]
    assert running.outcome().step == STEPS
    assert not marker.exists()
    (event,) = [r.event for r in running.records() if isinstance(r, Decided) and isinstance(r.event, Corrupted)]
    assert (event.workers, event.good, event.step) == ((wrong,), 20, 30)
    jobs.assert_exact_data(running)
    assert jobs.final_state(flipped) == undisturbed("unflipped", tmp_path / "good")
    assert find_leaks(cluster).total == 0
