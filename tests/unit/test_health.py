"""Real processes that meet numbers that are not finite: all skip alike, and a skip changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_dr.train.context import Context
from ray_dr.train.parameter_hash import parameter_hash
from tests.unit.train_programs import RankError, Ranks, Rows, network, optimizer_of, whole_tensors, wrap


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(2, f"file://{tmp_path_factory.mktemp('store')}")
    yield started
    started.close()


def spoil(ctx: Context) -> dict[str, Any]:
    """At step `bad` (from 0) the last rank's gradients, or what is logged, are spoilt. The state after each step, as bytes."""
    want, last = ctx.settings, ctx.world.rank == ctx.world.size - 1
    model = wrap(network(), str(want.get("kind", "ddp"))) if want.get("kind") != "plain" else network()
    if want.get("norm"):
        model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)))
    optimizer = optimizer_of(model, str(want.get("optimizer", "adamw")))
    ctx.data(Rows(), global_batch=8)
    state = ctx.restore(model=model, optimizer=optimizer)
    told, after, records, notes = [], [], [], []
    vars(ctx._link).update(step=lambda record, at: records.append(record), record=notes.append)
    for x, y in ctx.steps(state, until=int(want.get("steps", 4))):
        bad = state.step == want.get("bad") and last
        if bad and want.get("how") == "data":
            x = x * math.nan
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        if bad and want.get("how") == "gradient":
            next(iter(model.parameters())).grad[0, 0] = math.inf
        if bad and want.get("how") == "clip":
            next(iter(model.parameters())).grad[0, 0] = math.nan
        if want.get("how") == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if bad and want.get("how") == "log":
            ctx.log(loss=math.inf)
        if bad and want.get("how") == "huge":
            next(iter(model.parameters())).grad[0, 0] = 1e30
        if bad and want.get("how") == "other":
            ctx.log(best=math.inf)
        optimizer.step()
        told.append(ctx.skipped)
        optimizer.zero_grad()
        if not want.get("norm"):
            after.append(whole_tensors(ctx, state.objects))
        if bad and want.get("how") == "bit":
            next(iter(model.parameters())).data.view(torch.int32)[0, 0] ^= 1
    return {"told": told, "after": after, "records": records, "notes": notes}


@pytest.mark.parametrize("how", ["data", "gradient", "clip", "log"])
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_what_is_not_finite_on_one_rank_makes_all_skip_and_changes_nothing(ranks: Ranks, how: str, optimizer: str) -> None:
    for found in ranks.play(2, spoil, how=how, bad=2, optimizer=optimizer):
        assert found["told"] == [False, False, True, False]
        assert [record.skipped for record in found["records"]] == ["", "", "non_finite", ""]
        assert found["after"][2] == found["after"][1], "parameters and the optimizer's state"
        assert found["after"][3] != found["after"][2]
        assert all(record.ranges for record in found["records"]), "its samples count as used"


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_sharded_and_replicated_modules_are_looked_after(ranks: Ranks, kind: str) -> None:
    for found in ranks.play(2, spoil, how="data", bad=1, kind=kind):
        assert found["told"] == [False, True, False, False]
        assert found["after"][1] == found["after"][0]


def test_one_worker_alone_skips_too(ranks: Ranks) -> None:
    (found,) = ranks.play(1, spoil, how="data", bad=1, kind="plain")
    assert found["told"] == [False, True, False, False]


@pytest.mark.parametrize("how", ["huge", "other"])
def test_a_gradient_that_is_only_large_and_numbers_of_the_programs_own_skip_nothing(ranks: Ranks, how: str) -> None:
    for found in ranks.play(2, spoil, how=how, bad=1, steps=2, optimizer="momentum"):
        assert found["told"] == [False] * 2


