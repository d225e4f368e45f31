"""From measured steps and saves to the next cadence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_dr.checkpoint.failures import DAY_S, Losses, Tally
from ray_dr.checkpoint.pace import Pace, first_cadence
from ray_dr.model.attempt import Cadence
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.job import Every, Job, MemoryTier, StoreTier
from ray_dr.model.journal import PartSaved, Where


def job(memory: Every | None = None, store: Every | None = None) -> Job:
    return Job(
        "j", StoreTier("memory://x", store or Every(seconds=30.0)), memory=MemoryTier(memory or Every()), overhead=0.01
    )


NEVER = Every(seconds=float("inf"))


def measured(
    step_s: float, stall_s: float, *, steps: int = 40, every: int = 4, slower: float = 0.0, seal_s: float = 0.001
) -> Pace:
    """A pace that has seen `steps` steps with a save after every fourth, and one write of a second."""
    pace = Pace()
    for step in range(1, steps + 1):
        took = step_s + (slower if step % every == 1 and step > 1 else 0.0)
        pace.stepped(StepRecord(1, step, 0, 1, (), "", took))
        if step % every == 0:
            pace.saved(PartSaved(0.0, VersionId(1, step), 0, 1, Where.MEMORY, "n", 1, seal_s, stall_s, 0))
    pace.saved(PartSaved(0.0, VersionId(1, 4), 0, 1, Where.STORE, "n", 1, 1.0, 0.0, 1))
    return pace


def test_the_first_cadence_is_what_the_user_said() -> None:
    assert first_cadence(job(Every(steps=3), Every(steps=9))) == Cadence(0, 3, 9)
    assert first_cadence(job()) == Cadence(0, 4, 0)


def test_nothing_changes_before_anything_is_measured() -> None:
    assert Pace().next(job(), Cadence(0, 4, 0), 0) is None


def test_a_save_that_costs_next_to_nothing_is_taken_more_often() -> None:
    cadence = measured(0.1, 0.0005).next(job(), Cadence(0, 4, 0), 40)
    assert cadence is not None
    assert cadence.memory_every == 2


def test_a_save_that_costs_much_is_taken_less_often() -> None:
    cadence = measured(0.1, 0.02).next(job(), Cadence(0, 4, 0), 40)
    assert cadence is not None
    assert cadence.memory_every == 8


def test_a_save_the_agent_works_on_for_long_costs_its_stall_and_that_work() -> None:
    assert measured(0.1, 0.002, seal_s=0.05).cost_s == pytest.approx(0.002 + 0.05)


def test_work_of_the_agent_that_is_short_beside_a_step_costs_nothing() -> None:
    assert measured(0.1, 0.002, seal_s=0.0015).cost_s == pytest.approx(0.002)
    assert measured(0.01, 0.002, seal_s=0.009).cost_s == pytest.approx(0.002 + 0.009)


def test_a_long_seal_makes_saves_rarer_though_they_stall_nothing() -> None:
    cadence = measured(0.1, 0.0, seal_s=0.2).next(job(), Cadence(0, 4, 0), 40)
    assert cadence is not None
    assert cadence.memory_every == 8


def test_steps_that_happen_to_be_slower_after_a_save_change_neither_its_cost_nor_the_step_time() -> None:
    pace = measured(0.1, 0.002, slower=0.05)
    assert pace.cost_s == pytest.approx(0.002)
    assert pace.step_s == pytest.approx(0.1)


def test_step_times_of_long_ago_are_forgotten() -> None:
    pace = measured(0.1, 0.0)
    for step in range(41, 61):
        pace.stepped(StepRecord(1, step, 0, 1, (), "", 0.3))
    assert pace.step_s == pytest.approx(0.3)


@pytest.mark.parametrize("memory", [Every(), Every(steps=7), NEVER])
def test_the_store_follows_the_users_seconds_whatever_the_memory_interval_is(memory: Every) -> None:
    cadence = measured(0.1, 0.004).next(job(memory), first_cadence(job(memory)), 40)
    assert cadence is not None
    assert cadence.store_every == 300


def test_a_tier_that_is_never_saved_to_has_no_interval() -> None:
    assert first_cadence(job(NEVER, NEVER)) == Cadence(0, 0, 0)
    assert measured(0.1, 0.0005).next(job(NEVER, NEVER), Cadence(0, 0, 0), 40) is None
    to_store = measured(0.1, 0.0005).next(job(NEVER), Cadence(0, 0, 0), 40)
    assert to_store is not None
    assert (to_store.memory_every, to_store.store_every) == (0, 300)
    in_memory = measured(0.1, 0.0005).next(job(store=NEVER), Cadence(0, 4, 0), 40)
    assert in_memory is not None
    assert (in_memory.memory_every, in_memory.store_every) == (2, 0)


def test_a_new_cadence_begins_after_every_rank_can_have_heard_of_it() -> None:
    cadence = measured(0.1, 0.0005).next(job(), Cadence(0, 4, 0), 40)
    assert cadence is not None
    assert cadence.from_step >= 42


def test_a_settled_cadence_stays() -> None:
    pace, current = measured(0.1, 0.0005), Cadence(0, 4, 0)
    for _ in range(10):
        current = pace.next(job(), current, 40) or current
    assert pace.next(job(), current, 40) is None


def test_a_new_attempt_measures_its_steps_anew() -> None:
    pace = measured(0.1, 0.01)
    pace.restart()
    assert pace.step_s == 0.0
    assert pace.next(job(), Cadence(0, 4, 0), 0) is None
    for step in range(1, 5):
        pace.stepped(StepRecord(2, step, 0, 1, (), "", 0.2))
    assert pace.step_s == pytest.approx(0.2)
    assert pace.cost_s == pytest.approx(0.01)


def test_the_store_is_written_as_often_as_the_recovery_point_objective_asks() -> None:
    pace = measured(0.1, 0.0005)  # a write takes a second
    strict = replace(job(), rpo_s=5.0)
    cadence = pace.next(strict, Cadence(0, 4, 0), 40)
    assert cadence is not None
    assert cadence.store_every == 40
    assert pace.exposed_s(cadence) == pytest.approx(5.0)
    assert "at most 5 s of work may be lost: 4 s" in pace.reason(strict, Cadence(0, 4, 0))
    assert pace.unmet(strict, cadence) == ""


def test_an_objective_below_what_a_write_takes_is_seen_to_be_out_of_reach() -> None:
    pace = measured(0.1, 0.0005)
    strict = replace(job(), rpo_s=1.5)
    cadence = pace.next(strict, Cadence(0, 4, 0), 40)
    assert cadence is not None
    assert cadence.store_every == 10, "a new write never starts before the last one is done"
    assert pace.exposed_s(cadence) == pytest.approx(2.0)
    assert pace.unmet(strict, cadence).startswith("at most 1.5 s of work may be lost, but a write takes 1 s")
    assert pace.unmet(strict, cadence).endswith("up to 2 s would be lost")


def test_an_objective_is_not_judged_before_a_write_is_measured() -> None:
    pace = Pace()
    for step in range(1, 9):
        pace.stepped(StepRecord(1, step, 0, 1, (), "", 0.1))
    assert pace.unmet(replace(job(), rpo_s=1.5), Cadence(0, 4, 100)) == ""
    assert "nothing is ever saved" in pace.unmet(replace(job(store=NEVER), rpo_s=1.5), Cadence(0, 4, 0))


AUTO_STORE = job(store=Every())


def lost(pace: Pace, *, own: int = 0, peer: int = 0, store: int = 0, days: float = 10.0, nodes: int = 2) -> Pace:
    pace.losses = Losses(Tally(own, peer, store, nodes * days * DAY_S, days * DAY_S, running=True), nodes)
    return pace


def settled(pace: Pace, wanted: Job) -> Cadence:
    current = first_cadence(wanted)
    for _ in range(30):
        current = pace.next(wanted, current, 40) or current
    return current


def test_a_store_that_is_left_alone_is_written_as_the_losses_of_all_nodes_ask_for() -> None:
    calm, rough = (settled(lost(measured(0.1, 0.0005), store=seen), AUTO_STORE).store_every for seen in (0, 40))
    assert rough == pytest.approx((2 * 0.5 * DAY_S / 4) ** 0.5 / 0.1, rel=0.3)
    assert rough < calm / 4


def test_losses_of_a_node_are_the_memorys_where_it_has_copies_and_the_stores_where_not() -> None:
    with_copies = settled(lost(measured(0.1, 0.004), peer=20_000), AUTO_STORE)
    alone = settled(lost(measured(0.1, 0.004), peer=20_000), replace(AUTO_STORE, memory=MemoryTier(Every(), 1)))
    assert with_copies.memory_every < alone.memory_every
    assert with_copies.store_every > 2 * alone.store_every


def test_before_a_write_is_measured_the_store_is_written_now_and_then() -> None:
    pace = Pace()
    for step in range(1, 9):
        pace.stepped(StepRecord(1, step, 0, 1, (), "", 0.1))
    cadence = pace.next(AUTO_STORE, Cadence(0, 4, 0), 8)
    assert cadence is not None
    assert cadence.store_every == 100


def test_intervals_left_alone_fit_into_each_other() -> None:
    cadence = settled(lost(measured(0.1, 0.01), store=5), AUTO_STORE)
    assert cadence.memory_every > 1
    assert cadence.store_every % cadence.memory_every == 0


def test_memory_is_never_saved_to_more_rarely_than_the_store() -> None:
    cadence = settled(lost(measured(0.1, 0.5)), job(store=Every(seconds=3.0)))
    assert cadence.memory_every == cadence.store_every == 30


def test_how_much_a_write_slows_training_is_measured() -> None:
    pace = Pace()
    for step in range(40):
        took_s = 0.13 if 20 <= step < 30 else 0.1
        pace.stepped(StepRecord(1, step, 0, 1, (), "", took_s), 100.0 + step)
    assert pace.slowdown == 0.5, "before the first write"
    pace.saved(PartSaved(129.5, VersionId(1, 19), 0, 1, Where.STORE, "n", 1, 10.0, 0.0, 1))
    assert pace.slowdown == pytest.approx(0.3)


def test_a_write_that_training_does_not_feel_still_costs_a_little() -> None:
    pace = Pace()
    for step in range(40):
        pace.stepped(StepRecord(1, step, 0, 1, (), "", 0.1), 100.0 + step)
    pace.saved(PartSaved(129.5, VersionId(1, 19), 0, 1, Where.STORE, "n", 1, 10.0, 0.0, 1))
    assert pace.slowdown == 0.05


def test_the_reason_says_what_decided_each_interval_with_the_numbers() -> None:
    pace = lost(measured(0.1, 0.004), store=10)
    assert pace.reason(AUTO_STORE, Cadence(0, 4, 400)) == (
        "a step takes 100 ms; "
        "memory: a save costs 4 ms, a loss is expected every 99 d (0 seen in 480 node-hours): 4.3 min is best; "
        "0.5% of the time is spent in any case: 800 ms; "
        "store: a save costs 500 ms, a loss is expected every 26 h (10 seen in 10 d): 5.1 min is best; "
        "by a factor of two at once: 80 s for now"
    )
