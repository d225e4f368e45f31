"""From what agents say to records of the journal and events of the machine, in virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ray_dr.actors import sensing
from ray_dr.actors.sensing import Senses, short
from ray_dr.model import codec
from ray_dr.model.checkpoint import StepRecord
from ray_dr.model.events import Event, Hung
from ray_dr.model.job import Detecting, Health
from ray_dr.model.recovery import Group
from ray_dr.model.signal import Beacon, Finding, Notice, WorkerPhase

NODES = ("a" * 56, "b" * 56)
WORKERS = tuple(f"{short(node)}/1.1" for node in NODES)
STEP_S = 0.1
LEARNED = 120


@dataclass
class Stage:
    """A host of which only what the senses use is there; its time goes as the test says."""

    hang_s: float = 0.0
    detecting: Detecting = field(default_factory=Detecting)
    now: float = 1000.0
    notes: list[dict[str, Any]] = field(default_factory=list)
    decided: list[Event] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self.group = Group(1, WORKERS, None)
        self.job = SimpleNamespace(recovery=SimpleNamespace(hang_s=self.hang_s), detection=self.detecting, health=Health())
        self.progress = self
        self.perform = SimpleNamespace(lose_node=lambda node, how: self.lost.append((node, how)))
        self.senses = Senses(self)  # type: ignore[arg-type]
        self.senses.formed(self.group)

    def note(self, name: str, **fields: Any) -> None:
        self.notes.append({"name": name, **fields})

    def decide(self, event: Event) -> None:
        self.decided.append(event)

    def beat(self, rank: int, phase: WorkerPhase, since: float, collective: int) -> None:
        self.senses.receive(self.now)
        beacon = Beacon(rank, 1, self.step, phase, collective, since)
        self.senses.beat(NODES[rank], {"beat": self.now, "beacons": codec.to_json((beacon,))})

    def train(self, steps: int) -> None:
        """Both ranks do so many steps, at an even pace."""
        for _ in range(steps):
            for rank in range(2):
                self.beat(rank, WorkerPhase.COMPUTE, self.now, self.step)
            self.now += STEP_S
            self.senses.look()
            self.step += 1
            for rank in range(2):
                self.senses.stepped(StepRecord(1, self.step, rank, 2, (), "", STEP_S, {"loss": 1.0}))

    def stand(self, seconds: float, *, since: float | None = None, silent: int | None = None) -> None:
        """Rank 1 stays in its step, rank 0 waits for it in the next collective; a silent node says nothing."""
        began, until = self.now if since is None else since, self.now + seconds
        while self.now < until:
            for rank in range(2):
                if rank != silent:
                    self.beat(rank, WorkerPhase.COMPUTE, began, self.step + (rank == 0))
            self.now += STEP_S
            self.senses.look()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Both clocks of the senses, as the stage in it has them."""
    holder = SimpleNamespace(stage=None)
    now = lambda: holder.stage.now if holder.stage else 1000.0  # noqa: E731
    monkeypatch.setattr(sensing, "time", SimpleNamespace(monotonic=now, time=now))
    return holder


def staged(clock: SimpleNamespace, **how: Any) -> Stage:
    clock.stage = Stage(**how)
    stage: Stage = clock.stage
    stage.train(LEARNED)
    assert not stage.notes
    return stage


def test_who_is_waited_for_is_ended_when_the_owners_time_is_up_and_not_before(clock: SimpleNamespace) -> None:
    stage = staged(clock, hang_s=20.0)
    since = stage.now
    stage.stand(19.0, since=since)
    assert {note["kind"] for note in stage.notes} == {"hang"}
    assert stage.decided == []
    stage.stand(2.0, since=since)
    (event,) = stage.decided
    assert isinstance(event, Hung)
    assert (event.attempt, event.workers, event.step) == (1, (WORKERS[1],), LEARNED)
    stage.stand(5.0, since=since)
    assert len(stage.decided) == 1, "once"


def test_who_gets_on_in_time_is_left_alone(clock: SimpleNamespace) -> None:
    stage = staged(clock, hang_s=20.0)
    stage.stand(15.0)
    stage.train(50)
    stage.stand(15.0)
    assert stage.decided == []
    assert {note["stage"] for note in stage.notes} >= {"confirmed", "withdrawn"}


def test_nobody_is_ended_of_a_group_that_is_no_more(clock: SimpleNamespace) -> None:
    stage = staged(clock, hang_s=20.0)
    stage.stand(15.0)
    stage.senses.broken(1)
    stage.stand(30.0)
    assert stage.decided == []


@pytest.mark.parametrize("losses", [(math.inf, -math.inf), (1.7e308, 1.7e308), (math.nan, 1.0)])
def test_no_number_that_a_program_logs_ends_the_senses(clock: SimpleNamespace, losses: tuple[float, float]) -> None:
    stage = staged(clock)
    for rank, loss in enumerate(losses):
        stage.senses.stepped(StepRecord(1, stage.step + 1, rank, 2, (), "", STEP_S, {"loss": loss}))
    assert not [note for note in stage.notes if note["name"] == "detection.failed"]


def test_a_detector_that_fails_is_told_of_and_detection_begins_anew(clock: SimpleNamespace) -> None:
    stage = staged(clock)
    stage.senses._detection.observe = lambda sample: 1 / 0  # type: ignore[method-assign, assignment]
    stage.now += STEP_S
    stage.senses.look()
    assert [note["name"] for note in stage.notes] == ["detection.failed"]
    stage.train(LEARNED)
    stage.stand(10.0)
    assert stage.notes[-1]["kind"] == "hang"


def test_a_node_that_falls_silent_is_given_up_by_its_full_name(clock: SimpleNamespace) -> None:
    stage = staged(clock)
    stage.stand(2.5, silent=1)
    assert [node for node, _ in stage.lost] == [NODES[1]]
    assert "has said nothing for" in stage.lost[0][1]
    assert codec.to_json(stage.notes)  # what goes to the journal


def test_a_notice_is_noted_and_acted_on_once_and_advice_is_only_noted() -> None:
    stage = Stage()
    told: list[tuple[str, Finding]] = []
    stage.notices = SimpleNamespace(confirmed=lambda node, finding: told.append((node, finding)))  # type: ignore[attr-defined]
    for left_s in (30.0, 29.9):
        stage.senses.noticed(NODES[1], (Notice("ray drain", left_s), Notice("aws rebalance", math.inf, certain=False)))
    ((node, finding),) = told
    assert (node, finding.numbers["left_s"]) == (NODES[1], 30.0)
    assert [note["stage"] for note in stage.notes] == ["confirmed", "suspected"]
    assert finding.evidence.endswith("will be taken away in 30 s (ray drain)")
