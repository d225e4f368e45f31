"""Background work gives way to training, but never stops, and waits for nobody where there is nobody to wait for."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from ray_dr.checkpoint import throttle as throttling
from ray_dr.checkpoint.duty import FLOOR, JUDGED_STEPS, Duty, observe
from ray_dr.checkpoint.throttle import PAUSE_MOST_S, Throttle

STEP_S = 0.1
OVERHEAD = 0.01


def train(
    slower: Callable[[float], float], *, steps: int = 4000, saving: float = 0.2, wander: float = 0.0, seed: int = 0
) -> list[Duty]:
    """A training whose steps beside a save take `slower(share)` times as long; `saving` of its steps have one, in runs."""
    dice, duty, seen = random.Random(seed), Duty(), []
    for step in range(steps):
        beside = step % 100 < 100 * saving
        took_s = STEP_S * (slower(duty.share) if beside else 1.0) * (1 + wander * dice.uniform(-1, 1))
        duty = observe(duty, took_s, beside=beside, overhead=OVERHEAD)
        seen.append(duty)
    return seen[steps // 2 :]


def test_a_save_that_slows_nothing_has_all_the_time() -> None:
    assert {duty.share for duty in train(lambda share: 1.0)} == {1.0}


def test_a_save_that_slows_training_too_much_is_held_to_what_is_allowed_on_average() -> None:
    duties = train(lambda share: 1 + 0.1 * share)  # at a share of 1: 10 % in a fifth of the steps
    shares = [duty.share for duty in duties]
    assert min(shares) > FLOOR
    average = sum(0.1 * share * 0.2 for share in shares) / len(shares)
    assert OVERHEAD / 2 < average < 1.1 * OVERHEAD


def test_a_save_always_goes_on_however_much_it_slows() -> None:
    assert {duty.share for duty in train(lambda share: 3.0)} == {FLOOR}


def test_a_save_gets_its_time_back_when_training_feels_it_no_more() -> None:
    duty = Duty(share=FLOOR, plain=(STEP_S,) * 8, saving=0.5)
    for _ in range(8 * JUDGED_STEPS):
        duty = observe(duty, STEP_S, beside=True, overhead=OVERHEAD)
    assert duty.share == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_wander_by_themselves_are_not_laid_to_a_save(seed: int) -> None:
    shares = [duty.share for duty in train(lambda share: 1.0, wander=0.3, seed=seed)]
    assert sum(shares) / len(shares) > 0.9


def test_a_rare_save_may_slow_its_steps_more_than_one_that_never_ends() -> None:
    rare, often = (train(lambda share: 1.04, saving=saving)[-1].share for saving in (0.1, 0.9))
    assert rare == 1.0
    assert often == FLOOR


def test_nothing_is_judged_without_steps_to_compare_with() -> None:
    duty = Duty()
    for _ in range(100):
        duty = observe(duty, STEP_S, beside=True, overhead=OVERHEAD)
    assert duty.share == 1.0
    assert "no steps without a save" in duty.reason


def test_steps_of_long_ago_are_no_measure() -> None:
    duty = Duty(plain=(STEP_S,) * 8)
    for _ in range(1000):
        duty = observe(duty, 2 * STEP_S, beside=True, overhead=OVERHEAD)
    assert duty.share == 1.0


def test_the_reason_has_the_numbers() -> None:
    duty = Duty(plain=(STEP_S,) * 8, saving=0.5)
    for _ in range(JUDGED_STEPS):
        duty = observe(duty, 1.2 * STEP_S, beside=True, overhead=OVERHEAD)
    assert duty.reason == "steps beside a save are 20.0% slower, 10.6% on average, and 1.0% is allowed"


class Clock:
    """Time that passes only by waiting and by saying so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.cpu = 0.0
        self.waited: list[float] = []
        self.throttle = Throttle(clock=lambda: self.now, cpu=lambda: self.cpu)
        monkeypatch.setattr(self.throttle, "wait", self._wait)

    def _wait(self, pause_s: float) -> None:
        self.waited.append(pause_s)
        self.now += pause_s

    def step(self, took_s: float, worker: str = "w") -> None:
        self.now += took_s
        self.throttle.stepped(worker, took_s)

    def slowed(self) -> None:
        """Training has felt saves until their share is at the floor."""
        for _ in range(8):
            self.step(STEP_S)
        for _ in range(10 * JUDGED_STEPS):
            self.throttle.count(STEP_S)
            self.step(2 * STEP_S)
        assert self.throttle.duty.share == FLOOR


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_nothing_waits_before_training_has_felt_anything(clock: Clock) -> None:
    clock.step(STEP_S)
    clock.throttle.save().pass_chunk(0.01)
    assert clock.waited == []


def test_a_thread_waits_so_that_it_works_its_share_of_the_time(clock: Clock) -> None:
    clock.slowed()
    turn = clock.throttle.save()
    clock.cpu = 5.0
    turn.pass_chunk()  # whatever this thread did before
    clock.waited.clear()
    clock.cpu += 0.004
    turn.pass_chunk()
    turn.pass_chunk(0.002)
    assert clock.waited == pytest.approx([0.004 * 3, 0.002 * 3])
    assert turn.slept_s == pytest.approx(PAUSE_MOST_S + 0.018)


def test_no_single_wait_is_long(clock: Clock) -> None:
    clock.slowed()
    clock.throttle.save().pass_chunk(60.0)
    assert clock.waited == [PAUSE_MOST_S]


def test_a_forced_save_and_one_in_a_hurry_wait_for_nothing(clock: Clock) -> None:
    clock.slowed()
    clock.throttle.save(forced=True).pass_chunk(0.01)
    clock.throttle.hurry()
    clock.throttle.save().pass_chunk(0.01)
    assert clock.waited == []


def test_nothing_waits_where_no_training_goes_on(clock: Clock) -> None:
    clock.slowed()
    clock.now += 10 * STEP_S
    clock.throttle.save().pass_chunk(0.01)
    assert clock.waited == []


def test_a_save_waits_no_longer_than_its_objective_leaves_room_for(clock: Clock) -> None:
    clock.slowed()
    clock.throttle.allow(OVERHEAD, 0.05)
    turn = clock.throttle.save()
    for _ in range(9):
        turn.pass_chunk(0.01)
        clock.step(STEP_S)
    assert clock.waited == pytest.approx([0.03, 0.02])
    clock.throttle.save().pass_chunk(0.001)
    assert len(clock.waited) == 3, "the next save has its own"


def test_steps_of_every_worker_are_compared_with_the_work_since_its_last(clock: Clock) -> None:
    for worker in "ab":
        clock.step(STEP_S, worker)
    clock.throttle.count(0.05)
    for worker in "abab":
        clock.step(STEP_S, worker)
    assert (len(clock.throttle.duty.beside), len(clock.throttle.duty.plain)) == (2, 4)


def test_a_new_attempt_is_measured_anew_and_keeps_what_was_learnt(clock: Clock) -> None:
    clock.slowed()
    clock.throttle.restart()
    assert clock.throttle.duty.plain == ()
    assert clock.throttle.duty.share == FLOOR


def test_hurry_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "PAUSE_MOST_S", 3600.0)
    throttle = Throttle()
    throttle._duty = Duty(share=FLOOR)
    throttle.stepped("w", 1e6)
    waiting = threading.Thread(target=throttle.save().pass_chunk, args=(1000.0,))
    waiting.start()
    throttle.hurry()
    waiting.join(60.0)
    assert not waiting.is_alive()
