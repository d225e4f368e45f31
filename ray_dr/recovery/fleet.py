"""The nodes and workers of a job, as values: who is there, who is ready, who is missing.

Nodes stand in the order they joined. Every function takes a state and gives a state; none decides what phase follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ray_dr.model.recovery import Action, Group, Node, Policy, RequestNodes, StartWorkers, State

LOST_KEPT = 16
"""Ended workers remembered per node; more than can be on their way to the supervisor at any time."""


def find(state: State, node: str) -> Node | None:
    """The node of that id, if it is part of the job."""
    return next((known for known in state.nodes if known.id == node), None)


def put(state: State, node: Node) -> State:
    """The state with this node in place of the one of the same id, or as the last to join."""
    if find(state, node.id) is None:
        return replace(state, nodes=(*state.nodes, node))
    return replace(state, nodes=tuple(node if known.id == node.id else known for known in state.nodes))


def drop(state: State, node: str) -> State:
    """The state without that node and its workers."""
    return replace(state, nodes=tuple(known for known in state.nodes if known.id != node))


def end_worker(node: Node, worker: str) -> Node:
    """The node after one of its workers has ended (or was told to)."""
    ready = tuple(other for other in node.ready if other != worker)
    return replace(node, ready=ready, lost=(*node.lost, worker)[-LOST_KEPT:])


def ready_workers(state: State) -> tuple[str, ...]:
    """All workers that are up, in the order their nodes joined."""
    return tuple(worker for node in state.nodes for worker in node.ready)


def ranked(state: State) -> tuple[str, ...]:
    """All workers that are up, in the rank order of a next group: survivors of the last one first, as they stood."""
    ready = ready_workers(state)
    survivors = [worker for worker in state.order if worker in ready]
    return (*survivors, *(worker for worker in ready if worker not in survivors))


def usable_nodes(state: State) -> int:
    """Nodes with at least one worker up."""
    return sum(bool(node.ready) for node in state.nodes)


def full_nodes(state: State, policy: Policy) -> int:
    """Nodes with all their workers up."""
    return sum(len(node.ready) >= policy.workers_per_node for node in state.nodes)


def given_up(node: Node, policy: Policy) -> bool:
    """Whether so many of the node's processes ended at start that no more are started there."""
    return node.failed_starts >= max(1, policy.attempts_without_progress)


def start_missing(state: State, policy: Policy) -> tuple[State, tuple[Action, ...]]:
    """Workers that every node lacks are started."""
    actions: list[Action] = []
    for node in state.nodes:
        count = policy.workers_per_node - len(node.ready) - node.starting
        if count > 0 and not given_up(node, policy):
            actions.append(StartWorkers(node.id, count))
            state = put(state, replace(node, starting=node.starting + count))
    return state, tuple(actions)


def request_missing(state: State, policy: Policy) -> tuple[State, tuple[Action, ...]]:
    """Nodes up to `nodes_max` are asked for, once until they are all here."""
    if len(state.nodes) >= policy.nodes_max:
        return replace(state, requested=0), ()
    if state.requested == policy.nodes_max:
        return state, ()
    return replace(state, requested=policy.nodes_max), (RequestNodes(policy.nodes_max),)


def idle_workers(state: State, group: Group) -> tuple[str, ...]:
    """Workers that are up and not in the group."""
    return tuple(worker for worker in ready_workers(state) if worker not in group.members)


def still_starting(nodes: Iterable[Node]) -> bool:
    """Whether any of these nodes still has a worker coming up."""
    return any(node.starting > 0 for node in nodes)
