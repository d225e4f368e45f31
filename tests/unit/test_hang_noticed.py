"""A hang is noticed, and recorded with its culprit, within five seconds or three times the step's 99th percentile, long
before `recovery.hang` has it acted upon. In virtual time, as a supervisor hears of it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from ray_dr.actors import sensing
from ray_dr.detection.robust import quantile
from ray_dr.model.checkpoint import StepRecord
from ray_dr.model.signal import WorkerPhase
from tests.unit.test_sensing import WORKERS, Stage

TICK_S, LOOK_S = 0.1, 0.25
LEARNED = 300


def run(stage: Stage, took_s: float) -> None:
    """A step of both ranks, with reports on the way."""
    began, end = stage.now, stage.now + took_s
    while stage.now < end:
        stage.now = min(end, stage.now + TICK_S)
        for rank in range(2):
            stage.beat(rank, WorkerPhase.COMPUTE, began, stage.step)
        stage.senses.look()
    stage.step += 1
    for rank in range(2):
        stage.senses.stepped(StepRecord(1, stage.step, rank, 2, (), "", took_s))


@pytest.mark.parametrize(("step_s", "sigma"), [(0.15, 0.05), (0.15, 0.35), (0.8, 0.1), (3.0, 0.2)])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_hang_is_recorded_in_time_with_its_culprit(
    monkeypatch: pytest.MonkeyPatch, step_s: float, sigma: float, seed: int
) -> None:
    holder = SimpleNamespace(stage=None)
    now = lambda: holder.stage.now if holder.stage else 1000.0  # noqa: E731
    monkeypatch.setattr(sensing, "time", SimpleNamespace(monotonic=now, time=now))
    stage = holder.stage = Stage(hang_s=300.0)
    dice = random.Random(seed)
    steps_s = [step_s * dice.lognormvariate(0, sigma) for _ in range(LEARNED)]
    for took_s in steps_s:
        run(stage, took_s)
    assert stage.notes == []
    stood_at = stage.now
    limit_s = max(5.0, 3 * quantile(steps_s, 0.99))
    while not stage.notes and stage.now < stood_at + 2 * limit_s:
        stage.now += TICK_S
        for rank in range(2):  # rank 0 waits for it in the next collective
            stage.beat(rank, WorkerPhase.COMPUTE, stood_at, stage.step + (rank == 0))
        stage.senses.look()
    (note,) = stage.notes
    assert (note["kind"], [subject["worker"] for subject in note["subjects"]]) == ("hang", [WORKERS[1]])
    assert note["step"] == stage.step
    assert stage.now - stood_at <= limit_s
    assert stage.decided == [], "acting is another matter: recovery.hang"
