"""Whether a node that has come is fit: from its figures and those of the others.

Nobody knows what is normal on this kind of machine but the other nodes, so a figure is bad only beside theirs: a slow
but uniform cluster is fit. The doubts of a short examination are no verdict: a longer one has to come to the same.

False alarms: a node's best of several tries would have to be FACTORS times as slow as its peers' middle, six of their own
sigmas off and half as slow again as any, twice, in the same figure. What a busy machine distorts most (disk, store,
network: elapsed time) has the widest factors; compute and memory are timed by the processor's own time, which others' work
hardly changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ray_dr.detection.robust import scale
from ray_dr.model.preflight import Figures, GpuState

FACTORS: Mapping[str, float] = {"compute": 2.5, "memory": 4.0, "disk": 12.0, "store": 12.0, "peer": 12.0}
NAMES: Mapping[str, str] = {
    "compute": "its processor", "memory": "its memory", "disk": "its disk", "store": "the store from there",
    "peer": "its network",
}  # fmt: skip
LEAST_S: Mapping[str, float] = {"disk": 0.5, "store": 2.0, "peer": 2.0}
"""Below that nobody minds, whatever the others need."""
SIGMAS, SIGMA_LEAST = 6.0, 0.1
ALONE = 1.5
"""So much slower than any other: several that are slow alike are another kind of machine."""
OTHERS_LEAST = 2
"""Fewer others say nothing about what is usual."""
OFFSET_MOST_S = 60.0
"""Signed requests and leases live with that; a clock that is further off is wrong."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something of a node that is not as it should be. `sure`: no second look is needed."""

    what: str
    evidence: str
    sure: bool = False


def doubts(mine: Figures, others: Collection[Figures]) -> tuple[Doubt, ...]:
    """What speaks against a node, beside others that have been examined (those of `mine.node` don't count)."""
    others = [other for other in others if other.node != mine.node]
    return (*_gpus(mine.gpus), *_troubles(mine, others), *_slow(mine, others), *_clock(mine))


def verdict(first: Sequence[Doubt], second: Sequence[Doubt]) -> str:
    """Why a node is not fit, from the doubts of two examinations (the second may be empty); empty: it is fit."""
    again = {doubt.what for doubt in second}
    before = {doubt.what for doubt in first}
    bad = [doubt for doubt in second if doubt.sure or doubt.what in before]
    bad += [doubt for doubt in first if doubt.sure and doubt.what not in again]
    return "; ".join(doubt.evidence for doubt in bad)


def _slow(mine: Figures, others: Sequence[Figures]) -> list[Doubt]:
    found = []
    for what, factor in FACTORS.items():
        costs = [math.log(other.costs[what]) for other in others if other.costs.get(what, 0.0) > 0]
        own_s = mine.costs.get(what, 0.0)
        if len(costs) < OTHERS_LEAST or own_s <= LEAST_S.get(what, 0.0):
            continue
        usual = median(costs)
        off = math.log(own_s) - usual
        alone = math.log(own_s) > max(costs) + math.log(ALONE)
        if alone and off > max(math.log(factor), SIGMAS * max(SIGMA_LEAST, scale(costs, usual))):
            evidence = f"{NAMES[what]} takes {math.exp(off):.1f} times as long as that of {len(costs)} other nodes"
            found.append(Doubt(what, evidence))
    return found


def _troubles(mine: Figures, others: Sequence[Figures]) -> list[Doubt]:
    """What can't be done there, and can elsewhere."""
    return [
        Doubt(f"no {what}", f"{NAMES.get(what, what)} can't be used: {why}")
        for what, why in mine.troubles.items()
        if others and not any(what in other.troubles for other in others)
    ]


def _clock(mine: Figures) -> list[Doubt]:
    if mine.offset_s is None or abs(mine.offset_s) - mine.offset_error_s <= OFFSET_MOST_S:
        return []
    side = "ahead of" if mine.offset_s > 0 else "behind"
    return [Doubt("clock", f"its clock is {abs(mine.offset_s):.0f} s {side} the supervisor's")]


def _gpus(gpus: Sequence[GpuState]) -> list[Doubt]:
    """What a driver says needs nobody to compare with."""
    found = []
    for gpu in gpus:
        which = f"GPU {gpu.index}" + (f" ({gpu.name})" if gpu.name else "")
        if gpu.error:
            found.append(Doubt(f"gpu {gpu.index} away", f"{which} does not answer its driver: {gpu.error}"))
        if gpu.failed:
            found.append(Doubt(f"gpu {gpu.index} memory", f"{which} has broken memory that could not be replaced", sure=True))
        if gpu.uncorrected:
            many = f"{gpu.uncorrected} memory error{'s' * (gpu.uncorrected > 1)}"
            found.append(Doubt(f"gpu {gpu.index} errors", f"{which} had {many} that nothing corrected", sure=True))
        if gpu.pending:
            found.append(Doubt(f"gpu {gpu.index} pending", f"{which} is to be reset: memory waits to be replaced", sure=True))
        if gpu.slowed:
            found.append(Doubt(f"gpu {gpu.index} slowed", f"{which} holds its clocks down: heat or power"))
    return found
