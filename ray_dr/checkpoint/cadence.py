"""How often to save to a tier: where cost and loss balance, within bounds, and why.

One rank decides and the others follow, at a step boundary; all that is measured is measured by the caller. Between two
saves training loses what a save costs; at a failure that needs the tier it loses what was done since the last save. The
interval that wastes least time over both is wanted; then the bounds move it, the later ones having the last word:

    budget     saving never costs more than this share of the time (and spends part of it in any case, see `Bounds.spent`)
    a factor   of two is the most by which an interval changes at once: what is measured wanders
    objective  interval and write together stay within the recovery point objective
    drain      a save never begins before the one before it is through

The user's word for a tier (`every: 30s`) replaces what is wanted, its budget and the factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_dr.checkpoint.failures import Rate
from ray_dr.model.attempt import Cadence
from ray_dr.model.job import Every
from ray_dr.model.journal import Where

LONGEST_S = 6 * 3600.0
"""No interval is longer: a cost measured wrongly must not switch saving off."""
AUTO = Every()


@dataclass(frozen=True, slots=True)
class Costs:
    """What is measured of one tier, in seconds.

    step_s    duration of a step without a save; more than 0
    cost_s    time by which one save delays training, now or by slower steps later
    write_s   from the step's end until the save is through
    """

    step_s: float
    cost_s: float
    write_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is allowed of one tier.

    every     the user's word
    budget    share of the time (0..1) that saving may cost
    spent     share of the budget (0..1) that is spent in any case, though less would waste least: to do work again is
              waiting for people, and a rate is an estimate
    rpo_s     the most work, in seconds, that may be lost with everything but this tier
    multiple  of so many steps, where the bounds allow: so that the snapshot of the tier below is used
    """

    every: Every = AUTO
    budget: float = 1.0
    spent: float = 0.0
    rpo_s: float = math.inf
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """An interval in steps, and what decided it, in words with the numbers."""

    steps: int
    reason: str


