"""Training that does not come back: what finds it, what the supervisor makes of it, and what it keeps meanwhile."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ray_dr.actors.health import Vigil
from ray_dr.config import parse
from ray_dr.detection.detectors import Detection
from ray_dr.detection.divergence import Divergence
from ray_dr.errors import ConfigError
from ray_dr.model.checkpoint import Held, StepRecord, VersionId
from ray_dr.model.events import Corrupted, Diverged, Event
from ray_dr.model.job import Health
from ray_dr.model.recovery import Group, Rollback
from ray_dr.model.signal import Finding, Formed, Member, StepDone
from ray_dr.recovery.plan import choose_version

WORKERS = ("a/1.1", "b/1.1", "c/1.1")


def told(steps: Iterable[tuple[float, str]], detector: Divergence) -> list[Finding]:
    """Findings of a detector that hears of steps 1, 2, ..., each with a loss and why it was skipped."""
    detection, found = Detection(more=(detector,)), []
    detection.observe(Formed(0.0, 1, (Member(0, "a/1.1"), Member(1, "b/1.1"))))
    for step, (loss, skipped) in enumerate(steps, 1):
        for rank in range(2):
            done = StepDone(float(step), rank, 1, step, 0.1, loss=loss, finite=not skipped, skipped=skipped)
            found += [finding for finding in detection.observe(done) if finding.detector == "divergence"]
    return found


def fine(count: int, *, seed: int = 0, level: float = 2.0) -> list[tuple[float, str]]:
    dice = random.Random(seed)
    return [(level * math.exp(dice.gauss(0.0, 0.05)), "") for _ in range(count)]


def test_so_many_skips_in_a_row_are_no_accident() -> None:
    bad = (math.nan, "non_finite")
    assert [f.stage for f in told([*fine(9), *[bad] * 4, *fine(9)], Divergence(5))] == ["suspected", "withdrawn"]
    suspected, confirmed = told([*fine(9), *[bad] * 9], Divergence(5))
    assert (suspected.stage, suspected.step) == ("suspected", 10)
    assert (confirmed.stage, confirmed.step, confirmed.numbers["onset"]) == ("confirmed", 14, 10.0)
    assert "steps 10 to 14 were skipped" in confirmed.evidence


def test_one_skip_that_spoilt_what_forward_keeps_is_enough() -> None:
    (found,) = told([*fine(9), (math.nan, "state"), *fine(3)], Divergence(5))
    assert (found.stage, found.step, found.numbers["onset"]) == ("confirmed", 10, 10.0)


def test_a_loss_that_stays_high_is_found_with_its_onset_and_one_that_comes_back_is_not() -> None:
    found = told([*fine(200), *fine(30, seed=1, level=9.0)], Divergence())
    assert [f.stage for f in found] == ["suspected", "confirmed"]
    assert found[-1].numbers["onset"] == 201.0
    assert found[-1].step is not None
    assert 220 <= found[-1].step <= 224
    assert [f.stage for f in told([*fine(200), *fine(12, level=9.0), *fine(50)], Divergence())] == ["suspected", "withdrawn"]


@pytest.mark.parametrize("level", [4.0, 5.5])
def test_a_loss_that_only_doubles_is_left_alone(level: float) -> None:
    assert not told([*fine(200), *fine(60, level=level)], Divergence())


def test_who_does_not_want_it_is_not_told() -> None:
    assert not told([*fine(200), *fine(60, level=90.0)], Divergence(spikes=False))
    assert not told([*fine(9), *[(math.nan, "non_finite")] * 20], Divergence(0))


def test_a_long_noisy_course_raises_no_alarm() -> None:
    dice = random.Random(5)
    losses = [(4.0 * (1 + step) ** -0.4 * math.exp(0.4 * dice.gauss(0.0, 1.0)), "") for step in range(20_000)]
    assert not [found for found in told(losses, Divergence()) if found.stage == "confirmed"]


# ------------------------------------------------------------------------------------------------------ the supervisor


@dataclass
class Stage:
    """Of a host what a vigil uses."""

    health: Health = field(default_factory=Health)
    decided: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    blamed: list[tuple[str, float]] = field(default_factory=list)
    struck: list[VersionId] = field(default_factory=list)
    rollbacks: tuple[Rollback, ...] = ()

    def __post_init__(self) -> None:
        self.job = SimpleNamespace(health=self.health)
        self.group = Group(2, WORKERS, VersionId(1, 10))
        self.state = SimpleNamespace(rollbacks=())
        self.perform = SimpleNamespace(node_of=lambda worker: worker[0], give_up=self.struck.append)
        self.machines = SimpleNamespace(suspect=lambda node, kind, detail, share: self.blamed.append((node, share)))
        self.saves = SimpleNamespace(stored=[SimpleNamespace(version=VersionId(2, step)) for step in (15, 20, 25)])
        self.vigil = Vigil(self)  # type: ignore[arg-type]
        self.detection = Detection(more=self.vigil.detectors())
        self.vigil.formed(self.group)
        self.detection.observe(Formed(0.0, 2, tuple(Member(rank, worker) for rank, worker in enumerate(WORKERS))))

    def decide(self, event: Event) -> None:
        self.decided.append(event)
        if isinstance(event, Diverged):
            self.state.rollbacks = (Rollback(2, event.onset - 1, event.step),)
        if isinstance(event, Corrupted):
            self.state.rollbacks = (Rollback(2, event.good, event.step),)

    def note(self, name: str, **fields: Any) -> None:
        self.notes.append(name)

    def step(self, step: int, *, skipped: str = "", hashes: tuple[str, ...] = ("", "", "")) -> None:
        """Every rank does a step of eight samples."""
        for rank, found in enumerate(hashes):
            ranges = ((8 * (step - 1) + rank * 8 // 3, 8 * (step - 1) + (rank + 1) * 8 // 3),)
            record = StepRecord(2, step, rank, 3, ranges, "", 0.1, {}, None, skipped, found and f"all:{found}")
            self.vigil.stepped(record)
            done = StepDone(float(step), rank, 2, step, 0.1, digest=found, shard="all", skipped=skipped)
            for finding in self.detection.observe(done):
                self.vigil.found(finding)


def test_skips_in_a_row_become_an_event_with_steps_and_samples_and_later_versions_are_struck() -> None:
    stage = Stage(Health(skips_in_a_row=3))
    for step in range(11, 27):
        stage.step(step, skipped="non_finite" if step >= 22 else "")
    (event,) = stage.decided
    assert isinstance(event, Diverged)
    assert (event.attempt, event.onset, event.step, event.batch) == (2, 22, 24, 8)
    assert stage.struck == [VersionId(2, 25)]


def test_while_it_is_in_doubt_nothing_takes_the_place_of_a_version_from_before() -> None:
    stage = Stage()
    stage.step(11)
    assert not stage.vigil.doubts(VersionId(2, 11))
    assert not stage.vigil.holds([])
    stage.step(12, skipped="non_finite")
    assert stage.vigil.doubts(VersionId(2, 12))
    assert not stage.vigil.doubts(VersionId(2, 11))
    assert stage.vigil.holds([VersionId(2, 12), VersionId(2, 13)])
    assert not stage.vigil.holds([VersionId(2, 11), VersionId(2, 12)])
    stage.step(13)
    assert not stage.vigil.doubts(VersionId(2, 13))
    assert not stage.vigil.holds([VersionId(2, 13)])


def test_of_three_replicas_the_majority_tells_which_is_wrong() -> None:
    stage = Stage()
    stage.step(20, hashes=("5", "5", "5"))
    assert stage.vigil.holds([VersionId(2, 25)])
    stage.step(30, hashes=("7", "8", "7"))
    (event,) = stage.decided
    assert isinstance(event, Corrupted)
    assert (event.good, event.workers, event.step) == (20, (WORKERS[1],), 30)
    assert stage.blamed == [("b", 1.0)]
    assert stage.struck == [VersionId(2, 25)]


def test_without_a_majority_all_are_suspected_a_little() -> None:
    stage = Stage()
    stage.step(20, hashes=("5", "5", "5"))
    stage.step(30, hashes=("7", "8", "9"))
    (event,) = stage.decided
    assert isinstance(event, Corrupted)
    assert event.workers == ()
    assert stage.blamed == [("a", 0.5), ("b", 0.5), ("c", 0.5)]


def test_replicas_that_never_were_the_same_are_only_told_of() -> None:
    stage = Stage()
    stage.step(20, hashes=("7", "8", "7"))
    assert stage.decided == []
    assert stage.notes == ["replicas.differ"]


def test_replicas_that_differ_again_before_they_agreed_are_only_told_of() -> None:
    stage = Stage()
    stage.step(20, hashes=("5", "5", "5"))
    stage.step(30, hashes=("7", "8", "7"))
    stage.step(40, hashes=("8", "8", "9"))
    assert len(stage.decided) == 1
    assert stage.notes == ["replicas.differ"]


def test_when_replicas_are_no_longer_compared_retention_goes_on() -> None:
    stage = Stage(Health(check_every=10))
    stage.step(20, hashes=("5", "5", "5"))
    assert stage.vigil.holds([VersionId(2, 25)])
    stage.step(30)
    assert not stage.vigil.holds([VersionId(2, 25)])


def test_a_group_that_began_before_the_last_comparison_is_good_only_up_to_there() -> None:
    stage = Stage()
    stage.step(20, hashes=("5", "5", "5"))
    stage.vigil.formed(Group(3, WORKERS, VersionId(2, 15)))
    assert stage.vigil.holds([VersionId(3, 18)])
    assert not stage.vigil.holds([VersionId(2, 15)])


# ----------------------------------------------------------------------------------------------------------- the plan


def test_a_version_from_after_the_onset_is_never_chosen_however_new() -> None:
    held = [Held("a", VersionId(2, step), 0, 1, 1, own=True) for step in (38, 40, 44)]
    assert choose_version(held, VersionId(1, 30), (Rollback(2, 40, 45),)) == VersionId(2, 40)
    assert choose_version(held[2:], VersionId(1, 30), (Rollback(2, 40, 45),)) == VersionId(1, 30)
    assert choose_version(held[2:], VersionId(2, 44), (Rollback(2, 40, 45),)) is None
    assert choose_version(held, None) == VersionId(2, 44)


# --------------------------------------------------------------------------------------------------------------- yaml


def test_the_owner_says_what_is_done() -> None:
    said = "{non_finite: skip, skips_in_a_row: 2, spike: ignore, rollbacks: 0, check_every: 10}"
    assert parse(f"job: a\nhealth: {said}\n").health == Health("skip", 2, "ignore", 0, 10)
    assert parse("job: a\n").health == Health()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{non_finite: skp}", "job.yaml:2: health.non_finite: 'skp' is not known here"),
        ("{rollbacks: -1}", "job.yaml:2: health.rollbacks"),
        ("{skips_in_a_row: 0}", "job.yaml:2: health.skips_in_a_row"),
        ("{check_every: 1.5}", "job.yaml:2: health.check_every"),
        ("{spikes: rollback}", "job.yaml:2: health.spikes"),
        ("{non_finite: stop, skips_in_a_row: 3}", "no step is skipped with non_finite: stop (remove it, or write skip)"),
        ("{spike: off}", "job.yaml:2: health.spike"),
    ],
)
def test_what_cannot_hold_is_refused_by_line_and_key(said: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(f"job: a\nhealth: {said}\n")
    assert words in str(refused.value)