def test_the_first_rank_notes_it_for_the_journal(ranks: Ranks) -> None:
    first, second = ranks.play(2, spoil, how="data", bad=2)
    assert [(note.name, note.fields["step"]) for note in first["notes"] if note.name == "step.skipped"] == [("step.skipped", 3)]
    assert not [note for note in second["notes"] if getattr(note, "name", "") == "step.skipped"]


def test_statistics_that_forward_has_spoilt_are_told_of(ranks: Ranks) -> None:
    found = ranks.play(2, spoil, how="data", bad=1, norm=True)[1]
    assert found["records"][1].skipped == "state"


def stop(ctx: Context) -> Any:
    object.__setattr__(ctx._watch._health, "non_finite", "stop")
    return spoil(ctx)


def ignore(ctx: Context) -> Any:
    object.__setattr__(ctx._watch._health, "non_finite", "ignore")
    return spoil(ctx)


def test_a_job_that_is_to_stop_stops(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="NonFinite: gradients, or a logged number, are not finite"):
        ranks.play(2, stop, how="data", bad=1)


def test_a_job_that_is_to_ignore_it_goes_on(ranks: Ranks) -> None:
    for found in ranks.play(2, ignore, how="data", bad=1):
        assert found["told"] == [False] * 4


def check_often(ctx: Context) -> Any:
    object.__setattr__(ctx._watch._health, "check_every", 2)
    return spoil(ctx)


def test_replicas_say_the_same_every_so_many_steps_until_a_bit_is_wrong(ranks: Ranks) -> None:
    first, second = (found["records"] for found in ranks.play(2, check_often, how="bit", bad=2, steps=6))
    assert [bool(record.state_hash) for record in first] == [False, True, False, True, False, True]
    assert first[1].state_hash == second[1].state_hash
    assert first[1].state_hash.startswith("all:")
    assert first[3].state_hash != second[3].state_hash


def test_of_what_has_no_replica_nothing_is_said(ranks: Ranks) -> None:
    for found in ranks.play(2, check_often, kind="fsdp", steps=2):
        assert not found["records"][1].state_hash


def hybrid(ctx: Context) -> str:
    """Hybrid sharding with shards of one rank each: two replicas of one shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))
    object.__setattr__(ctx._watch._health, "check_every", 1)
    ctx._watch.look_at([model])
    if dist.get_rank() == 1 and ctx.settings.get("bit"):
        next(iter(model.parameters())).to_local().view(torch.int32)[0, 0] ^= 1
    return ctx._watch.state_hash(1)


def test_replicas_of_a_shard_are_compared(ranks: Ranks) -> None:
    first, second = ranks.play(2, hybrid)
    assert first == second
    assert first.startswith("0/2:")
    first, second = ranks.play(2, hybrid, bit=True)
    assert first.partition(":")[0] == second.partition(":")[0]
    assert first != second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("size", [0, 1, 3, 4096, 40_003])
def test_any_flipped_bit_changes_the_hash(dtype: torch.dtype, size: int) -> None:
    tensor = (torch.arange(size) % 2).to(dtype)
    before = parameter_hash([torch.ones(3), tensor])
    assert parameter_hash([torch.ones(3), tensor.clone()]) == before
    if not size:
        return
    for at in {0, size // 2, size - 1}:
        raw = torch.view_as_real(tensor).view(torch.uint8) if dtype.is_complex else tensor.view(torch.uint8)
        raw.reshape(-1)[at] ^= 1
        assert parameter_hash([torch.ones(3), tensor]) != before
        raw.reshape(-1)[at] ^= 1
    assert parameter_hash([torch.ones(3), tensor]) == before


def test_the_same_words_elsewhere_are_another_state() -> None:
    one, other = torch.zeros(8192 * 2), torch.ones(8192 * 2)
    assert parameter_hash([one, other]) != parameter_hash([other, one])
    assert parameter_hash([torch.cat([one, other])]) != parameter_hash([torch.cat([other, one])])
    assert parameter_hash([torch.ones(4, 6).t()]) == parameter_hash([torch.ones(6, 4)])
