"""Which machines are bad, from what was held against them, and which of them nobody gets for now.

A charge weighs points by its kind and fades by half every HALF_LIFE_S. Points alone would condemn everybody after a bad
week of the whole fleet, and a machine of whose kind little is known after one misfortune. So the rate of a machine is
estimated with the others as prior (Gamma-Poisson): with the fading, each machine has been watched for WATCHED days, so

    fleet = (BEFORE_POINTS + points of the others) / (BEFORE_DAYS + WATCHED * others)          points per day
    rate  = (PRIOR_DAYS * fleet + its points) / (PRIOR_DAYS + WATCHED)                         points per day
    excess = rate / fleet

A machine is *condemned* while one of its charges, together with the points left of those before it, came to
QUARANTINE_POINTS, is not older than the cool-off (the longer the more points there were), and its excess is EXCESS or more.
Each further charge can only make that longer. After the cool-off it is on probation: the points are still there, and the
next charge condemns it for longer.

Sources: weights, half-life and thresholds are algorithms 13 of the design, the estimate its detection (f); the rate before
anything is known is that of large public fleets, some 7 lost nodes per 1000 node-days.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray_dr.detection.taxonomy import FAULTS, Budget
from ray_dr.model.nodes import Charge, Entry, Pardon
from ray_dr.model.recovery import FailureKind
from ray_dr.model.signal import FaultKind

DAY_S = 86400.0
HALF_LIFE_S = 7 * DAY_S
WATCHED = HALF_LIFE_S / DAY_S / math.log(2)
"""Days that count of an endless watch, when older ones fade."""
BEFORE_POINTS, BEFORE_DAYS = 1.0, 70.0
PRIOR_DAYS = WATCHED
SUSPECT_POINTS, QUARANTINE_POINTS = 2.0, 5.0
EXCESS = 3.0
COOL_OFF_S, COOL_OFF_MOST_S = DAY_S, 7 * DAY_S
"""At QUARANTINE_POINTS, growing with the points; and at most."""
SHARE_MOST = 0.1
"""Of the machines at hand; one may always be left out, if enough are left to run."""

WEIGHTS: Mapping[FaultKind, float] = {
    FaultKind.GPU_FAULT: 5.0,
    FaultKind.CORRUPTION: 5.0,
    FaultKind.PREFLIGHT: 3.0,
    FaultKind.NODE_GONE: 2.0,
    FaultKind.NODE_FROZEN: 2.0,
    FaultKind.NETWORK_CUT: 2.0,
    FaultKind.PROCESS_GONE: 1.0,
    FaultKind.STRAGGLER: 1.0,
    FaultKind.HANG: 0.5,
    FaultKind.EXCEPTION: 0.2,
}
"""Points; what is not here says nothing about a machine."""

_KINDS: Mapping[FailureKind, FaultKind] = {
    FailureKind.NODE_LOST: FaultKind.NODE_GONE,
    FailureKind.WORKER_LOST: FaultKind.PROCESS_GONE,
    FailureKind.HANG: FaultKind.HANG,
}


def fault_of(kind: FailureKind) -> FaultKind | None:
    """What an incident of this kind says of the machine it began with; None: nothing."""
    return _KINDS.get(kind)


def weight(kind: FaultKind) -> float:
    """Points of one charge. The program's own faults weigh nothing, nor does being taken away."""
    return 0.0 if FAULTS[kind].budget is Budget.PROGRAM else WEIGHTS.get(kind, 0.0)


@dataclass(frozen=True, slots=True)
class Score:
    """How a machine stands at one moment.

    points   what is left of its charges; rate: expected points per day; excess: rate over the fleet's
    charges  how many count; newest: UTC seconds of the newest of them, 0 without any
    until    UTC seconds until which it is condemned; 0: it is not
    reason   in words
    """

    machine: str
    points: float
    rate: float
    excess: float
    charges: int
    newest: float
    until: float
    reason: str

    @property
    def standing(self) -> str:
        """condemned, suspect or well."""
        return "condemned" if self.until else "suspect" if self.points >= SUSPECT_POINTS else "well"


