"""Attempts of several real processes: exact gradients, equal bits at every world size, states that change size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ray_dr.checkpoint.save_plan import SavePlan
from ray_dr.model.attempt import Cadence
from ray_dr.model.checkpoint import Part, StepRecord
from ray_dr.model.data import Order
from ray_dr.train import fence
from ray_dr.train.context import RECORDS_KEPT, Context
from ray_dr.train.fence import Parcel
from ray_dr.train.link import Link
from ray_dr.train.staging import stage as stage_at_once
from ray_dr.train.state import Flat
from tests.unit.train_programs import GUARD_S, RankError, Ranks, Rows, digest, fit, network

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(4, f"file://{tmp_path_factory.mktemp('store')}")
    yield started
    started.close()


def floats(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def fit_and_keep_records(ctx: Context) -> tuple[list[StepRecord], list[Part]]:
    """`fit`, and what it told the agent: the record of every step, and the part of every save."""
    told: list[StepRecord] = []
    carried: list[Part] = []
    link = ctx._link
    step, staged = link.step, link.staged

    def keep_step(record: StepRecord, at: float) -> None:
        told.append(record)
        step(record, at)

    def keep_part(slot: int, part: Part, **rest: Any) -> None:
        carried.append(part)
        staged(slot, part, **rest)

    vars(link).update(step=keep_step, staged=keep_part)
    fit(ctx)
    return told, carried


def fit_and_copy_behind(ctx: Context) -> tuple[dict[int, bytes], dict[int, bytes], int]:
    """`fit` with saves that are copied while it goes on, however small: this rank's bytes as they were handed over, as they
    were at the end of the step, and how many copies were made behind training's back."""
    link, staged, saved, ends, behind = ctx._link, ctx._link.staged, {}, {}, []
    stage, carry = ctx._fence.stage, ctx._fence._carry

    def keep(slot: int, part: Part, **rest: Any) -> None:
        saved[part.version.step] = sealed(part, link._slots[slot])
        staged(slot, part, **rest)

    def stage_twice(plan: SavePlan, flat: Flat, slot: memoryview, parcel: Parcel, **rest: Any) -> None:
        stream = memoryview(bytearray(plan.size))
        stage_at_once(plan, flat, stream)
        ends[parcel.part.version.step] = sealed(plan, stream)
        stage(plan, flat, slot, parcel, **rest)

    def carry_counted(copy: Any) -> None:
        behind.append(copy)
        carry(copy)

    usual, fence.AT_ONCE_BYTES = fence.AT_ONCE_BYTES, 1
    vars(link).update(staged=keep, take_slot=functools.partial(take_slot, link), full=lambda: False)
    vars(ctx._fence).update(stage=stage_twice, _carry=carry_counted)
    fit(ctx)
    fence.AT_ONCE_BYTES = usual
    return saved, ends, len(behind)


def take_slot(link: Link, size: int, wait_s: float) -> Any:
    """Waits, so that every rank saves at every step."""
    return Link.take_slot(link, size, wait_s or GUARD_S)


def sealed(part: SavePlan | Part, stream: memoryview) -> bytes:
    """The bytes of all boxes, without the gaps between them."""
    return b"".join(stream[shard.at : shard.at + shard.box.size] for shard in part.shards)


