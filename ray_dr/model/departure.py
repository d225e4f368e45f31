"""A node that is to be taken away: when, who says so, and how fast its job is at what can be done until then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """How long the parts of a move take, in seconds: p95 of the job's own past where there is one, else these defaults, which
    are meant to be too long rather than too short.

    step_s       one step
    staged_s     from a step's end until every part of a version lies sealed in its node's memory
    copied_s     from a step's end until its copies on other nodes are there, too; `copies`: whether any are made
    delta_s      from a step's end until it is committed to the store, where an older version is there to build on
    full_s       the same, where nothing is
    resume_s     from the forming of a group until its first step
    committed    whether the store has a version
    """

    step_s: float = 1.0
    staged_s: float = 2.0
    copied_s: float = 5.0
    delta_s: float = 30.0
    full_s: float = 60.0
    resume_s: float = 20.0
    copies: bool = True
    committed: bool = False


@dataclass(frozen=True, slots=True)
class Departure:
    """`deadline` is UTC seconds (inf: nobody said when), `how` says who says so."""

    node: str
    deadline: float
    how: str
    rates: Rates = Rates()
