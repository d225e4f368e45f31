"""How often a job may fail, of what, and how long it waits before it tries again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.detection.taxonomy import FAULTS, Budget
from ray_dr.model.budget import Ledger
from ray_dr.model.recovery import FailureKind, Incident, Policy, Queued, State
from ray_dr.model.signal import FaultKind
from ray_dr.recovery import budget
from ray_dr.recovery.budget import Over

K = FaultKind
POLICY = Policy(1, 2, 1, 1, unwind_s=15.0, start_s=300.0, settle_s=1.0, attempts_without_progress=3)
NEW = State(Queued())
CAUSES = [kind for kind in FaultKind if kind is not K.STRAGGLER]


def incident(state: State, cause: FaultKind, at: float, detail: str = "gone") -> Incident:
    return Incident(state.incidents + 1, FailureKind.WORKER_LOST, "b/0.1", at, state.step, detail, cause)


def fail(state: State, cause: FaultKind, at: float = 100.0, detail: str = "gone") -> tuple[State, Over | None]:
    known = incident(state, cause, at, detail)
    after, over = budget.charge(state, known, POLICY)
    return replace(after, incidents=known.number), over


def go_on(state: State, at: float, steps: int = 1) -> State:
    """A group does its first step, and so many new ones."""
    state = budget.progressed(budget.ran(state, at)) if steps else budget.ran(state, at)
    return replace(state, step=state.step + steps)


def test_more_failures_in_a_row_than_allowed_end_the_job_whatever_they_are_of() -> None:
    state, over = NEW, None
    for cause in (K.NODE_GONE, K.HANG, K.PROCESS_GONE):
        state, over = fail(state, cause)
        assert over is None
    state, over = fail(state, K.NODE_GONE)
    assert over is not None
    assert over.resubmit
    assert over.reason == "4 attempts in a row made no new step after step 0; first: worker b/0.1 lost (gone) at step 0"


def test_a_new_step_begins_the_row_anew() -> None:
    state = NEW
    for attempt in range(20):
        state, over = fail(state, K.NODE_GONE, at=100.0 * attempt)
        assert over is None
        state = go_on(state, at=100.0 * attempt + 1)
    assert state.failures == 0


def test_what_was_announced_never_counts() -> None:
    state = NEW
    for attempt in range(50):
        state, over = fail(state, K.PREEMPTION, at=100.0 + attempt)
        assert over is None
        assert state.not_before == 0.0
    assert (state.failures, state.ledger.tries, state.ledger.roots) == (0, 0, ())


def test_what_turns_out_to_have_been_announced_is_given_back() -> None:
    state, _ = fail(NEW, K.NODE_GONE)
    before, _ = fail(state, K.NODE_GONE, at=105.0)
    assert (before.failures, before.ledger.tries, before.not_before) == (2, 2, 106.0)
    after = budget.recharge(before, replace(incident(state, K.PREEMPTION, 105.0), number=2), POLICY)
    assert (after.failures, after.ledger.tries, after.not_before) == (1, 1, 0.0)
    assert budget.spent(after.ledger, "node_gone") == 1.0
    again = budget.recharge(after, replace(incident(state, K.PREEMPTION, 105.0), number=2), POLICY)
    assert again == after


def test_a_charge_moves_to_the_root_that_becomes_known() -> None:
    state, _ = fail(NEW, K.COLLECTIVE_BROKEN)
    after = budget.recharge(state, replace(incident(NEW, K.NODE_FROZEN, 100.0)), POLICY)
    assert [root.name for root in after.ledger.roots] == ["node_frozen"]
    assert (after.failures, after.ledger.tries) == (1, 1)


def test_only_the_newest_incident_is_charged_anew() -> None:
    state, _ = fail(NEW, K.NODE_GONE)
    state, _ = fail(state, K.NODE_GONE)
    assert budget.recharge(state, replace(incident(NEW, K.PREEMPTION, 100.0), number=1), POLICY) == state


def test_the_first_retry_is_immediate_and_later_ones_wait_twice_as_long_each() -> None:
    assert [budget.back_off_s(tries) for tries in range(10)] == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert budget.back_off_s(10**6) == 60
    state = go_on(NEW, at=50.0)
    waits = []
    for attempt in range(3):
        at = 100.0 * (attempt + 1)
        state, _ = fail(state, K.NODE_GONE, at=at)
        waits.append(max(0.0, state.not_before - at))
    assert waits == [0.0, 1.0, 2.0]
    state, _ = fail(go_on(state, at=500.0), K.NODE_GONE, at=510.0)
    assert state.not_before == 0.0


def test_a_fault_that_lets_a_step_through_now_and_then_is_bounded_by_its_own_tokens() -> None:
    state, at, rows = NEW, 0.0, 0
    while rows < 20:
        for _ in range(2):  # one with a new step before it, one without
            at += 10.0
            state, over = fail(state, K.HANG, at=at)
            if over is not None:
                break
        if over is not None:
            break
        state = go_on(state, at=at + 1)
        rows += 1
    assert over is not None
    assert over.resubmit
    assert rows == budget.tokens(K.HANG, POLICY) - 1
    assert over.reason.startswith("hang has cost 7 attempts without a new step")


def test_an_hour_of_running_gives_a_token_back() -> None:
    state, _ = fail(NEW, K.HANG, at=0.0)
    state, _ = fail(state, K.HANG, at=10.0)
    assert budget.spent(state.ledger, "hang") == 2.0
    state, _ = fail(go_on(state, at=100.0), K.NODE_GONE, at=100.0 + 3600.0)
    assert budget.spent(state.ledger, "hang") == 1.0
    state, _ = fail(go_on(state, at=10_000.0), K.NODE_GONE, at=10_000.0 + 7200.0)
    assert budget.spent(state.ledger, "hang") == 0.0


def test_time_in_which_nothing_ran_gives_nothing_back() -> None:
    state, _ = fail(NEW, K.HANG, at=0.0)
    state, _ = fail(state, K.NODE_GONE, at=100_000.0)
    assert budget.spent(state.ledger, "hang") == 1.0


def test_a_root_that_the_program_is_to_blame_for_is_not_to_be_submitted_again() -> None:
    state, over = NEW, None
    for _ in range(4):
        state, over = fail(state, K.OUT_OF_MEMORY, detail="MemoryError")
    assert over is not None
    assert not over.resubmit
    assert "cannot help" in over.reason


def test_errors_of_other_words_are_other_roots() -> None:
    state, _ = fail(NEW, K.EXCEPTION, detail="ValueError: a")
    state, _ = fail(state, K.EXCEPTION, detail="ValueError: b")
    assert [root.spent for root in state.ledger.roots] == [1.0, 1.0]


def test_every_class_that_is_charged_has_tokens_and_the_others_need_none() -> None:
    for kind, fault in FAULTS.items():
        assert (budget.tokens(kind, POLICY) > 0) == fault.charged
    assert set(budget.SHARES) == set(Budget) - {Budget.FREE}


MOVES = st.lists(
    st.tuples(st.sampled_from(CAUSES), st.integers(0, 2), st.floats(0.0, 5000.0), st.sampled_from([None, *CAUSES])), max_size=40
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(MOVES)
def test_no_life_is_charged_for_progress_or_for_what_is_free(moves: list[tuple[FaultKind, int, float, FaultKind | None]]) -> None:
    state, at = go_on(NEW, at=0.0), 0.0
    for cause, steps, ran_s, known_later in moves:
        at += ran_s
        before = state
        state, over = fail(state, cause, at=at)
        if known_later is not None and over is None:
            state = budget.recharge(state, replace(incident(before, known_later, at), number=state.incidents), POLICY)
        held = known_later if known_later is not None and over is None else cause
        progress = before.step > before.reached
        assert state.failures <= (0 if progress else before.failures) + FAULTS[held].charged
        assert over is None or state.failures > POLICY.attempts_without_progress or "has cost" in over.reason
        assert state.not_before == 0.0 or FAULTS[held].charged
        assert 0.0 <= max(0.0, state.not_before - at) <= budget.BACK_OFF_MOST_S
        assert len(state.ledger.roots) <= budget.ROOTS_MOST
        assert all(root.spent > 0 for root in state.ledger.roots)
        if over is not None:
            return
        state = go_on(state, at=at, steps=steps)


def test_a_ledger_of_nothing_has_spent_nothing() -> None:
    assert budget.spent(Ledger(), "hang") == 0.0


@pytest.mark.parametrize("kind", [K.NODE_GONE, K.HANG, K.OUT_OF_MEMORY])
def test_one_row_is_never_cut_short_by_the_tokens_of_a_root(kind: FaultKind) -> None:
    """`attempts_without_progress` means what it says."""
    state, ended = NEW, 0
    for attempt in range(1, 10):
        state, over = fail(state, kind)
        if over is not None:
            ended = attempt
            break
    assert ended == POLICY.attempts_without_progress + 1