def one_step_alone(batch: int) -> dict[str, torch.Tensor]:
    """Weights after one SGD step of learning rate 1 over the whole global batch, in plain torch."""
    model = network()
    rows = Rows()
    chosen = Order(len(rows), 0).indices(0, batch)
    torch.nn.functional.mse_loss(model(rows.x[chosen]), rows.y[chosen]).backward()
    return {f"model/{name}": (value - value.grad).detach().reshape(-1) for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro", [None, 5])
@pytest.mark.parametrize("world", [2, 3])
def test_uneven_shares_give_the_gradient_of_the_whole_batch(
    ranks: Ranks, kind: str, micro: int | None, world: int
) -> None:
    cut: dict[str, Any] = {} if micro is None else {"micro": micro}
    results = ranks.play(world, fit, kind=kind, optimizer="sgd", batch=5, steps=1, **cut)
    for name, expected in one_step_alone(5).items():
        for result in results:
            torch.testing.assert_close(floats(result["tensors"][name]), expected, rtol=1e-5, atol=1e-6)


def test_hybrid_sharding_sums_the_gradient_of_the_whole_batch(ranks: Ranks) -> None:
    results = ranks.play(4, fit, kind="hybrid", optimizer="sgd", batch=5, steps=1)
    for name, expected in one_step_alone(5).items():
        torch.testing.assert_close(floats(results[3]["tensors"][name]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro", [5, 6])
def test_deterministic_training_gives_the_same_bits_on_one_to_four_ranks(ranks: Ranks, micro: int) -> None:
    found = {}
    for kind in ("ddp", "fsdp"):
        for world in (1, 2, 3, 4):
            settings: dict[str, Any] = {"kind": kind, "batch": 30, "micro": micro, "steps": 3, "dropout": 0.3}
            results = ranks.play(world, fit, deterministic=True, **settings)
            hashes = {digest(result["tensors"]) for result in results}
            assert len(hashes) == 1
            found[kind, world] = hashes.pop()
    assert len(set(found.values())) == 1, found


def test_hybrid_sharding_cannot_be_deterministic_and_says_what_to_do(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"ConfigError: deterministic: .*\(use fully_shard over one mesh dimension"):
        ranks.play(4, fit, deterministic=True, kind="hybrid", batch=4, micro=4, steps=1)


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("ddp", 1, 3), ("ddp", 3, 2), ("fsdp", 1, 2), ("fsdp", 2, 3), ("fsdp", 3, 2), ("fsdp", 3, 1)],
)
def test_a_state_saved_at_one_world_size_comes_back_whole_at_another(
    ranks: Ranks, kind: str, before: int, after: int
) -> None:
    saved = ranks.play(before, fit, kind=kind, optimizer="amsgrad", batch=6, steps=3)
    restored = ranks.play(after, fit, origin=ranks.newest(before), kind=kind, optimizer="amsgrad", batch=6, steps=3)
    for result in restored:
        assert result["tensors"] == saved[0]["tensors"]
        assert (result["step"], result["position"], result["lr"]) == (3, 18, saved[0]["lr"])


def test_a_state_moves_between_data_parallel_and_sharded(ranks: Ranks) -> None:
    saved = ranks.play(2, fit, kind="fsdp", batch=6, steps=2)
    restored = ranks.play(3, fit, origin=ranks.newest(2), kind="ddp", batch=6, steps=2)
    assert restored[0]["tensors"] == saved[0]["tensors"]


@pytest.mark.parametrize(("kind", "optimizer"), [("ddp", "momentum"), ("fsdp", "adamw")])
def test_training_goes_on_from_a_restore_as_if_nothing_had_happened(ranks: Ranks, kind: str, optimizer: str) -> None:
    settings: dict[str, Any] = {"kind": kind, "optimizer": optimizer, "batch": 6, "dropout": 0.2}
    undisturbed = ranks.play(2, fit, steps=6, **settings)
    ranks.play(2, fit, steps=3, **settings)
    resumed = ranks.play(2, fit, steps=6, origin=ranks.newest(2), **settings)
    assert resumed[0]["tensors"] == undisturbed[0]["tensors"]


def test_deterministic_training_that_shrinks_and_grows_gives_the_undisturbed_bits(ranks: Ranks) -> None:
    settings: dict[str, Any] = {"kind": "fsdp", "batch": 12, "micro": 4, "dropout": 0.2, "deterministic": True}
    undisturbed = ranks.play(3, fit, steps=6, **settings)
    ranks.play(3, fit, steps=2, **settings)
    ranks.play(1, fit, steps=4, origin=ranks.newest(3), **settings)
    resumed = ranks.play(4, fit, steps=6, origin=ranks.newest(1), **settings)
    assert resumed[0]["tensors"] == undisturbed[0]["tensors"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hybrid"])
def test_saves_copied_while_training_goes_on_have_the_bytes_of_their_steps_end(ranks: Ranks, kind: str) -> None:
    settings: dict[str, Any] = {"kind": kind, "batch": 8, "micro": 8, "steps": 6, "cadence": Cadence(0, 1, 0)}
    results = ranks.play(4, fit_and_copy_behind, **settings)
    for saved, ends, behind in results:
        assert saved == ends
        assert (len(saved), behind) == (6, 5)
    origin = ranks.newest(4)
    assert ranks.play(2, fit, origin=origin, **{**settings, "kind": "ddp"})[0]["step"] == 6


@pytest.mark.parametrize(("world", "cut"), [(3, {}), (2, {"micro": 10}), (3, {"micro": 5})])
def test_every_sample_of_the_global_order_is_used_exactly_once(ranks: Ranks, world: int, cut: dict[str, int]) -> None:
    results = ranks.play(world, fit_and_keep_records, kind="ddp", batch=10, steps=12, cadence=Cadence(0, 3, 0), **cut)
    used = sorted(position for told, _ in results for record in told
                  for first, last in record.ranges for position in range(first, last))  # fmt: skip
    assert used == list(range(120))
    for told, carried in results:
        assert [record.step for record in told] == list(range(1, 13))
        assert {record.step: record for part in carried for record in part.records} == {r.step: r for r in told}
        for before, after in itertools.pairwise(carried):
            assert all(after.records.count(record) == 1 for record in before.records[-RECORDS_KEPT:])
            assert len(after.records) <= RECORDS_KEPT + after.version.step - before.version.step


def test_a_changed_global_batch_is_refused_before_anything_is_loaded(ranks: Ranks) -> None:
    ranks.play(1, fit, kind="ddp", batch=6, steps=1)
    origin = ranks.newest(1)
    with pytest.raises(RankError, match=r"IncompatibleState: .*\n.*data/global_batch: 6 in the checkpoint, 12 in the"):
        ranks.play(1, fit, origin=origin, kind="ddp", batch=12, steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 2}, "global_batch: a global batch of 2 cannot feed 3 workers"),
        ({"batch": 6, "micro": 2}, "micro_batches: 2 micro-batches cannot feed 3 workers"),
        ({"batch": 6, "micro": 4}, "cannot be cut into 4 equal micro-batches"),
        ({"batch": 0}, "global_batch is 0"),
    ],
)
def test_a_batch_that_cannot_feed_the_workers_is_a_config_error(
    ranks: Ranks, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(RankError, match=f"ConfigError: .*{message}"):
        ranks.play(3, fit, kind="ddp", steps=1, **settings)


def test_saves_at_the_cadence_and_at_the_end_can_be_restored(ranks: Ranks) -> None:
    ranks.play(2, fit, kind="ddp", batch=6, steps=5, cadence=Cadence(0, 2, 0))
    assert ranks.newest(2).version.step == 5
