"""Which way a broken job takes once its survivors are out of the step and the newest version is found.

The ladder predicts; here the situation is read from the state, and the answer carried out: the next group forms, or it is held
back for workers that are about to be up, until a moment that is set once per incident. After attempts that came to nothing it
is held back too (`budget`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ray_dr.model.actions import Decision, StartWorkers
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.ladder import Plan
from ray_dr.model.recovery import Node, Policy, Recovering, State
from ray_dr.recovery import rescue
from ray_dr.recovery.fleet import find, given_up, leaving, put, ranked, staying
from ray_dr.recovery.groups import form, restore_of
from ray_dr.recovery.ladder import Situation, choose, expected_s, seconds, weighed
from ray_dr.recovery.words import NOTHING_DUE, also, count

PATIENCE, PATIENCE_LEAST_S = 1.5, 1.0
"""Workers are waited for this many times as long as expected, and at least so long; then it goes on without them."""


def asked(decision: Decision, at: float) -> Decision:
    """The decision, with the time noted on every node on which it starts processes."""
    started = {action.node for action in decision.actions if isinstance(action, StartWorkers)}
    if not started:
        return decision
    state = decision.state
    if len(started) == 1:
        node = find(state, next(iter(started)))
        return decision if node is None else replace(decision, state=put(state, replace(node, asked_at=at)))
    nodes = tuple(replace(node, asked_at=at) if node.id in started else node for node in state.nodes)
    return replace(decision, state=replace(state, nodes=nodes))


def go_on(decision: Decision, phase: Recovering, at: float, policy: Policy) -> Decision:
    """The decision, and what follows for a job that could form a group: that it does, or what it waits for."""
    state = decision.state
    assert phase.found is not None, "the inventory is in"
    assert not phase.unwinding, "and everybody is out of the step"
    until = held_until(state, phase)
    if at < until and decision.reason == NOTHING_DUE:
        return decision
    if at < state.not_before:
        return also(decision, Decision(state, (), _backing_off(state, at)))
    held = _plan_of(state, phase)
    now = situation(state, phase, at, policy)
    way, besides = choose(now, policy.measured)
    assert way is not None, "a worker is up"
    if way.wait_s > 0 and (held is None or at < held.hold_until):
        if held is None:
            patience_s = min(policy.start_s, max(PATIENCE * way.wait_s, way.wait_s + PATIENCE_LEAST_S))
            held = Plan(phase.incident.number, at, now.wanted, way, besides, at + patience_s)
        text = f"{weighed(way, besides, now.wanted)}; it waits {seconds(held.hold_until - at)} at most"
        return also(decision, Decision(replace(state, plan=held), (), text))
    late = held is not None and at >= held.hold_until
    if way.wait_s > 0:
        way, besides = choose(replace(now, starting=(), coming=0, spare=0), policy.measured)
        assert way is not None, "a worker is up"
    plan = Plan(phase.incident.number, at, now.wanted, way, besides)
    formed = form(state, restore_of(phase.found), at, policy)
    text = weighed(way, besides, now.wanted)
    if lost := rescue.lost_without(state, phase):
        text = f"{text}; {lost}"
    text = f"who was waited for did not come up in time: {text}" if late else text
    return also(decision, replace(formed, state=replace(formed.state, plan=plan), reason=f"{formed.reason}; {text}"))


def held_until(state: State, phase: Recovering) -> float:
    """UTC seconds before which time itself does not make the next group form."""
    plan = _plan_of(state, phase)
    return max(state.not_before, plan.hold_until if plan is not None else 0.0)


def situation(state: State, phase: Recovering, at: float, policy: Policy) -> Situation:
    """What there is to go on with."""
    up, gone = ranked(state, policy), leaving(state)
    before = frozenset(state.order)
    starting = tuple(left for node in state.nodes if node.id not in gone for left in _left_s(node, at, policy))
    absent = max(0, min(state.requested, policy.nodes_max) - staying(state)) * policy.workers_per_node
    missing = min(absent, max(0, len(before) - len(up) - len(starting)))  # those that never came are not expected now
    most = policy.nodes_max * policy.workers_per_node
    return Situation(
        wanted=min(most, max(len(up), len(state.order), len(up) + len(starting) + missing)),
        up=len(up),
        newcomers=sum(worker not in before for worker in up),
        starting=starting,
        coming=missing,
        asked_s=max(0.0, at - phase.since),
        steps_lost=_steps_lost(state, phase.found),
        distrusted=_is_older(phase),
        older_steps_lost=_steps_lost(state, phase.found),
    )


def _left_s(node: Node, at: float, policy: Policy) -> tuple[float, ...]:
    """Seconds until each of the node's starting processes is expected."""
    if not node.starting or given_up(node, policy):
        return ()
    of_use = min(node.starting, policy.workers_per_node - len(node.ready))  # others would only stand by
    return (expected_s(policy.measured.process_start_s, max(0.0, at - node.asked_at)),) * max(0, of_use)


def _steps_lost(state: State, found: VersionId | Literal["scratch"] | None) -> int:
    restore = restore_of(found)
    return max(0, state.step - (restore.step if restore else 0))


def _is_older(phase: Recovering) -> bool:
    """Whether the version that was found is older than what the broken attempt had begun from, which must be bad then."""
    found = restore_of(phase.found)
    return phase.began is not None and (found is None or found < phase.began)


def _plan_of(state: State, phase: Recovering) -> Plan | None:
    """The plan by which this incident's group is held back."""
    plan = state.plan
    return plan if plan is not None and plan.incident == phase.incident.number and plan.hold_until else None


def _backing_off(state: State, at: float) -> str:
    failed = f"{count(state.ledger.tries, 'failure')} in a row, {state.failures} without a new step"
    return f"{failed}: the next attempt begins in {seconds(state.not_before - at)}"
