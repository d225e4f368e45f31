"""What is held against a machine, as values. All jobs of a store share it.

A *machine* is what outlives Ray: `name` is made of its host name and, where a node label has one, the cloud's instance id.
`at` is UTC seconds of the supervisor that wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_dr.model.signal import FaultKind


@dataclass(frozen=True, slots=True)
class Charge:
    """An incident that began with this machine: the root cause, never an echo.

    incident   the job's own name for it, `<term>.<number>`: the same incident told twice is one charge
    share      of the blame: 0.5 each where two are suspected alike
    """

    machine: str
    kind: FaultKind
    at: float
    job: str
    incident: str
    detail: str = ""
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Pardon:
    """Somebody says that the machine is well again: no charge up to here counts any more."""

    machine: str
    at: float


Entry = Charge | Pardon
