"""Which way out of a failure is taken, and what is expected of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.ladder import Measured, Rung, Way
from ray_dr.recovery.ladder import Situation, arrivals, choose, seconds, ways, weighed

TIMES = Measured(form_s=0.1, restore_s=0.2, first_step_s=0.1, stop_s=0.1, process_start_s=4.0, node_join_s=60.0, step_s=0.5)
"""A group begins in 0.4 s, and growing costs 0.5 s."""


def best(now: Situation, measured: Measured = TIMES) -> Way:
    way, _ = choose(now, measured)
    assert way is not None
    return way


@pytest.mark.parametrize(
    ("now", "rung", "workers"),
    [
        (Situation(4, 4), Rung.REBUILD, 4),
        (Situation(4, 4, newcomers=1), Rung.STANDBY, 4),
        (Situation(4, 3), Rung.SHRINK, 3),
        (Situation(4, 3, starting=(4.0,)), Rung.SHRINK, 3),
        (Situation(4, 3, starting=(0.3,)), Rung.PROCESS, 4),
        (Situation(4, 3, spare=1), Rung.SHRINK, 3),
        (Situation(4, 3, coming=1), Rung.SHRINK, 3),
        (Situation(4, 0, starting=(4.0,)), Rung.PROCESS, 1),
        (Situation(4, 0, spare=4), Rung.SPARE, 4),
        (Situation(4, 1, least=4, coming=4), Rung.AUTOSCALE, 4),
        (Situation(4, 3, least=4, spare=1, coming=1), Rung.SPARE, 4),
        (Situation(4, 4, bad_step=True), Rung.SKIP, 4),
        (Situation(4, 4, distrusted=True, older_steps_lost=50), Rung.ROLLBACK, 4),
        (Situation(4, 0, elsewhere_s=20.0), Rung.ELSEWHERE, 4),
        (Situation(4, 1, least=4, coming=4, elsewhere_s=20.0), Rung.ELSEWHERE, 4),
        (Situation(4, 4, elsewhere_s=20.0), Rung.REBUILD, 4),
    ],
)
def test_the_way_that_costs_least_is_taken(now: Situation, rung: Rung, workers: int) -> None:
    way = best(now)
    assert (way.rung, way.workers) == (rung, workers)


def test_there_is_no_way_for_too_few_with_nobody_to_come() -> None:
    assert choose(Situation(4, 1, least=2), TIMES) == (None, None)
    assert choose(Situation(4, 0), TIMES) == (None, None)


def test_who_is_about_to_be_up_is_waited_for_until_their_coming_would_cost_more_than_an_interruption() -> None:
    """Half of the work of W seconds is lost at half the size; coming later costs 0.5 s: worth it up to half a second."""
    taken = {after_s: best(Situation(2, 1, starting=(after_s,))).rung for after_s in (0.1, 0.3, 0.5, 0.6, 0.8, 1.0, 2.0)}
    assert [after_s for after_s, rung in taken.items() if rung is Rung.PROCESS] == [0.1, 0.3, 0.5]


def test_the_more_are_missing_the_longer_it_is_worth_waiting() -> None:
    one_of_many, most = Situation(8, 7, starting=(0.55,)), Situation(8, 1, starting=(0.55,) * 7)
    assert best(one_of_many).rung is Rung.SHRINK
    assert best(most).rung is Rung.PROCESS


def test_a_longer_interruption_makes_it_worth_to_wait_longer() -> None:
    now = Situation(4, 3, starting=(4.0,))
    assert best(now).rung is Rung.SHRINK
    assert best(now, replace(TIMES, restore_s=20.0)).rung is Rung.PROCESS


def test_of_several_only_those_are_waited_for_that_come_soon() -> None:
    way = best(Situation(4, 2, starting=(0.1, 30.0)))
    assert (way.rung, way.workers, way.wait_s) == (Rung.PROCESS, 3, 0.1)


def test_those_that_come_together_come_as_one_when_the_last_is_there() -> None:
    found = arrivals(Situation(8, 2, starting=(4.0, 4.4, 9.0), coming=2, asked_s=20.0), TIMES)
    assert [(arrival.after_s, arrival.workers) for arrival in found] == [(4.4, 2), (9.0, 1), (44.0, 2)]


def test_a_node_that_is_overdue_is_expected_the_less_soon_the_longer_it_is() -> None:
    waits = [arrivals(Situation(2, 1, coming=1, asked_s=asked_s), TIMES)[0].after_s for asked_s in (0.0, 50.0, 100.0, 400.0)]
    assert waits == [64.0, 14.0, 44.0, 344.0]


def test_living_twins_lose_no_step_and_an_older_version_loses_more() -> None:
    lost = Situation(4, 4, steps_lost=10, older_steps_lost=40)
    assert best(lost).loss_s == pytest.approx(0.4 + 5.0)
    assert best(replace(lost, twins=True)).loss_s == pytest.approx(0.4)
    assert best(replace(lost, twins=True, distrusted=True)).loss_s == pytest.approx(0.4 + 20.0)


def test_a_step_that_is_not_to_be_trusted_is_no_longer_just_skipped() -> None:
    assert best(Situation(4, 4, bad_step=True, distrusted=True, older_steps_lost=3)).rung is Rung.ROLLBACK


def test_a_choice_is_told_with_what_it_was_weighed_against() -> None:
    now = Situation(4, 3, starting=(3.7,))
    way, besides = choose(now, TIMES)
    assert way is not None
    assert weighed(way, besides, 4) == (
        "going on with 3 of 4 workers: 0.4 s expected; waiting for processes that are starting (4 of 4 workers) would take 4.1 s"
    )
    way, besides = choose(replace(now, starting=(0.1,)), TIMES)
    assert way is not None
    assert weighed(way, besides, 4) == (
        "waiting for processes that are starting (4 of 4 workers): 0.5 s expected; going on with 3 of 4 workers would take "
        "0.4 s, but cost 0.39 s of work more in all"
    )
    assert [seconds(number) for number in (0.123, 4.06, 64.2, 1234.5)] == ["0.12 s", "4.1 s", "64 s", "1234 s"]


some_s = st.floats(0.0, 300.0)
measures = st.builds(
    Measured, form_s=some_s, restore_s=some_s, first_step_s=some_s, stop_s=some_s, process_start_s=some_s, node_join_s=some_s,
    step_s=st.floats(0.001, 60.0),
)  # fmt: skip


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    wanted = draw(st.integers(1, 64))
    up = draw(st.integers(0, wanted))
    return Situation(
        wanted, up, newcomers=draw(st.integers(0, up)), least=draw(st.integers(1, wanted)),
        starting=tuple(draw(st.lists(some_s, max_size=5))), spare=draw(st.integers(0, 4)), coming=draw(st.integers(0, 8)),
        asked_s=draw(some_s), steps_lost=draw(st.integers(0, 100)), twins=draw(st.booleans()), bad_step=draw(st.booleans()),
        distrusted=draw(st.booleans()), older_steps_lost=draw(st.integers(0, 1000)),
        elsewhere_s=draw(st.one_of(st.none(), some_s)),
    )  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(situations(), measures)
def test_every_way_is_one_the_job_can_go_and_the_best_is_taken(now: Situation, measured: Measured) -> None:
    found = list(ways(now, measured))
    for way in found:
        assert now.least <= way.workers <= now.wanted
        assert 0.0 <= way.wait_s <= way.next_step_s <= way.loss_s + 1e-6
        assert way.rung is Rung.SKIP or way.next_step_s >= measured.begin_s
        assert way.rung is not Rung.SKIP or not now.distrusted
    chosen, besides = choose(now, measured)
    assert (chosen is None) == (not found)
    if chosen is not None:
        assert chosen.loss_s == min(way.loss_s for way in found)
        assert besides is None or besides.loss_s >= chosen.loss_s
        assert weighed(chosen, besides, now.wanted)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(situations(), measures)
def test_with_one_more_worker_up_the_next_step_costs_no_more(now: Situation, measured: Measured) -> None:
    before, after = choose(now, measured)[0], choose(replace(now, up=min(now.wanted, now.up + 1)), measured)[0]
    if before is not None:
        assert after is not None
        assert after.loss_s <= before.loss_s + measured.stop_s + measured.begin_s + 1e-6