@dataclass(frozen=True, slots=True)
class Quarantine:
    """`out` nobody gets; `spared` are condemned too, and used all the same, as there would be too few left."""

    out: tuple[Score, ...] = ()
    spared: tuple[Score, ...] = ()


def score(entries: Iterable[Entry], fleet: Collection[str], now: float) -> tuple[Score, ...]:
    """Every machine of the fleet and every one that something is held against, the worst first.

    fleet   names of machines at hand, also of those that never failed: they say what is usual
    now     UTC seconds
    """
    counting = _counting(entries)
    names = sorted({*fleet, *counting})
    points = {name: sum(_faded(charge, now) for charge in counting.get(name, ())) for name in names}
    total = sum(points.values())
    found = []
    for name in names:
        usual = (BEFORE_POINTS + total - points[name]) / (BEFORE_DAYS + WATCHED * (len(names) - 1))
        rate = (PRIOR_DAYS * usual + points[name]) / (PRIOR_DAYS + WATCHED)
        found.append(_judge(name, counting.get(name, ()), points[name], rate, rate / usual, now))
    return tuple(sorted(found, key=lambda one: (-one.points, one.machine)))


def quarantine(scores: Sequence[Score], present: Collection[str], need: int) -> Quarantine:
    """Who is left out of those present, the worst first: at most SHARE_MOST of them or one, and `need` stay in any case."""
    here = set(present)
    condemned = [one for one in scores if one.until and one.machine in here]
    condemned.sort(key=lambda one: (-one.points, one.machine))
    most = max(0, min(max(1, int(SHARE_MOST * len(here))), len(here) - need))
    return Quarantine(tuple(condemned[:most]), tuple(condemned[most:]))


def _counting(entries: Iterable[Entry]) -> dict[str, tuple[Charge, ...]]:
    """Charges that weigh something and are not pardoned, by machine, oldest first; each incident once."""
    kept: dict[tuple[str, str, str], Charge] = {}
    pardons: dict[str, float] = {}
    for entry in entries:
        if isinstance(entry, Pardon):
            pardons[entry.machine] = max(entry.at, pardons.get(entry.machine, entry.at))
        elif weight(entry.kind) > 0 and entry.share > 0:
            kept[entry.machine, entry.job, entry.incident] = entry
    out: dict[str, tuple[Charge, ...]] = {}
    for charge in sorted(kept.values(), key=lambda one: (one.at, one.job, one.incident)):
        if charge.at > pardons.get(charge.machine, -math.inf):
            out[charge.machine] = (*out.get(charge.machine, ()), charge)
    return out


def _faded(charge: Charge, at: float) -> float:
    """Points of a charge at a time; a charge of a clock that is ahead counts in full."""
    return float(weight(charge.kind) * charge.share * 0.5 ** (max(0.0, at - charge.at) / HALF_LIFE_S))


def _judge(name: str, charges: Sequence[Charge], points: float, rate: float, excess: float, now: float) -> Score:
    if not charges:
        return Score(name, 0.0, rate, excess, 0, 0.0, 0.0, "nothing is held against it")
    newest = charges[-1]
    until = _condemned_until(charges)
    stands = until if now < until and excess >= EXCESS else 0.0
    last = f"the last {newest.kind} in job {newest.job}" + (f" ({newest.detail})" if newest.detail else "")
    held = f"{points:.1f} points from {len(charges)} incident{'s' * (len(charges) > 1)}"
    reason = f"{held}, {excess:.0f} times the fleet's rate; {last}"
    return Score(name, points, rate, excess, len(charges), newest.at, stands, reason)


def _condemned_until(charges: Sequence[Charge]) -> float:
    """The latest end of a cool-off that any of the charges began; 0 when none did."""
    until = 0.0
    for number, charge in enumerate(charges, 1):
        then = sum(_faded(earlier, charge.at) for earlier in charges[:number])
        if then >= QUARANTINE_POINTS:
            until = max(until, charge.at + min(COOL_OFF_MOST_S, COOL_OFF_S * then / QUARANTINE_POINTS))
    return until
