"""When time itself is news to a job's machine: a host need not tick before."""

from __future__ import annotations

from ray_dr.model.recovery import (
    Draining,
    Failed,
    Finished,
    Finishing,
    Policy,
    Queued,
    Recovering,
    Resizing,
    Running,
    Starting,
    State,
    Suspended,
)
from ray_dr.recovery.course import held_until
from ray_dr.recovery.fleet import gained, staying, still_starting, usable_nodes
from ray_dr.recovery.groups import begins_at


def next_due(state: State, policy: Policy) -> float | None:
    """UTC seconds before which a Tick changes nothing, as long as no other event comes; None: no Tick ever does.

    It may be too early where it is not worth the search, never too late.
    """
    if isinstance(state.phase, Finished | Failed):
        return None
    return min((at for at in (_asked(state, policy), _deadline(state, policy), _settled(state, policy)) if at is not None),
               default=None)  # fmt: skip


def _asked(state: State, policy: Policy) -> float | None:
    """When a question is overdue, or nodes that nobody was asked for are."""
    if state.retry_at is not None:
        return state.retry_at
    opened, ending = state.changed_at > 0, isinstance(state.phase, Draining | Finishing)
    return state.changed_at if opened and not ending and not state.requested and staying(state) < policy.nodes_wanted else None


def _deadline(state: State, policy: Policy) -> float | None:
    match state.phase:
        case Starting(since=since) | Resizing(since=since):
            return since + policy.start_s
        case Recovering(since=since) as phase if phase.unwinding:
            return since + policy.unwind_s
        case Recovering(rescue_until=until) if until:
            return until
        case Recovering() as phase if phase.found is not None:
            return held_until(state, phase)
        case Suspended(asked=False) if usable_nodes(state) >= policy.min_nodes_to_run:
            return state.not_before
        case Draining(deadline=deadline):
            return deadline
        case _:
            return None


def _settled(state: State, policy: Policy) -> float | None:
    """When it may be worth beginning, or growing, with the nodes there are."""
    match state.phase:
        case Queued(asked=False):
            return begins_at(state, policy)
        case Running() as phase if not state.done and (idle := gained(state, phase.group, policy)):
            whole = staying(state) >= policy.nodes_wanted and not still_starting(state.nodes)
            beside = [node for node in state.nodes if any(worker in idle for worker in node.ready)]
            soon = whole or not still_starting(beside)
            return state.changed_at + (min(policy.settle_s, policy.start_s) if soon else policy.start_s)
        case _:
            return None
