"""The job's machine over all short lives: invariants after every step, a way back to Running from every state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from ray_dr.model.actions import Action
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.events import Event, FirstStep, NodeJoined, Tick, WorkerRaised, WorkerReady
from ray_dr.model.ladder import Measured
from ray_dr.model.recovery import Failed, Finished, Policy, Running, State
from ray_dr.recovery.diagram import until_running
from ray_dr.recovery.explore import Explored, alphabet, explore, fair_event, opened
from ray_dr.recovery.invariants import check
from ray_dr.recovery.machine import step
from ray_dr.recovery.timers import next_due

ONE = Policy(1, 1, 1, 1, unwind_s=2.0, start_s=4.0, settle_s=1.0, attempts_without_progress=0)
TWO = replace(ONE, nodes_max=2, attempts_without_progress=1)
FIXED = replace(TWO, nodes_min=2, min_nodes_to_run=2)
THREE = replace(ONE, nodes_max=3, attempts_without_progress=2)
PAIRS = replace(TWO, workers_per_node=2)
QUICK = replace(PAIRS, measured=Measured(process_start_s=0.5))
"""Worth waiting for: going on at once would mean a second interruption for hardly any time gained."""
STANDBY_NODE = replace(TWO, nodes_min=2, standby_nodes=1)
STANDBY_PROCESS = replace(TWO, standby_processes=1)
STANDBY_BOTH = replace(TWO, standby_nodes=1, standby_processes=1)



def with_standbys(policy: Policy) -> tuple[State, float]:
    """A job that runs, once all that is to stand by is up."""
    state, at = until_running(policy)
    while event := next((event for event in alphabet(state, policy, at) if is_wanted(state, event)), None):
        state = step(state, event, policy).state
    assert isinstance(state.phase, Running), "nothing stopped for it"
    return state, at


def is_wanted(state: State, event: Event) -> bool:
    return isinstance(event, WorkerReady) or (isinstance(event, NodeJoined) and state.requested > len(state.nodes))


LIVES = {
    "one node, queued": (ONE, opened(ONE), 6),
    "one node, running": (ONE, until_running(ONE), 4),
    "two nodes, queued": (TWO, opened(TWO), 7),
    "two nodes, running": (TWO, until_running(TWO), 4),
    "one of two nodes, running": (TWO, until_running(ONE), 4),
    "two nodes and no fewer, running": (FIXED, until_running(FIXED), 4),
    "three nodes, running": (THREE, until_running(THREE), 3),
    "two workers on each of two nodes, running": (PAIRS, until_running(PAIRS), 3),
    "two nodes and one that stands by, queued": (STANDBY_NODE, opened(STANDBY_NODE), 7),
    "two nodes and one that stands by, running": (STANDBY_NODE, with_standbys(STANDBY_NODE), 4),
    "two nodes and a process that stands by on each, running": (STANDBY_PROCESS, with_standbys(STANDBY_PROCESS), 4),
    "standby nodes and processes, running": (STANDBY_BOTH, with_standbys(STANDBY_BOTH), 3),
    "two workers on each of two nodes, soon up again, running": (QUICK, until_running(QUICK), 3),
}
FAIR_EVENTS = 40


@functools.cache
def _steps(life: str) -> tuple[Policy, Sequence[Explored]]:
    policy, (start, at), depth = LIVES[life]
    return policy, list(explore(policy, start, at, depth))


@pytest.mark.parametrize("life", LIVES)
def test_no_short_life_breaks_an_invariant(life: str) -> None:
    policy, steps = _steps(life)
    for seen in steps:
        check(seen.before, seen.event, seen.decision, policy)
    assert len(steps) > 1000


@pytest.mark.parametrize("life", LIVES)
def test_every_state_comes_to_run_or_end_once_nothing_fails_any_more(life: str) -> None:
    policy, steps = _steps(life)
    sound: set[State] = set()
    for state, at in {seen.decision.state: seen.at for seen in steps}.items():
        passed = []
        for _ in range(FAIR_EVENTS):
            passed.append(state)
            event = None if state in sound else fair_event(state, policy, at)
            if event is None:
                break
            state, at = step(state, event, policy).state, event.at
        assert state in sound or isinstance(state.phase, Running | Finished | Failed), passed[0]
        sound.update(passed)


@pytest.mark.parametrize("life", LIVES)
def test_no_tick_changes_anything_before_it_is_due(life: str) -> None:
    policy, steps = _steps(life)
    changed = 0
    for state, at in {seen.decision.state: seen.at for seen in steps}.items():
        due = next_due(state, policy)
        for later in (0.0, *(wait - 0.01 for wait in (policy.settle_s, policy.unwind_s, policy.start_s)), 9.0):
            if due is None or at + later < due:
                decision = step(state, Tick(at + later), policy)
                assert decision.state is state, state
                assert not decision.actions
            else:
                changed += step(state, Tick(at + later), policy).state is not state
    assert changed


@pytest.mark.parametrize("life", ["two nodes, running", "three nodes, running"])
def test_what_is_said_about_an_older_attempt_or_somebody_unknown_changes_nothing(life: str) -> None:
    policy, steps = _steps(life)
    for seen in steps:
        state = seen.decision.state
        worker = state.order[0] if state.order else "x/0.1"
        for event in (
            FirstStep(seen.at, -1, 99),
            WorkerRaised(seen.at, worker, -1, "late", False, 99),
            WorkerRaised(seen.at, "nobody/0.1", state.attempt, "unknown", False, 99),
        ):
            decision = step(state, event, policy)
            assert decision.state is state
            assert decision.actions == ()


def test_a_tick_that_changes_nothing_leaves_the_very_same_state() -> None:
    _, steps = _steps("two nodes, running")
    ticks = [seen for seen in steps if isinstance(seen.event, Tick)]
    quiet = [seen for seen in ticks if seen.decision.state == seen.before]
    assert quiet
    assert all(seen.decision.state is seen.before and not seen.decision.actions for seen in quiet)


def test_every_reachable_state_event_and_action_survives_the_codec() -> None:
    policy, (start, at), _ = LIVES["two nodes, running"]
    states, events, actions = set(), set(), set()
    for seen in explore(policy, start, at, 3):
        states.add(seen.decision.state)
        events.add(seen.event)
        actions.update(seen.decision.actions)
    for state in states:
        assert from_json(State, to_json(state)) == state
    for event in events:
        assert from_json(Event, to_json(event, tagged=True)) == event
    for action in actions:
        assert from_json(Action, to_json(action, tagged=True)) == action
