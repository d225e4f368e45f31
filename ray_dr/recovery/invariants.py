"""What must hold after every decision, checked from the outside: for tests, the simulator and drills alike.

The numbers are those of the architecture's list of invariants.
"""

from __future__ import annotations

from ray_dr.model.actions import AbortGroup, CloseJob, Decision, FormGroup, Rescue, StopGroup
from ray_dr.model.events import Event, Opened
from ray_dr.model.recovery import Failed, Finished, Policy, Recovering, Resizing, Running, Starting, State
from ray_dr.recovery.fleet import leaving, ranked, ready_workers, staying
from ray_dr.recovery.quarantine import usable


def check(before: State, event: Event, decision: Decision, policy: Policy, *, walk: bool = True) -> None:
    """Raises AssertionError, naming the invariant, where a decision breaks one.

    walk   also what is only known after walking over all workers; where there are very many, at some events is enough
    """
    after = decision.state
    assert decision.reason, "every decision has a reason"
    assert after.attempt >= before.attempt, "I8: attempts only grow"
    assert after.incidents >= before.incidents, "incidents are numbered upwards"
    assert staying(after) <= policy.nodes_wanted, "I13: never more nodes than allowed"
    if after.departures is not before.departures:
        assert leaving(after) <= {node.id for node in after.nodes}, "who leaves is a node of the job"
    if walk and after.nodes is not before.nodes:
        ready = ready_workers(after)
        assert len(set(ready)) == len(ready), "a worker is on one node"
        most = policy.workers_per_node + policy.standby_processes
        assert all(len(node.ready) <= most for node in after.nodes), "no more processes on a node than wanted"
    assert after.failures <= policy.attempts_without_progress or isinstance(after.phase, Failed), "I12: bounded"
    assert len(after.rollbacks) >= len(before.rollbacks), "what went wrong is never forgotten"
    again = sum(back.diverged for back in after.rollbacks)
    assert again <= max(policy.rollbacks, sum(back.diverged for back in before.rollbacks)) or isinstance(event, Opened), "bounded"
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
        assert leaving(decision.state).isdisjoint([node.id for node in nodes]), "no group with a node that will be taken away"
        assert policy.min_nodes_to_run <= len(nodes) <= policy.nodes_max, "I13: between the limits"
        crowd = [node for node in nodes if len(members.intersection(node.ready)) > policy.workers_per_node]
        assert not crowd, "I13: no more members on a node than workers"
        for place, worker in enumerate(before.order):
            moved = len(group.members) < len(before.order) or worker not in group.members
            assert moved or group.members[place] == worker, "a survivor keeps its rank while there are ranks enough"
        assert not _still_inside(before) - _left(decision, before), "I8: nobody is in two groups"
        fit = group.restore is None or usable(group.restore, decision.state.rollbacks)
        assert fit, "nothing goes on from what was saved after training went wrong"
        assert all(back.base is not None for back in decision.state.rollbacks), "what is left out is known"
    if isinstance(before.phase, Running) and isinstance(decision.state.phase, Resizing) and not decision.state.phase.stopped:
        inside, gone = decision.state.phase.group.members, leaving(decision.state)
        larger = len(ranked(decision.state, policy)) > len(inside)
        left = any(node.id in gone and not set(inside).isdisjoint(node.ready) for node in decision.state.nodes)
        assert larger or left, "a group stops only for a larger one, or for who leaves, not for who stands by"
    for action in decision.actions:
        if isinstance(action, AbortGroup | StopGroup):
            assert action.attempt <= before.attempt or action.attempt == decision.state.attempt, "a group that exists"
        if isinstance(action, Rescue):
            phase = decision.state.phase
            assert isinstance(phase, Recovering), "only of a broken group"
            assert (phase.attempt, phase.unwinding) == (action.attempt, ()), "I8: everybody has left it"
            assert set(action.writers) <= set(ready_workers(decision.state)), "who writes is up"
            assert len(action.writers) == len(decision.state.order), "one writer for each part"


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
