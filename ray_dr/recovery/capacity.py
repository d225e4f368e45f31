"""What the coming and going of nodes and workers means to a job."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ray_dr.model.actions import Action, CloseJob, Decision, KillWorker, ReleaseNode
from ray_dr.model.events import ActionFailed, Hung, NodeJoined, NodeLost, WorkerLost, WorkerReady
from ray_dr.model.recovery import (
    Draining,
    Failed,
    FailureKind,
    Finishing,
    Group,
    Incident,
    Node,
    Policy,
    Queued,
    Recovering,
    Resizing,
    Running,
    Starting,
    State,
    Suspended,
)
from ray_dr.recovery import budget, draining, incidents, preemption
from ray_dr.recovery.fleet import (
    add,
    drop,
    end_worker,
    find,
    gained,
    given_up,
    put,
    request_missing,
    start_missing,
    staying,
)
from ray_dr.recovery.groups import answered, group_of
from ray_dr.recovery.words import count, describe, ignored


def node_joined(state: State, event: NodeJoined, policy: Policy) -> Decision:
    """A node is taken in while the job wants more, and given back otherwise."""
    if find(state, event.node) is not None:
        return ignored(state, f"node {event.node} is known")
    if _ending(state):
        return Decision(state, (ReleaseNode(event.node),), f"node {event.node} comes too late: the job is ending")
    if staying(state) >= policy.nodes_wanted:
        reason = f"node {event.node} is not needed: {count(policy.nodes_wanted, 'node')} are all the job may have"
        return Decision(state, (ReleaseNode(event.node),), reason)
    most = policy.workers_per_node + policy.standby_processes
    living, surplus = event.workers[:most], event.workers[most:]
    node = Node(event.node, ready=living, lost=surplus)
    after = replace(add(_new_question(state), node), changed_at=event.at)
    after, _ = request_missing(after, policy) if staying(after) >= policy.nodes_wanted else (after, ())
    after, starts = start_missing(after, policy, node)
    kills = tuple(KillWorker(worker) for worker in surplus)
    return Decision(after, (*kills, *starts), f"node {event.node} joined: {count(len(after.nodes), 'node')} now")


def node_lost(state: State, event: NodeLost, policy: Policy) -> Decision:
    """A node of the job is gone, with its workers and the copies it held."""
    node = find(state, event.node)
    if node is None:
        return ignored(state, f"node {event.node} is not part of the job")
    after = replace(_new_question(drop(state, node.id)), changed_at=event.at)
    kind = preemption.loss_kind(state, node.id)
    loss = incidents.next_incident(after, kind, node.id, event.at, event.step, event.how)
    return _after_loss(after, loss, (*node.ready, *node.lost), policy)


def worker_ready(state: State, event: WorkerReady, policy: Policy) -> Decision:
    """A worker is up. One more than the node should have ends again."""
    node = find(state, event.node)
    if node is None:
        return ignored(state, f"node {event.node} is not part of the job")
    if event.worker in node.ready or event.worker in node.lost:
        return ignored(state, f"worker {event.worker} is known")
    if len(node.ready) >= policy.workers_per_node + policy.standby_processes:
        reason = f"worker {event.worker} is one too many on node {node.id}"
        return Decision(put(state, end_worker(node, event.worker)), (KillWorker(event.worker),), reason)
    gave_up = given_up(node, policy)
    node = replace(node, ready=(*node.ready, event.worker), starting=max(0, node.starting - 1), failed_starts=0)
    after = replace(put(state, node), changed_at=event.at)
    # Where starts were given up, that one has come up is reason enough to try again.
    after, starts = start_missing(after, policy) if gave_up and not _ending(state) else (after, ())
    return Decision(after, starts, f"worker {event.worker} is ready{_and_stands_by(after, policy)}")


def worker_lost(state: State, event: WorkerLost, policy: Policy) -> Decision:
    """A worker's process is gone; on a living node another one is started."""
    node = find(state, event.node)
    if node is None or event.worker in node.lost:
        return ignored(state, f"worker {event.worker} is not part of the job any more")
    if event.worker not in node.ready:
        if not node.starting:
            return ignored(state, f"worker {event.worker} is not known")
        ended = end_worker(replace(node, starting=node.starting - 1), event.worker)
        return _start_ended(state, ended, f"worker {event.worker} ended before it was ready ({event.how})", policy)
    # That one of its workers had come up is reason enough to try again where starts were given up.
    after = put(state, replace(end_worker(node, event.worker), failed_starts=0))
    loss = incidents.next_incident(after, FailureKind.WORKER_LOST, event.worker, event.at, event.step, event.how)
    return _after_loss(after, loss, (event.worker,), policy)


def hung(state: State, event: Hung, policy: Policy) -> Decision:
    """Members that do not get on: their processes end, and others are started in their place."""
    group = group_of(state)
    if not isinstance(state.phase, Starting | Running | Resizing) or group is None or group.attempt != event.attempt:
        return ignored(state, f"attempt {event.attempt} does not run")
    workers = tuple(worker for worker in group.members if worker in event.workers)
    if len(workers) == len(group.members):
        return incidents.group_broken(state, group, event.at, event.how, policy)
    if not workers:
        return ignored(state, f"nobody waits for {', '.join(event.workers)}")
    loss = incidents.next_incident(state, FailureKind.HANG, workers[0], event.at, event.step, event.how)
    decision = incidents.begin(write_off(state, workers), group, loss, policy)
    return replace(decision, actions=(*(KillWorker(worker) for worker in workers), *decision.actions))


