"""What is chosen about a departure, for all times and rates."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ray_dr.model.departure import Rates
from ray_dr.recovery.preemption import AGREE_S, MARGIN_S, Choice, choose

seconds = st.floats(0.0, 1e5, allow_nan=False)
ever = seconds | st.just(math.inf)
rates = st.builds(
    Rates, step_s=seconds, staged_s=seconds, copied_s=seconds, delta_s=seconds, full_s=seconds, resume_s=seconds,
    copies=st.booleans(), committed=st.booleans(),
)  # fmt: skip


@given(left_s=ever, known=rates, enough_stay=st.booleans(), alone=st.booleans())
def test_nothing_is_begun_that_cannot_be_finished(left_s: float, known: Rates, enough_stay: bool, alone: bool) -> None:
    plan = choose(left_s, known, enough_stay=enough_stay, alone=alone)
    stop_s = AGREE_S + 2 * known.step_s
    secure_s = {
        Choice.MOVE: known.copied_s if known.copies and alone else known.staged_s + known.resume_s,
        Choice.DELTA: known.delta_s, Choice.FULL: known.full_s,
    }  # fmt: skip
    if plan.choice is not Choice.NOTHING:
        assert stop_s + secure_s[plan.choice] <= left_s - MARGIN_S or left_s == math.inf
        assert (plan.choice is Choice.MOVE) == enough_stay
        assert plan.choice is not Choice.DELTA or known.committed, "a delta needs something to build on"
    else:
        assert plan.needs_s > left_s - 2 * MARGIN_S, "what fits is done"


@given(sooner_s=ever, later_s=ever, known=rates, enough_stay=st.booleans(), alone=st.booleans())
def test_more_time_never_gives_a_worse_choice(
    sooner_s: float, later_s: float, known: Rates, enough_stay: bool, alone: bool
) -> None:
    first, second = sorted((sooner_s, later_s))
    order = list(Choice)
    worse = choose(first, known, enough_stay=enough_stay, alone=alone).choice
    better = choose(second, known, enough_stay=enough_stay, alone=alone).choice
    assert order.index(better) <= order.index(worse)


@given(known=rates, enough_stay=st.booleans(), alone=st.booleans())
def test_with_all_the_time_there_is_something_is_always_done(known: Rates, enough_stay: bool, alone: bool) -> None:
    assert choose(math.inf, known, enough_stay=enough_stay, alone=alone).choice is not Choice.NOTHING
