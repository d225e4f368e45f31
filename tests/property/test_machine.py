"""Long random lives: a small world answers the machine's actions, faults strike, and the invariants hold throughout."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.events import Event, Opened
from ray_dr.model.recovery import Failed, Finished, Policy, Running, State
from ray_dr.recovery.explore import alphabet, fair_event
from ray_dr.recovery.invariants import check
from ray_dr.recovery.machine import initial, step

FAIR_EVENTS = 60

policies = st.builds(
    Policy,
    nodes_min=st.integers(1, 2),
    nodes_max=st.integers(2, 3),
    min_nodes_to_run=st.integers(1, 2),
    workers_per_node=st.integers(1, 3),
    unwind_s=st.just(2.0),
    start_s=st.just(4.0),
    settle_s=st.just(1.0),
    attempts_without_progress=st.integers(0, 5),
    standby_nodes=st.integers(0, 1),
    standby_processes=st.integers(0, 1),
)


def _live(policy: Policy, seed: int, length: int, faults: float) -> tuple[list[Event], list[State]]:
    """A life's events and states: mostly what is awaited happens, and with probability `faults` anything that can."""
    dice = random.Random(seed)
    state, events, states = initial(), [], []
    event: Event = Opened(100.0, 1, 0)
    for _ in range(length):
        decision = step(state, event, policy)
        check(state, event, decision, policy)
        events.append(event)
        states.append(decision.state)
        state = decision.state
        if isinstance(state.phase, Finished | Failed):
            break
        event = _next_event(state, policy, event.at + 0.1, dice, faults)
    return events, states


def _next_event(state: State, policy: Policy, at: float, dice: random.Random, faults: float) -> Event:
    fair = fair_event(state, policy, at)
    if fair is not None and dice.random() > faults:
        return fair
    possible = list(alphabet(state, policy, at))
    # Being fenced or stopped ends a life early: rarely, so that lives get long.
    lasting = [event for event in possible if type(event).__name__ not in ("FencedOff", "StopRequested")]
    return dice.choice(possible if dice.random() < 0.02 else lasting)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(policies, st.integers(0, 2**32), st.floats(0.05, 0.9))
def test_long_lives_break_no_invariant(policy: Policy, seed: int, faults: float) -> None:
    _live(policy, seed, 150, faults)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(policies, st.integers(0, 2**32), st.floats(0.05, 0.9))
def test_a_long_life_comes_to_run_or_end_once_nothing_fails_any_more(policy: Policy, seed: int, faults: float) -> None:
    events, states = _live(policy, seed, 60, faults)
    state, at = states[-1], events[-1].at
    for _ in range(FAIR_EVENTS):
        event = fair_event(state, policy, at)
        if event is None:
            break
        state, at = step(state, event, policy).state, event.at
    assert isinstance(state.phase, Running | Finished | Failed)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(policies, st.integers(0, 2**32))
def test_the_same_events_give_the_same_states(policy: Policy, seed: int) -> None:
    events, states = _live(policy, seed, 80, 0.3)
    state, again = initial(), []
    for event in events:
        state = step(state, event, policy).state
        again.append(state)
    assert again == states


@settings(max_examples=50, deadline=None, derandomize=True)
@given(policies, st.integers(0, 2**32))
def test_hearing_everything_twice_never_breaks_an_invariant(policy: Policy, seed: int) -> None:
    events, _ = _live(policy, seed, 80, 0.3)
    state = initial()
    for event in [twice for once in events for twice in (once, once)]:
        decision = step(state, event, policy)
        check(state, event, decision, policy)
        state = decision.state