def best_interval(cost_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that waste least time, of saving and of doing work again.

    cost_s   time by which one save delays training, seconds
    mtbf_s   mean time between the failures that the save is for, seconds; inf: there are none
    The exact optimum for failures without memory, M (1 + W0(-exp(-1 - d/M))): the root y = tau/M of y + ln(1 - y) = -d/M,
    by Newton's method from its right, where each step comes closer. At most LONGEST_S.
    Source: J. T. Daly, FGCS 22 (2006), gives it as a series; the first-order form sqrt(2 d M) is Young's (1974).
    """
    if cost_s <= 0:
        return 0.0
    x = cost_s / mtbf_s
    if x < 1e-12:
        return min(LONGEST_S, math.sqrt(2 * cost_s * mtbf_s))
    if x > 30:
        return min(LONGEST_S, mtbf_s)  # 1 - y has no digits left
    y = min(math.sqrt(2 * x), -math.expm1(-1 - x))
    for _ in range(60):
        nearer = y + (y + math.log1p(-y) + x) * (1 - y) / y
        if not 0 < nearer < y:
            break
        y = nearer
    return min(LONGEST_S, y * mtbf_s)


def choose(costs: Costs, rate: Rate, bounds: Bounds, current: int | None = None) -> Choice:
    """The interval of a tier, for losses of `rate` that need it. `current`: the one in force, None for the first choice."""
    steps, words = _said(bounds.every, costs.step_s)
    if not steps:
        steps, words = _worth(costs, rate, bounds)
        damped = _damped(steps, current)
        if damped != steps:
            steps, words = damped, f"{words}; by a factor of two at once: {span(damped * costs.step_s)} for now"
    through = max(1, math.ceil(costs.write_s / costs.step_s))
    allowed = max(1, int((bounds.rpo_s - costs.write_s) / costs.step_s)) if bounds.rpo_s < math.inf else math.inf
    if steps > allowed:
        words += f"; at most {span(bounds.rpo_s)} of work may be lost: {span(allowed * costs.step_s)}"
        steps = int(allowed)
    if steps < through:
        steps, words = through, f"{words}; a write takes {span(costs.write_s)}, and the next begins after it"
    return Choice(_aligned(steps, bounds.multiple, through, allowed), words)


@dataclass(frozen=True, slots=True)
class Rhythm:
    """Which steps are saved, under one cadence after another: every multiple of an interval, so that all ranks agree whatever
    they remember and tiers share their snapshots; and, once after a change, one more where the last multiple of the old
    interval and the first of the new one lie further apart than either of them.

    last    per place the newest step that was due there
    most    per place, how many steps after that one at the latest the next is due; none: it is not in use
    """

    cadence: Cadence
    last: Mapping[Where, int]
    most: Mapping[Where, int]

    @classmethod
    def begin(cls, cadence: Cadence, step: int) -> Rhythm:
        """`step` steps are done when it begins, and every multiple before it is taken to be saved."""
        every = _intervals(cadence)
        return cls(cadence, {where: step - step % (every.get(where, 0) or 1) for where in Where}, every)

    def change(self, cadence: Cadence) -> Rhythm:
        """From the next step on another cadence is in force."""
        before, every = _intervals(self.cadence), _intervals(cadence)
        return Rhythm(cadence, self.last, {where: max(before.get(where, 0), every[where]) for where in every})

    def next(self, step: int) -> tuple[Rhythm, frozenset[Where]]:
        """Where the state after `step` steps, one more than before, is saved to; and the rhythm from then on. Whatever goes to a
        durable place goes to memory first."""
        every = _intervals(self.cadence)
        places = {where for where in every if due(step, every[where]) or step - self.last[where] >= self.most[where]}
        if not places:
            return self, frozenset()
        places.add(Where.MEMORY)
        saved = {where: every[where] for where in places if where in every}
        return replace(self, last={**self.last, **dict.fromkeys(places, step)}, most={**self.most, **saved}), frozenset(places)


def _intervals(cadence: Cadence) -> dict[Where, int]:
    """In steps, of the places that are in use."""
    all_ = {
        Where.MEMORY: cadence.memory_every, Where.DISK: cadence.disk_every,
        Where.STORE: cadence.store_every, Where.SECOND: cadence.second_every,
    }  # fmt: skip
    return {where: every for where, every in all_.items() if every}


def due(step: int, every_steps: int) -> bool:
    """Whether the state after `step` steps (1, 2, ...) is saved; an interval of 0 is never."""
    return step > 0 and every_steps > 0 and step % every_steps == 0


def span(seconds: float) -> str:
    """A duration in words: `340 ms`, `4.1 s`, `14 min`, `31 h`, `11 d`."""
    if not math.isfinite(seconds):
        return "for ever"
    for unit, length in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= (2 * length if length > 1 else 0.9995):
            return f"{seconds / length:.{2 if seconds < 99.5 * length else 3}g} {unit}"
    return f"{seconds * 1000:.3g} ms"


def _said(every: Every, step_s: float) -> tuple[int, str]:
    """The user's interval in steps, at least one, at most that many seconds, and that it is said; 0 for "auto"."""
    if every.steps is not None:
        return max(1, every.steps), f"one each {every.steps} steps is asked for"
    if every.seconds is not None:
        return max(1, int(every.seconds / step_s)), f"one each {span(every.seconds)} is asked for"
    return 0, ""


def _worth(costs: Costs, rate: Rate, bounds: Bounds) -> tuple[int, str]:
    """The interval that wastes least, with the cost of saving between its limits."""
    mtbf_s = 1 / rate.per_s if rate.per_s > 0 else math.inf
    best_s = best_interval(costs.cost_s, mtbf_s)
    words = f"a save costs {span(costs.cost_s)}, {told(rate)}: {span(best_s)} is best"
    least_s = costs.cost_s / bounds.budget if bounds.budget > 0 else LONGEST_S
    most_s = least_s / bounds.spent if bounds.spent > 0 else LONGEST_S
    if best_s < least_s:
        steps = math.ceil(min(least_s, LONGEST_S) / costs.step_s)
        words += f"; at most {100 * bounds.budget:.2g}% of the time may be spent: {span(steps * costs.step_s)}"
    elif best_s > most_s:
        steps = math.ceil(most_s / costs.step_s)
        share = 100 * bounds.budget * bounds.spent
        words += f"; {share:.2g}% of the time is spent in any case: {span(steps * costs.step_s)}"
    else:
        steps = round(best_s / costs.step_s)
    return max(1, steps), words


def told(rate: Rate) -> str:
    """What is expected, and on what grounds: `a loss is expected every 31 h (0 seen in 12 h)`."""
    hours = rate.exposed_s / 3600
    exposed = f"{hours:.{0 if hours > 9.5 else 1}f} node-hours" if rate.per_node else span(rate.exposed_s)
    expected = f"is expected every {span(1 / rate.per_s)}" if rate.per_s > 0 else "is not expected"
    return f"a loss {expected} ({rate.seen} seen in {exposed})"


def _damped(wanted: int, current: int | None) -> int:
    if not current:
        return wanted
    return min(max(wanted, -(-current // 2)), 2 * current)


def _aligned(steps: int, multiple: int, least: int, most: float) -> int:
    """The next multiple at or above `steps`, else the one below, else `steps` itself: what lies within the limits."""
    above = -(-steps // multiple) * multiple
    near = (above, above - multiple)
    return next((each for each in near if max(1, least) <= each <= most), steps)
