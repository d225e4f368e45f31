"""The nodes and workers of a job, as values: who is there, who is ready, who is missing.

Nodes stand in the order they joined. Every function takes a state and gives a state; none decides what phase follows.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from ray_dr.model.actions import Action, RequestNodes, StartWorkers
from ray_dr.model.recovery import Group, Node, Policy, State
from ray_dr.model.signal import node_of

LOST_KEPT = 16
"""Ended workers remembered per node; more than can be on their way to the supervisor at any time."""

_guesses: dict[str, int] = {}
"""Where in the row a node was when it was last looked for: believed only where it stands there still. A job of 16 384 nodes
would else spend its time walking along the row."""
GUESSES_MAX = 200_000


def find(state: State, node: str) -> Node | None:
    """The node of that id, if it is part of the job."""
    at = _place(state.nodes, node)
    return None if at is None else state.nodes[at]


def put(state: State, node: Node) -> State:
    """The state with this node in place of the one of the same id, or as the last to join."""
    at = _place(state.nodes, node.id)
    return add(state, node) if at is None else replace(state, nodes=(*state.nodes[:at], node, *state.nodes[at + 1 :]))


def add(state: State, node: Node) -> State:
    """The state with a node that it did not have, as the last to join."""
    _guess(node.id, len(state.nodes))
    return replace(state, nodes=(*state.nodes, node))


def drop(state: State, node: str) -> State:
    """The state without that node and its workers."""
    at = _place(state.nodes, node)
    state = replace(state, departures=tuple(d for d in state.departures if d.node != node)) if state.departures else state
    return state if at is None else replace(state, nodes=state.nodes[:at] + state.nodes[at + 1 :])


def _place(nodes: tuple[Node, ...], node: str) -> int | None:
    guess = _guesses.get(node, 0)
    if guess < len(nodes) and nodes[guess].id == node:
        return guess
    for at, known in enumerate(nodes):
        if known.id == node:
            _guess(node, at)
            return at
    return None


def _guess(node: str, at: int) -> None:
    if len(_guesses) >= GUESSES_MAX:
        _guesses.clear()
    _guesses[node] = at


def end_worker(node: Node, worker: str) -> Node:
    """The node after one of its workers has ended (or was told to)."""
    ready = tuple(other for other in node.ready if other != worker)
    return replace(node, ready=ready, lost=(*node.lost, worker)[-LOST_KEPT:])


def leaving(state: State) -> frozenset[str]:
    """Nodes of the job that will be taken away."""
    return frozenset([departure.node for departure in state.departures])


def staying(state: State) -> int:
    """Nodes of the job that nobody will take away: those that count as what the job has."""
    return len(state.nodes) - len(state.departures)


def ready_workers(state: State) -> tuple[str, ...]:
    """All workers that are up, in the order their nodes joined."""
    return tuple(itertools.chain.from_iterable([node.ready for node in state.nodes]))


def staying_workers(state: State) -> tuple[str, ...]:
    """Those of them that a next group is formed of."""
    gone = leaving(state)
    return tuple(itertools.chain.from_iterable([node.ready for node in state.nodes if node.id not in gone]))


def ranked(state: State) -> tuple[str, ...]:
    """All workers that are up and stay, in the rank order of a next group that is as large as the last one, or larger:
    survivors keep their ranks, so that each finds in its own memory what it staged there; newcomers take the places of the
    dead, on their own node first, and further ranks at the end. A smaller group holds other shards anyway: survivors as they
    stood, then newcomers. A node's ranks need not be neighbours."""
    ready, before = dict.fromkeys(staying_workers(state)), dict.fromkeys(state.order)
    new = dict.fromkeys(worker for worker in ready if worker not in before)
    if len(ready) < len(before):
        return (*(worker for worker in before if worker in ready), *new)
    at_home: dict[str, deque[str]] = {}
    for worker in new:
        at_home.setdefault(node_of(worker), deque()).append(worker)
    places = [worker if worker in ready else "" for worker in before]
    for place, worker in enumerate(before):
        if not places[place] and (fitting := at_home.get(node_of(worker))):
            places[place] = fitting.popleft()
            del new[places[place]]
    left = iter(new)
    return (*(worker or next(left) for worker in places), *left)


def usable_nodes(state: State) -> int:
    """Nodes that stay, with at least one worker up."""
    gone = leaving(state)
    return len([node for node in state.nodes if node.ready and node.id not in gone])


def are_full(state: State, count: int, policy: Policy) -> bool:
    """Whether at least so many nodes that stay have all their workers up."""
    spare, gone = staying(state) - count, leaving(state)
    if spare < 0:
        return False
    for node in state.nodes:
        if len(node.ready) < policy.workers_per_node and node.id not in gone:
            spare -= 1
            if spare < 0:
                return False
    return True


def given_up(node: Node, policy: Policy) -> bool:
    """Whether so many of the node's processes ended at start that no more are started there."""
    return node.failed_starts >= max(1, policy.attempts_without_progress)


def start_missing(state: State, policy: Policy, only: Node | None = None) -> tuple[State, tuple[Action, ...]]:
    """Workers that every node that stays lacks are started; those of `only` one, where no other can lack any."""
    wanted, gone = policy.workers_per_node, leaving(state)
    lacking = [node for node in (state.nodes if only is None else (only,))
               if len(node.ready) + node.starting < wanted and node.id not in gone]  # fmt: skip
    changed = {
        node.id: replace(node, starting=wanted - len(node.ready)) for node in lacking if not given_up(node, policy)
    }
    actions = tuple(StartWorkers(node.id, node.starting - lacked.starting)
                    for lacked in lacking if (node := changed.get(lacked.id)) is not None)  # fmt: skip
    if len(changed) == 1:
        return put(state, next(iter(changed.values()))), actions
    return (replace(state, nodes=tuple(changed.get(node.id, node) for node in state.nodes)), actions) if actions else (state, ())


def request_missing(state: State, policy: Policy) -> tuple[State, tuple[Action, ...]]:
    """Nodes up to `nodes_max` are asked for, once until they are all here."""
    if staying(state) >= policy.nodes_max:
        return replace(state, requested=0), ()
    if state.requested == policy.nodes_max:
        return state, ()
    return replace(state, requested=policy.nodes_max), (RequestNodes(policy.nodes_max),)


def idle_workers(state: State, group: Group) -> tuple[str, ...]:
    """Workers that are up, on nodes that stay, and not in the group."""
    members = frozenset(group.members)
    return tuple(worker for worker in staying_workers(state) if worker not in members)


def still_starting(nodes: Iterable[Node]) -> bool:
    """Whether any of these nodes still has a worker coming up."""
    return any(node.starting > 0 for node in nodes)