def start_failed(state: State, event: ActionFailed, policy: Policy) -> Decision:
    """Workers could not be started on a node (the action's subject)."""
    node = find(state, event.subject)
    if node is None or not node.starting:
        return ignored(state, f"no worker is starting on node {event.subject!r}")
    reason = f"workers cannot be started on node {node.id} ({event.error})"
    return _start_ended(state, replace(node, starting=0), reason, policy)


def refill(state: State, policy: Policy) -> tuple[State, tuple[Action, ...]]:
    """Workers that nodes lack are started."""
    return start_missing(state, policy)


def write_off(state: State, workers: Collection[str]) -> State:
    """These workers count as lost from now on; a later word about their end is no news."""
    doomed = frozenset(workers)
    nodes = list(state.nodes)
    for at, node in enumerate(nodes):
        for worker in node.ready:
            if worker in doomed:
                nodes[at] = replace(end_worker(nodes[at], worker), failed_starts=0)
    return replace(state, nodes=tuple(nodes))


def _after_loss(state: State, loss: Incident, workers: Collection[str], policy: Policy) -> Decision:
    """What a loss means to the phase; `state` is already without the lost."""
    group = group_of(state)
    hit = group is not None and any(worker in group.members for worker in workers)
    match state.phase:
        case Starting(group) | Running(group) | Resizing(group) if hit:
            return incidents.begin(state, group, loss, policy)
        case Draining(group=Group() as group, saving=None, suspends=True) if hit:
            return incidents.begin(state, group, loss, policy)
        case Finishing(group) if not state.nodes:
            return incidents.begin(state, group, loss, policy)
        case Recovering() as phase:
            return incidents.further_loss(state, phase, loss, workers, policy)
        case Draining() as draining_phase:
            return draining.lost(state, draining_phase, loss, hit, policy)
        case Finishing():
            return Decision(state, (), f"{describe(loss)}: the last version is in the agents' memory and being saved")
        case _:
            return _replace_idle(state, loss, policy)


def _and_stands_by(state: State, policy: Policy) -> str:
    """Words for a worker that has just come up, and that the group has no place for."""
    group = group_of(state)
    needed = not policy.has_standbys or group is None or gained(state, group, policy)
    return "" if needed else " and stands by"


def _replace_idle(state: State, loss: Incident, policy: Policy) -> Decision:
    state, requests = request_missing(state, policy)
    state, starts = start_missing(state, policy)
    return Decision(state, (*requests, *starts), f"{describe(loss)}: no running group is touched")


def _new_question(state: State) -> State:
    """Before a first or a next group: what was looked up with other nodes must be looked up again."""
    match state.phase:
        case Queued(asked=True) | Suspended(asked=True) as phase:
            return answered(replace(state, phase=replace(phase, asked=False)))
        case _:
            return state


def _start_ended(state: State, node: Node, reason: str, policy: Policy) -> Decision:
    """Another process is started, unless too many have ended like this: then the node is given back."""
    node = replace(node, failed_starts=node.failed_starts + 1)
    state = put(state, node)
    if _ending(state):
        return Decision(state, (), f"{reason}: the job is ending")
    if not given_up(node, policy):
        state, starts = start_missing(state, policy)
        return Decision(state, starts, f"{reason}: starting another")
    reason = f"{reason}, the last of {count(node.failed_starts, 'attempt')}"
    if node.starting or _in_use(state, node):
        return Decision(state, (), f"{reason}: no more are started there")
    return _give_back(drop(state, node.id), node, reason, policy)


def _ending(state: State) -> bool:
    return isinstance(state.phase, Finishing) or (isinstance(state.phase, Draining) and not state.phase.suspends)


def _in_use(state: State, node: Node) -> bool:
    """Whether a member of the group, live or broken, is on the node."""
    group = group_of(state)
    members = state.phase.unwinding if isinstance(state.phase, Recovering) else group.members if group else ()
    return any(worker in members for worker in node.ready)


def _give_back(state: State, node: Node, reason: str, policy: Policy) -> Decision:
    """A node on which nothing starts is replaced; while a group runs, only when the next loss asks for nodes.

    Each such node counts as a failure without progress, else a program that cannot be imported would use up nodes.
    """
    release: tuple[Action, ...] = (ReleaseNode(node.id),)
    state = _new_question(state)
    if isinstance(state.phase, Running | Starting | Resizing | Draining):
        return Decision(replace(state, requested=policy.nodes_wanted), release, f"{reason}: the node is given back")
    state, over = budget.charge_start(replace(state, requested=0), reason, policy)
    if over is not None:
        return Decision(replace(state, phase=Failed(over.reason, over.resubmit)), (CloseJob("failed"),), over.reason)
    state, requests = request_missing(state, policy)
    return Decision(state, (*release, *requests), f"{reason}: the node is given back, another one asked for")
