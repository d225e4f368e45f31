"""When a rank has all its own gradients: from real ranks to the detector of those that keep the others waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from ray_dr.actors import sensing
from ray_dr.model.checkpoint import StepRecord
from ray_dr.train.context import Context
from tests.unit.test_sensing import NODES, Stage
from tests.unit.train_programs import Ranks, Rows, network, optimizer_of, wrap

DAWDLED_S = 0.2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(2, f"file://{tmp_path_factory.mktemp('store')}")
    yield started
    started.close()


def dawdle(ctx: Context) -> list[StepRecord]:
    """Rank 1 takes its time for each step; the records of the last steps."""
    model = wrap(network(), str(ctx.settings["kind"]))
    optimizer = optimizer_of(model, "sgd")
    ctx.data(Rows(), global_batch=int(ctx.settings["batch"]))
    state = ctx.restore(model=model, optimizer=optimizer)
    for x, y in ctx.steps(state, until=6):
        if ctx.world.rank == 1:
            time.sleep(DAWDLED_S)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ctx._window


def test_who_is_waited_for_arrives_late_though_all_steps_are_alike(ranks: Ranks) -> None:
    fast, slow = ranks.play(2, dawdle, kind="ddp", batch=10)
    assert len(fast) == len(slow) > 1
    assert all(0 < record.arrived_s <= record.took_s for record in (*fast, *slow))
    assert median(record.took_s for record in fast) > DAWDLED_S, "it waits"
    assert min(record.arrived_s for record in slow) >= DAWDLED_S
    assert min(record.arrived_s for record in fast) < DAWDLED_S


@pytest.mark.parametrize("how", [{"kind": "ddp", "batch": 9}, {"kind": "fsdp", "batch": 10}])
def test_unequal_shares_and_shards_say_nothing_of_a_rank(ranks: Ranks, how: dict[str, Any]) -> None:
    for told in ranks.play(2, dawdle, **how):
        assert {record.arrived_s for record in told} == {None}


def test_a_rank_that_is_late_at_every_step_is_found_and_held_against_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = SimpleNamespace(stage=None)
    now = lambda: holder.stage.now if holder.stage else 1000.0  # noqa: E731
    monkeypatch.setattr(sensing, "time", SimpleNamespace(monotonic=now, time=now))
    stage = holder.stage = Stage(hang_s=300.0)
    held: list[tuple[str, str]] = []
    stage.machines = SimpleNamespace(hold_slow=lambda node, how: held.append((node, how)))  # type: ignore[attr-defined]
    for step in range(1, 800):
        stage.train(0)
        stage.now += 0.13
        for rank in range(2):
            stage.senses.beat(NODES[rank], {"beat": stage.now, "beacons": ()})
        stage.senses.look()
        for rank, arrived_s in enumerate((0.09, 0.12)):
            stage.senses.stepped(StepRecord(1, step, rank, 2, (), "", 0.13, {}, arrived_s))
    (note,) = stage.notes
    assert (note["kind"], note["severity"], note["subjects"][0]["rank"]) == ("straggler", "warning", 1)
    assert held == [(NODES[1], note["evidence"])]
    assert stage.lost == []
