"""Decisions put together, and the words they are explained with."""

from __future__ import annotations

from ray_dr.model.actions import Decision
from ray_dr.model.recovery import FailureKind, Incident, State


def ignored(state: State, why: str) -> Decision:
    """Nothing follows."""
    return Decision(state, (), why)


NOTHING_DUE = "nothing is due"


def also(first: Decision, then: Decision) -> Decision:
    """Two decisions as one: the second was taken on the first's state."""
    reason = then.reason if first.reason == NOTHING_DUE else f"{first.reason}; {then.reason}"
    return Decision(then.state, (*first.actions, *then.actions), reason)


def count(number: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def describe(incident: Incident) -> str:
    """What broke, in words."""
    subject, detail = incident.subject, incident.detail
    match incident.kind:
        case FailureKind.NODE_LOST:
            what = f"node {subject} lost ({detail})"
        case FailureKind.WORKER_LOST:
            what = f"worker {subject} lost ({detail})"
        case FailureKind.GROUP_BROKEN:
            what = f"{subject}: the group broke ({detail})"
        case FailureKind.USER_ERROR:
            what = f"worker {subject} raised {detail}"
        case FailureKind.START_TIMEOUT:
            what = f"{subject}: {detail}"
        case FailureKind.PREEMPTED:
            what = f"node {subject} was taken away, as announced ({detail})"
        case FailureKind.HANG:
            what = f"worker {subject} does not get on ({detail})"
        case FailureKind.DIVERGED:
            what = f"training went wrong: {detail}"
        case FailureKind.CORRUPTION:
            what = f"replicas differ: {detail}"
    return f"{what} at step {incident.step}"
