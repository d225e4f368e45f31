"""How much of the time a save's background work may run, by how much slower training steps are beside it.

A step is compared with those that had no such work beside them. What counts is the average over all steps: beside a save
that comes rarely, steps may be slower than beside one that never ends. Too slow on average: less, by a factor; well
within what is allowed: more, by a step (the rule that lets a sender find a network's capacity, RFC 5681). Never below
FLOOR: a save must end, and the sooner it does, the less is lost with all nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median

FLOOR = 0.25
"""A save takes at most four times as long as it would by itself."""
LESS, MORE = 0.7, 0.1
PLAIN_STEPS, PLAIN_LEAST = 32, 4
JUDGED_STEPS = 16
"""Steps beside a save from one decision to the next."""
MEMORY_STEPS = 256
"""The share of steps that have a save beside them is an average over about so many."""
STALE_STEPS = 512
"""Steps without a save are no measure any more after so many with one."""


@dataclass(frozen=True, slots=True)
class Duty:
    """What is allowed, and what it rests on.

    share    of the time that a thread of the writer may work (FLOOR..1)
    plain    recent durations of steps without a save beside them, seconds; `besides`: how many came since with one
    beside   durations of those with one, since the last decision, seconds
    saving   share of all recent steps that have one
    reason   of the last decision, in words
    """

    share: float = 1.0
    plain: tuple[float, ...] = ()
    beside: tuple[float, ...] = ()
    besides: int = 0
    saving: float = 0.0
    reason: str = "nothing is measured yet"


def observe(duty: Duty, took_s: float, *, beside: bool, overhead: float) -> Duty:
    """What is allowed after one more step of training.

    took_s    how long the step took, seconds
    beside    whether the writer worked meanwhile
    overhead  by which share (0..1) steps may be slower on average
    """
    saving = duty.saving + (float(beside) - duty.saving) / MEMORY_STEPS
    if not beside:
        plain = (*duty.plain, took_s)[-PLAIN_STEPS:]
        return replace(duty, plain=plain, besides=0, saving=saving)
    plain = duty.plain if duty.besides < STALE_STEPS else ()
    duty = replace(duty, plain=plain, beside=(*duty.beside, took_s), besides=duty.besides + 1, saving=saving)
    if len(duty.beside) < JUDGED_STEPS:
        return duty
    return replace(_judge(duty, overhead), beside=())


def _judge(duty: Duty, overhead: float) -> Duty:
    if len(duty.plain) < PLAIN_LEAST:
        return _more(duty, "there are no steps without a save to compare with")
    slower = _slower(duty)
    average = slower * duty.saving
    words = f"steps beside a save are {slower:.1%} slower, {average:.1%} on average, and {overhead:.1%} is allowed"
    if average > overhead:
        return replace(duty, share=max(FLOOR, duty.share * LESS), reason=words)
    return _more(duty, words) if average <= overhead / 2 else replace(duty, reason=words)


def _more(duty: Duty, reason: str) -> Duty:
    return replace(duty, share=min(1.0, duty.share + MORE), reason=reason)


def _slower(duty: Duty) -> float:
    """By which share steps beside a save are slower; 0 when that may be chance: steps differ among themselves.

    Chance is two standard errors of a difference of medians, 1.25 sigma / sqrt(n) each; sigma is 1.48 median deviations.
    """
    middle = median(duty.plain)
    wander_s = median(abs(took_s - middle) for took_s in duty.plain)
    chance_s = 2 * 1.25 * 1.48 * wander_s * math.sqrt(1 / len(duty.plain) + 1 / len(duty.beside))
    excess_s = median(duty.beside) - middle
    return excess_s / middle if middle > 0 and excess_s > chance_s else 0.0
