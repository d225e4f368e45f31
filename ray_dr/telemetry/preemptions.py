"""The nodes that were announced to be taken away, and what became of each: a fold over a job's journal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ray_dr.model.actions import ReleaseNode
from ray_dr.model.events import NodeLeaving, NodeLost
from ray_dr.model.journal import Decided, Record

WORD = "preemption: "
"""What a decision's reason says after this is what was chosen."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """One notice, times in UTC seconds.

    at        when the job's machine heard of it; `deadline`: when the node was to go (None: nobody said); `how`: who said so
    decided   what was chosen, with expectation and reason; empty: it had no part in what ran then
    gone_at   when it was given back, or lost (`lost`); None: it is there still
    """

    at: float
    node: str
    deadline: float | None
    how: str
    decided: str
    gone_at: float | None = None
    lost: bool = False


def preemptions(records: Iterable[Record]) -> tuple[Preemption, ...]:
    """Every notice, in order; a further one for the same node takes the place of the one before."""
    found: list[Preemption] = []
    open_: dict[str, int] = {}
    for record in records:
        if not isinstance(record, Decided):
            continue
        event = record.event
        if isinstance(event, NodeLeaving) and _is_news(event, record):
            place = open_.setdefault(event.node, len(found))
            found[place : place + 1] = [_heard(event, record.reason)]
        if isinstance(event, NodeLost) and event.node in open_:
            _ends(found, open_, event.node, event.at, lost=True)
        for action in record.actions:
            if isinstance(action, ReleaseNode) and action.node in open_:
                _ends(found, open_, action.node, record.at, lost=False)
    return tuple(found)


def still_there(records: Iterable[Record]) -> tuple[Preemption, ...]:
    """Those of nodes that the job has, and that are to leave."""
    return tuple(each for each in preemptions(records) if each.gone_at is None)


def _is_news(event: NodeLeaving, record: Decided) -> bool:
    """Whether it was about a node of the job; one that nobody needed goes at once."""
    noted = any(departure.node == event.node and departure.deadline == event.deadline for departure in record.state.departures)
    return noted or ReleaseNode(event.node) in record.actions


def _heard(event: NodeLeaving, reason: str) -> Preemption:
    deadline = event.deadline if event.deadline < math.inf else None
    return Preemption(event.at, event.node, deadline, event.how, reason.partition(WORD)[2])


def _ends(found: list[Preemption], open_: dict[str, int], node: str, at: float, *, lost: bool) -> None:
    place = open_.pop(node)
    found[place] = replace(found[place], gone_at=at, lost=lost)


def in_words(one: Preemption) -> str:
    """`in 30.0 s (ray drain): attempt 1 stops at ...; given back 1.2 s later`."""
    when = "at a time nobody told" if one.deadline is None else f"in {max(0.0, one.deadline - one.at):.1f} s"
    what = f": {one.decided}" if one.decided else ": nothing ran there"
    if one.gone_at is None:
        end = "it is there still"
    else:
        end = f"{'lost' if one.lost else 'given back'} {max(0.0, one.gone_at - one.at):.1f} s after the notice"
    return f"to be taken away {when} ({one.how}){what}; {end}"
