"""How often to save: as often as a budget of time allows, never faster than the last save drains.

One rank decides and the others follow, at a step boundary; all times are measured by the caller.
"""

from __future__ import annotations

import math

from ray_dr.model.attempt import Cadence
from ray_dr.model.job import Every
from ray_dr.model.journal import Where

LONGEST_STEPS = 1000
AUTO = Every()


def memory_interval(
    step_s: float, cost_s: float, *, budget: float, current: int | None = None, every: Every = AUTO
) -> int:
    """Steps between memory checkpoints that keep their cost within a share of the step time.

    step_s    duration of a step without a checkpoint, seconds
    cost_s    time by which one checkpoint delays training, seconds
    budget    allowed cost / work (0..1); at or below it every step is saved
    current   the interval in force, which changes by at most a factor of two; None for the first decision
    every     the user's word, which overrides all this
    Source: CheckFreq (Mohan et al., FAST '21), k = ceil(d / (p * t)).
    """
    said = _said(every, step_s)
    if said is not None:
        return said
    return _damped(_affordable(step_s, cost_s, budget), current)


def store_interval(
    step_s: float,
    write_s: float,
    *,
    slowdown: float,
    budget: float,
    memory_steps: int,
    current: int | None = None,
    every: Every = AUTO,
    rpo_s: float = math.inf,
) -> int:
    """Steps between checkpoints in a store: a multiple of `memory_steps`, whose snapshot they reuse.

    write_s   from the snapshot until it is durable, seconds; a new one never starts before
    slowdown  fraction by which steps are slower while the write runs (0..1): `slowdown * write_s` is its cost
    rpo_s     the most work, in seconds, that may be lost with everything but the store: interval and write together
    Source: CheckFreq (FAST '21) and PCcheck (ASPLOS '25), k = max(ceil(w / t), ceil(s * w / (p * t))).
    """
    said = _said(every, step_s)
    wanted = _damped(_affordable(step_s, slowdown * write_s, budget), current) if said is None else said
    drained = math.ceil(write_s / step_s) if step_s > 0 else 1
    if step_s > 0 and rpo_s < math.inf:
        wanted = min(wanted, max(1, int((rpo_s - write_s) / step_s)))
    return -(-max(wanted, drained, 1) // memory_steps) * memory_steps


def places_due(step: int, cadence: Cadence) -> frozenset[Where]:
    """Where the state after `step` steps is saved to. Whatever goes to a durable place goes to memory first."""
    intervals = {
        Where.MEMORY: cadence.memory_every, Where.DISK: cadence.disk_every,
        Where.STORE: cadence.store_every, Where.SECOND: cadence.second_every,
    }  # fmt: skip
    places = {where for where, every in intervals.items() if due(step, every)}
    return frozenset(places | {Where.MEMORY} if places else ())


def due(step: int, every_steps: int) -> bool:
    """Whether the state after `step` steps (1, 2, ...) is saved; an interval of 0 is never."""
    return step > 0 and every_steps > 0 and step % every_steps == 0


def _said(every: Every, step_s: float) -> int | None:
    """The user's interval in steps: at most that many seconds, at least one step. None for "auto"."""
    if every.steps is not None:
        return max(1, every.steps)
    if every.seconds is not None:
        return max(1, int(every.seconds / step_s)) if step_s > 0 else 1
    return None


def _affordable(step_s: float, cost_s: float, budget: float) -> int:
    if cost_s <= budget * step_s:
        return 1
    allowed_s = budget * step_s
    return LONGEST_STEPS if allowed_s * LONGEST_STEPS <= cost_s else math.ceil(cost_s / allowed_s)


def _damped(wanted: int, current: int | None) -> int:
    if current is None:
        return wanted
    return min(max(wanted, -(-current // 2)), 2 * current, LONGEST_STEPS)
