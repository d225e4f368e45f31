"""Intervals: their bounds over any measurements, and what they waste over simulated months of failures."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_dr.checkpoint.cadence import Bounds, Costs, Rhythm, choose
from ray_dr.checkpoint.failures import ALL_PRIOR, DAY_S, Rate, measured_rate
from ray_dr.model.attempt import Cadence
from ray_dr.model.job import Every
from ray_dr.model.journal import Where

MONTH_S = 30 * DAY_S
times = st.floats(1e-3, 1e4)
shares = st.floats(1e-3, 1.0)
rates = st.floats(1e-9, 1e-1)
every = st.one_of(
    st.just(Every()), st.builds(Every, steps=st.integers(1, 9999)), st.builds(Every, seconds=st.floats(0.1, 1e4))
)
bounds = st.builds(
    Bounds, every, shares, st.one_of(st.just(0.0), shares), st.one_of(st.just(math.inf), st.floats(1.0, 1e5)), st.integers(1, 9)
)
costs = st.builds(Costs, times, st.one_of(st.just(0.0), times), st.one_of(st.just(0.0), times))
currents = st.one_of(st.none(), st.integers(1, 10_000))


@given(costs, rates, bounds, currents)
def test_an_interval_is_never_shorter_than_a_write_nor_longer_than_the_objective(
    costs: Costs, rate: float, bounds: Bounds, current: int | None
) -> None:
    chosen = choose(costs, Rate(rate), bounds, current)
    assert chosen.steps >= 1
    assert chosen.steps >= costs.write_s / costs.step_s
    if bounds.rpo_s >= 2 * costs.write_s + 2 * costs.step_s:  # else no interval could keep it
        assert chosen.steps * costs.step_s + costs.write_s <= bounds.rpo_s * (1 + 1e-9)
    assert chosen.reason


@given(costs, rates, shares, currents)
def test_an_interval_costs_no_more_than_the_budget_and_changes_by_no_more_than_a_factor(
    costs: Costs, rate: float, budget: float, current: int | None
) -> None:
    free = Costs(costs.step_s, costs.cost_s)
    chosen = choose(free, Rate(rate), Bounds(budget=budget), current).steps
    if current is not None:
        assert current / 2 <= chosen <= max(2 * current, 1)
    elif costs.cost_s / budget < 6 * 3600:  # beyond, the longest interval speaks
        assert costs.cost_s / (chosen * costs.step_s) <= budget * (1 + 1e-9)


@given(costs, rates, st.floats(1.01, 1e4), bounds, currents)
def test_more_failures_never_make_an_interval_longer(
    costs: Costs, rate: float, more: float, bounds: Bounds, current: int | None
) -> None:
    assert choose(costs, Rate(rate * more), bounds, current).steps <= choose(costs, Rate(rate), bounds, current).steps


@given(costs, rates, st.floats(1.01, 1e4), bounds, currents)
def test_a_dearer_save_never_makes_an_interval_shorter(
    costs: Costs, rate: float, more: float, bounds: Bounds, current: int | None
) -> None:
    dearer = Costs(costs.step_s, costs.cost_s * more, costs.write_s)
    assert choose(dearer, Rate(rate), bounds, current).steps >= choose(costs, Rate(rate), bounds, current).steps


PLACES = {Where.MEMORY: "memory_every", Where.DISK: "disk_every", Where.STORE: "store_every", Where.SECOND: "second_every"}
intervals = st.one_of(st.just(0), st.integers(1, 40))
cadences = st.builds(Cadence, st.just(0), intervals, intervals, intervals, intervals)


@given(st.integers(0, 90), cadences, st.lists(st.tuples(st.integers(1, 90), cadences), max_size=5))
def test_no_gap_is_longer_than_the_longest_interval_that_was_in_force_in_it_whenever_intervals_change(
    began: int, first: Cadence, changes: list[tuple[int, Cadence]]
) -> None:
    rhythm, cadence, step = Rhythm.begin(first, began), first, began
    last, longest = dict.fromkeys(PLACES, began), {where: getattr(first, name) for where, name in PLACES.items()}
    extra = dict.fromkeys(PLACES, 0)
    for lasts, following in [*changes, (90, None)]:
        for _ in range(lasts):
            step += 1
            rhythm, places = rhythm.next(step)
            assert Where.MEMORY in places or not places
            for where, name in PLACES.items():
                every = getattr(cadence, name)
                if every:
                    assert step - last[where] < longest[where] or where in places
                elif where is not Where.MEMORY:
                    assert where not in places
                if where in places:
                    extra[where] += every > 0 and step % every > 0 and where is not Where.MEMORY
                    last[where], longest[where] = step, every
                else:
                    assert not every or step % every, "multiples are always due"
        if following is not None:
            cadence, rhythm = following, rhythm.change(following)
            longest = {where: max(longest[where], getattr(cadence, name)) for where, name in PLACES.items()}
    assert all(count <= len(changes) for count in extra.values()), "one more for each change, at most"


# ------------------------------------------------------------------------------------------------------- virtual time


def failures(mtbf_s: float, months: float, seed: int) -> list[float]:
    """Seconds of uptime before each failure; the last one is cut off by the end."""
    dice, left, uptimes = random.Random(seed), months * MONTH_S, []
    while left > 0:
        uptimes.append(min(left, dice.expovariate(1 / mtbf_s)))
        left -= uptimes[-1]
    return uptimes


def wasted_s(uptime_s: float, interval_s: float, cost_s: float, write_s: float) -> float:
    """Of one uptime that ends with a failure: all that is not work kept by a save.

    A save begins after each `interval_s` of work, delays training by `cost_s` and counts `write_s` after its beginning.
    """
    kept = max(0, math.floor((uptime_s - max(0.0, write_s - cost_s)) / (interval_s + cost_s)))
    return uptime_s - kept * interval_s


def best_fixed_s(uptimes: list[float], cost_s: float, write_s: float, around_s: float) -> float:
    """The least waste of any fixed interval, known only afterwards: of those from a tenth of `around_s` to its tenfold."""
    tried = [around_s * 10 ** (k / 20) for k in range(-20, 21)]
    return min(sum(wasted_s(up, max(t, write_s), cost_s, write_s) for up in uptimes) for t in tried)


def learning_wasted_s(uptimes: list[float], cost_s: float, write_s: float) -> float:
    """What is wasted by intervals that are chosen anew every few hours, by the failures seen until then."""
    wasted, elapsed_s, current = 0.0, 0.0, 300
    for lost, uptime_s in enumerate(uptimes):
        left_s = uptime_s
        while True:
            rate = Rate(measured_rate(ALL_PRIOR, lost, elapsed_s), lost, elapsed_s)
            for _ in range(10):  # asked twice a second, so through with changing by a factor of two
                current = choose(Costs(0.1, cost_s, write_s), rate, Bounds(), current).steps
            interval_s = current * 0.1
            cycle_s = interval_s + cost_s
            cycles = max(1, round(ASKED_S / cycle_s))
            if cycles * cycle_s >= left_s:
                break
            wasted += cycles * cost_s
            left_s -= cycles * cycle_s
            elapsed_s += cycles * cycle_s
        wasted += wasted_s(left_s, interval_s, cost_s, write_s)
        elapsed_s += left_s
    return wasted


ASKED_S = 4 * 3600.0
PAIRS = [(0.005, 600.0), (0.05, 3600.0), (2.0, 1800.0), (2.0, 86_400.0), (30.0, 7200.0), (30.0, 6 * 86_400.0), (300.0, 14_400.0)]
"""(cost of a save, mean time between failures), seconds."""


@pytest.mark.parametrize(("cost_s", "mtbf_s"), PAIRS)
def test_the_interval_for_a_known_rate_wastes_about_as_little_as_the_best_fixed_one(cost_s: float, mtbf_s: float) -> None:
    uptimes = failures(mtbf_s, 1000 * mtbf_s / MONTH_S, seed=1)
    interval_s = choose(Costs(0.1, cost_s), Rate(1 / mtbf_s), Bounds()).steps * 0.1
    ours_s = sum(wasted_s(up, interval_s, cost_s, 0.0) for up in uptimes)
    assert ours_s <= 1.04 * best_fixed_s(uptimes, cost_s, 0.0, interval_s)


@pytest.mark.parametrize(("cost_s", "mtbf_s"), PAIRS)
def test_a_job_that_learns_its_rate_wastes_within_a_tenth_of_the_best_fixed_interval(cost_s: float, mtbf_s: float) -> None:
    """Jobs of a month or more, each beginning with the prior."""
    months = max(1.0, 60 * mtbf_s / MONTH_S) if mtbf_s > 2000 else 0.2
    jobs = [failures(mtbf_s, months, seed) for seed in range(4)]
    write_s = 2 * cost_s
    ours_s = sum(learning_wasted_s(job, cost_s, write_s) for job in jobs)
    together = [uptime for job in jobs for uptime in job]
    best_s = best_fixed_s(together, cost_s, write_s, math.sqrt(2 * cost_s * mtbf_s))
    assert ours_s <= 1.1 * best_s


def test_what_is_spent_in_any_case_is_all_that_is_wasted_beyond_the_best() -> None:
    cost_s, mtbf_s, budget = 0.005, 10 * 86_400.0, 0.01
    uptimes = failures(mtbf_s, 12.0, seed=3)
    interval_s = choose(Costs(0.1, cost_s), Rate(1 / mtbf_s), Bounds(budget=budget, spent=0.25)).steps * 0.1
    ours_s = sum(wasted_s(up, interval_s, cost_s, 0.0) for up in uptimes)
    assert ours_s / sum(uptimes) <= 0.25 * budget + best_fixed_s(uptimes, cost_s, 0.0, 90.0) / sum(uptimes)
