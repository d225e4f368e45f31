"""What must hold after every decision, checked from the outside: for tests, the simulator and drills alike.

The numbers are those of the architecture's list of invariants.
"""

from __future__ import annotations

from ray_dr.model.actions import AbortGroup, CloseJob, Decision, FormGroup, StopGroup
from ray_dr.model.events import Event
from ray_dr.model.recovery import Failed, Finished, Policy, Recovering, Resizing, Starting, State
from ray_dr.recovery.fleet import ready_workers


def check(before: State, event: Event, decision: Decision, policy: Policy, *, walk: bool = True) -> None:
    """Raises AssertionError, naming the invariant, where a decision breaks one.

    walk   also what is only known after walking over all workers; where there are very many, at some events is enough
    """
    after = decision.state
    assert decision.reason, "every decision has a reason"
    assert after.attempt >= before.attempt, "I8: attempts only grow"
    assert after.incidents >= before.incidents, "incidents are numbered upwards"
    assert len(after.nodes) <= policy.nodes_max, "I13: never more nodes than allowed"
    if walk and after.nodes is not before.nodes:
        ready = ready_workers(after)
        assert len(set(ready)) == len(ready), "a worker is on one node"
    assert after.failures <= policy.attempts_without_progress or isinstance(after.phase, Failed), "I12: bounded"
    held = after.plan is not None and after.plan.hold_until > after.plan.at + policy.start_s
    assert not held, "I9: nobody is waited for without end"
    _check_quiet(before, decision, walk=walk)
    _check_groups(before, decision, policy, event.at)
    _check_end(before, decision)


def _check_quiet(before: State, decision: Decision, *, walk: bool) -> None:
    if isinstance(before.phase, Finished | Failed):
        assert decision.state is before, "the end is the end"
        assert not decision.actions, "the end is the end"
    phase = decision.state.phase
    if walk and isinstance(phase, Recovering):
        known = before.phase.unwinding if isinstance(before.phase, Recovering) else None
        if decision.state.nodes is not before.nodes or known is None:
            assert set(phase.unwinding) <= set(ready_workers(decision.state)), "who unwinds is alive"
        elif phase.unwinding is not known:  # nobody came or went: it is enough that nobody was added
            assert set(phase.unwinding) <= set(known), "who unwinds is alive"


def _check_groups(before: State, decision: Decision, policy: Policy, at: float) -> None:
    formed = [action.group for action in decision.actions if isinstance(action, FormGroup)]
    assert len(formed) <= 1, "one group at a time"
    assert not formed or at >= decision.state.not_before, "I12: attempts that came to nothing are followed by a pause"
    for group in formed:
        past = max(before.attempt, group.restore.attempt if group.restore else 0)
        assert group.attempt == past + 1, "I8: the next attempt"
        assert isinstance(decision.state.phase, Starting), "who forms a group waits for its first step"
        assert decision.state.phase.group == group, "the state names the group"
        assert set(group.members) <= set(ready_workers(decision.state)), "I8: members are up"
        assert len(set(group.members)) == len(group.members), "I8: each once"
        members = frozenset(group.members)
        nodes = [node for node in decision.state.nodes if not members.isdisjoint(node.ready)]
        assert policy.min_nodes_to_run <= len(nodes) <= policy.nodes_max, "I13: between the limits"
        for place, worker in enumerate(before.order):
            moved = len(group.members) < len(before.order) or worker not in group.members
            assert moved or group.members[place] == worker, "a survivor keeps its rank while there are ranks enough"
        assert not _still_inside(before) - _left(decision, before), "I8: nobody is in two groups"
    for action in decision.actions:
        if isinstance(action, AbortGroup | StopGroup):
            assert action.attempt <= before.attempt or action.attempt == decision.state.attempt, "a group that exists"


def _still_inside(state: State) -> set[str]:
    match state.phase:
        case Recovering() as phase:
            return set(phase.unwinding)
        case Resizing() as resizing:
            return set(resizing.group.members) - set(resizing.stopped) - set(state.done)
        case _:
            return set()


def _left(decision: Decision, before: State) -> set[str]:
    """At most one member leaves by one event, or several by being killed or lost with their node."""
    remaining = set(ready_workers(decision.state))
    inside = _still_inside(before)
    return {worker for worker in inside if worker not in remaining} | (inside if len(inside) == 1 else set())


def _check_end(before: State, decision: Decision) -> None:
    over = isinstance(decision.state.phase, Finished | Failed) and decision.state is not before
    closes = [action for action in decision.actions if isinstance(action, CloseJob)]
    assert len(closes) == int(over), "a job is closed once, when it is over"
