"""The job's machine over all short lives: invariants after every step, a way back to Running from every state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_dr.model.actions import Action
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.events import (
    Corrupted,
    Diverged,
    Event,
    FirstStep,
    NodeJoined,
    NodeLeaving,
    NodeLost,
    Tick,
    WorkerLost,
    WorkerRaised,
    WorkerReady,
)
from ray_dr.model.ladder import Measured
from ray_dr.model.recovery import Policy, Running, State
from ray_dr.recovery.diagram import until_running
from ray_dr.recovery.explore import (
    DIAGNOSED,
    LEAVING,
    RESCUED,
    SPECIAL,
    SPOILT,
    alphabet,
    explore,
    fair_event,
    opened,
)
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


def after(kind: type[Event], policy: Policy, begun: tuple[State, float], which: int = 0) -> tuple[State, float]:
    """A job to which this has happened; `which` of those of its kind that can."""
    state, at = begun
    event = [event for event in alphabet(state, policy, at) if type(event) is kind][which]
    decision = step(state, event, policy)
    assert decision.state is not state
    return decision.state, at


SOON, IN_TIME, STANDS = 0, 1, 2
"""Which NodeLeaving, and the WorkerRaised of one that still has its state."""
NONE: frozenset[type[Event]] = frozenset()
ONE_RUNS, TWO_RUN, FIXED_RUN = until_running(ONE), until_running(TWO), until_running(FIXED)
NODE_RUNS, PROCESS_RUNS, BOTH_RUN = with_standbys(STANDBY_NODE), with_standbys(STANDBY_PROCESS), with_standbys(STANDBY_BOTH)
LIVES = {
    "one node, queued": (ONE, opened(ONE), 6, SPECIAL),
    "one node, running": (ONE, ONE_RUNS, 4, NONE),
    "one node, anything happens": (ONE, ONE_RUNS, 3, SPECIAL),
    "one of two nodes, running": (TWO, ONE_RUNS, 4, NONE),
    "two nodes, queued": (TWO, opened(TWO), 7, NONE),
    "two nodes, running": (TWO, TWO_RUN, 4, NONE),
    "two nodes, anything happens": (TWO, TWO_RUN, 3, SPECIAL),
    "two nodes, one leaves soon": (TWO, after(NodeLeaving, TWO, TWO_RUN, SOON), 3, LEAVING),
    "two nodes, one leaves in time": (TWO, after(NodeLeaving, TWO, TWO_RUN, IN_TIME), 3, LEAVING),
    "two nodes, training diverged": (TWO, after(Diverged, TWO, TWO_RUN), 4, SPOILT),
    "two nodes, replicas differ": (TWO, after(Corrupted, TWO, TWO_RUN), 4, SPOILT),
    "two nodes, state is rescued": (TWO, after(WorkerRaised, TWO, TWO_RUN, STANDS), 4, RESCUED),
    "two nodes, root causes are found": (TWO, after(WorkerLost, TWO, TWO_RUN), 3, DIAGNOSED),
    "two nodes and no fewer, running": (FIXED, FIXED_RUN, 3, LEAVING),
    "two nodes and no fewer, one is lost": (FIXED, after(NodeLost, FIXED, FIXED_RUN), 4, NONE),
    "three nodes, running": (THREE, until_running(THREE), 3, LEAVING),
    "two workers on each of two nodes, running": (PAIRS, until_running(PAIRS), 3, RESCUED),
    "two workers on each of two nodes, soon up again, one lost": (QUICK, after(WorkerLost, QUICK, until_running(QUICK)), 3, NONE),
    "two nodes and one that stands by, queued": (STANDBY_NODE, opened(STANDBY_NODE), 7, NONE),
    "two nodes and one that stands by, running": (STANDBY_NODE, NODE_RUNS, 3, LEAVING),
    "two nodes and one that stands by, one worker lost": (STANDBY_NODE, after(WorkerLost, STANDBY_NODE, NODE_RUNS), 3, SPOILT),
    "two nodes and a process that stands by on each, running": (STANDBY_PROCESS, PROCESS_RUNS, 3, RESCUED),
    "two nodes and a process that stands by on each, one lost":
        (STANDBY_PROCESS, after(WorkerLost, STANDBY_PROCESS, PROCESS_RUNS), 4, NONE),
    "standby nodes and processes, running": (STANDBY_BOTH, BOTH_RUN, 3, NONE),
}  # fmt: skip
"""Policy, state and time to begin with, how many events, and which of the special ones are among them."""
FAIR_EVENTS, LATER_S = 40, 9.0


@pytest.mark.parametrize("life", LIVES)
def test_every_short_life_keeps_the_invariants_and_comes_to_run_or_end_once_nothing_fails_any_more(life: str) -> None:
    policy, (start, at), depth, special = LIVES[life]
    sound: set[State] = set()
    steps = changed = 0
    for seen in explore(policy, start, at, depth, special):
        steps += 1
        check(seen.before, seen.event, seen.decision, policy)
        if seen.new:
            comes_to_run_or_end(seen.decision.state, policy, seen.at, sound)
            changed += ticks_change_nothing_before_they_are_due(seen.decision.state, policy, seen.at)
    assert steps > 1000
    assert changed


def comes_to_run_or_end(state: State, policy: Policy, at: float, sound: set[State]) -> None:
    passed: list[State] = []
    while state not in sound and (event := fair_event(state, policy, at)) is not None:
        passed.append(state)
        assert len(passed) < FAIR_EVENTS, passed[0]
        state, at = step(state, event, policy).state, event.at
    sound.update(passed)


def ticks_change_nothing_before_they_are_due(state: State, policy: Policy, at: float) -> bool:
    """Tries one at once, one right before it is due, and tells whether one that is due changed something."""
    due = next_due(state, policy)
    for tick in (at, at + LATER_S if due is None else due - 0.01):
        if tick >= at and (due is None or tick < due):
            decision = step(state, Tick(tick), policy)
            assert decision.state is state, state
            assert not decision.actions
    return due is not None and step(state, Tick(max(at, due)), policy).state is not state


@pytest.mark.parametrize("life", ["two nodes, running", "three nodes, running"])
def test_what_is_said_about_an_older_attempt_or_somebody_unknown_changes_nothing(life: str) -> None:
    policy, (start, at), _, _ = LIVES[life]
    for seen in explore(policy, start, at, 3, RESCUED):
        if not seen.new:
            continue
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
    policy, (start, at), _, _ = LIVES["two nodes, running"]
    ticks = [seen for seen in explore(policy, start, at, 3) if isinstance(seen.event, Tick)]
    quiet = [seen for seen in ticks if seen.decision.state == seen.before]
    assert quiet
    assert all(seen.decision.state is seen.before and not seen.decision.actions for seen in quiet)


def test_every_reachable_state_event_and_action_survives_the_codec() -> None:
    policy, (start, at), _, _ = LIVES["two nodes, running"]
    states, events, actions = set(), set(), set()
    for seen in explore(policy, start, at, 3):
        if seen.new:
            states.add(seen.decision.state)
        events.add(seen.event)
        actions.update(seen.decision.actions)
    for state in states:
        assert from_json(State, to_json(state)) == state
    for event in events:
        assert from_json(Event, to_json(event, tagged=True)) == event
    for action in actions:
        assert from_json(Action, to_json(action, tagged=True)) == action
