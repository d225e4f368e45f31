"""The nodes and workers of a job, as values: who is there, who is ready, who is missing.

Nodes stand in the order they joined. Every function takes a state and gives a state; none decides what phase follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from ray_dr.model.actions import Action, RequestNodes, StartWorkers
from ray_dr.model.recovery import Group, Node, Policy, State
from ray_dr.model.signal import node_of
from ray_dr.recovery.row import row_of
from ray_dr.recovery.standbys import chosen, wanted_on

LOST_KEPT = 16
"""Ended workers remembered per node; more than can be on their way to the supervisor at any time."""


def find(state: State, node: str) -> Node | None:
    """The node of that id, if it is part of the job."""
    at = row_of(state.nodes).places.get(node)
    return None if at is None else state.nodes[at]


def put(state: State, node: Node) -> State:
    """The state with this node in place of the one of the same id, or as the last to join."""
    row = row_of(state.nodes)
    at = row.places.get(node.id)
    if at is None:
        return add(state, node)
    nodes = (*state.nodes[:at], node, *state.nodes[at + 1 :])
    row.put(nodes, state.nodes[at], node, at)
    return replace(state, nodes=nodes)


def add(state: State, node: Node) -> State:
    """The state with a node that it did not have, as the last to join."""
    row, nodes = row_of(state.nodes), (*state.nodes, node)
    row.put(nodes, None, node, len(state.nodes))
    return replace(state, nodes=nodes)


def drop(state: State, node: str) -> State:
    """The state without that node and its workers."""
    state = replace(state, departures=tuple(d for d in state.departures if d.node != node)) if state.departures else state
    at = row_of(state.nodes).places.get(node)
    return state if at is None else replace(state, nodes=state.nodes[:at] + state.nodes[at + 1 :])


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
    return row_of(state.nodes).workers


def ranked(state: State, policy: Policy) -> tuple[str, ...]:
    """All workers that are up and stay, but for those that stand by, in the rank order of a next group that is as large as the
    last one, or larger: survivors keep their ranks, so that each finds in its own memory what it staged there; newcomers take
    the places of the dead, on their own node first, and further ranks at the end. A smaller group holds other shards anyway:
    survivors as they stood, then newcomers. A node's ranks need not be neighbours."""
    ready, before = dict.fromkeys(chosen(state, policy)), dict.fromkeys(state.order)
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
    going = sum(bool(node.ready) for node in state.nodes if node.id in gone) if gone else 0
    return len(state.nodes) - row_of(state.nodes).ready[0] - going


def are_full(state: State, count: int, policy: Policy) -> bool:
    """Whether at least so many nodes that stay have all their workers up."""
    gone = leaving(state)
    going = sum(len(node.ready) >= policy.workers_per_node for node in state.nodes if node.id in gone) if gone else 0
    return len(state.nodes) - row_of(state.nodes).lacking(policy.workers_per_node) - going >= count


def given_up(node: Node, policy: Policy) -> bool:
    """Whether so many of the node's processes ended at start that no more are started there."""
    return node.failed_starts >= max(1, policy.attempts_without_progress)


def start_missing(state: State, policy: Policy, only: Node | None = None) -> tuple[State, tuple[Action, ...]]:
    """Workers that every node that stays lacks are started; those of `only` one, where no other can lack any."""
    members, gone = frozenset(state.order) if policy.standby_processes else frozenset(), leaving(state)
    among = [node for node in (state.nodes if only is None else (only,)) if node.id not in gone]
    wanted = [(node, wanted_on(node, state, policy, members)) for node in among]
    lacks = {node.id: wants - len(node.ready) for node, wants in wanted if len(node.ready) + node.starting < wants}
    lacking = [node for node, _ in wanted if node.id in lacks]
    changed = {node.id: replace(node, starting=lacks[node.id]) for node in lacking if not given_up(node, policy)}
    actions = tuple(StartWorkers(node.id, node.starting - lacked.starting)
                    for lacked in lacking if (node := changed.get(lacked.id)) is not None)  # fmt: skip
    if len(changed) == 1:
        return put(state, next(iter(changed.values()))), actions
    return (replace(state, nodes=tuple(changed.get(node.id, node) for node in state.nodes)), actions) if actions else (state, ())


def request_missing(state: State, policy: Policy) -> tuple[State, tuple[Action, ...]]:
    """Nodes up to `nodes_max`, and those that stand by, are asked for, once until they are all here."""
    if staying(state) >= policy.nodes_wanted:
        return replace(state, requested=0), ()
    if state.requested == policy.nodes_wanted:
        return state, ()
    return replace(state, requested=policy.nodes_wanted), (RequestNodes(policy.nodes_wanted),)


def gained(state: State, group: Group, policy: Policy) -> tuple[str, ...]:
    """Workers that would take part in a larger group; none where the next one would be no larger: then it would be the same."""
    members = frozenset(group.members)
    if len(members) >= policy.nodes_max * policy.workers_per_node and not state.departures:
        return ()
    fit = chosen(state, policy)
    if sum(worker in members for worker in fit) >= policy.nodes_max * policy.workers_per_node:
        return ()
    return tuple(worker for worker in fit if worker not in members)


def idle_workers(state: State, group: Group) -> tuple[str, ...]:
    """Workers that are up, on nodes that stay, and not in the group."""
    members = frozenset(group.members)
    return tuple(worker for worker in ready_workers(state) if worker not in members)


def still_starting(nodes: Iterable[Node]) -> bool:
    """Whether any of these nodes still has a worker coming up."""
    return any(node.starting > 0 for node in nodes)
