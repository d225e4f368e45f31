"""Who gets which nodes: `allocate(jobs, machines, rules, now) -> Round`.

Theory of operation. Each round gives out all machines anew, in two passes, and what a job has already it gets first.

1. Minima, whole or not at all (no half gangs): by priority; among equals who runs, then who came first. A job whose minimum
   does not fit waits, and a smaller one behind it may go first, until the one in front has waited `starve_s`: then nobody
   of its priority starts before it. A job of higher priority takes what it needs from lower ones, which shrink, and at
   last are suspended.
2. More, priority by priority: node by node (or group by group) to the job to which it is worth most: the time that each of
   its steps would take less, in parts of what it takes on the job's minimum, times the job's weight. So first nodes go
   before second ones and to those that scale (the power mean of speed-ups with p = -1 of Qiao et al., Pollux, OSDI 2021).
   A job of which it is known that it is soon through is preferred, by the root of how soon: that is less than for the
   mean time to completion alone would be best (Berg et al., heSRPT, 2020), and nobody stands still for it. A node that a
   job has already is worth `stay` times as much to it, and one that pays too little to interrupt the job is left free.

The same input gives the same output; nothing here looks at a clock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from ray_dr.model.scheduling import Allocation, Machine, Round, Rules, Wanting
from ray_dr.scheduling.goodput import speed
from ray_dr.scheduling.stock import Stock


@dataclass(slots=True)
class _Share:
    """What a job has got so far in this round."""

    job: Wanting
    kind: str
    nodes: list[str] = field(default_factory=list)
    urge: float = 1.0
    """What its being soon through adds to what nodes are worth to it."""

    @property
    def least_s(self) -> float:
        """A step on the job's minimum."""
        return self.job.time_on(self.kind).on(self.job.nodes_min)


def allocate(jobs: Sequence[Wanting], machines: Iterable[Machine], rules: Rules, now: float) -> Round:
    """Every job's machines from now on, and how many are missing. Machines that are not usable go to nobody."""
    stock = Stock.of(machines, {machine for job in jobs for machine in job.held})
    used: dict[str, int] = {}
    asked: dict[str, int] = {}
    shares: dict[str, _Share] = {}
    why: dict[str, str] = {}
    overdue: dict[int, str] = {}
    for job in sorted(jobs, key=_turn):
        blocker = "" if job.held else overdue.get(job.priority, "")
        share, reason = (None, f"waits behind {blocker}, which has waited for too long") if blocker else _begin(
            job, stock, asked, used, rules)  # fmt: skip
        why[job.name] = reason
        if share is not None:
            shares[job.name] = share
            asked[share.kind] = asked.get(share.kind, 0) + job.nodes_max
        elif not blocker and not _over_quota(job, job.nodes_min, used, rules) and now - job.submitted_at >= rules.starve_s:
            overdue.setdefault(job.priority, job.name)
    for priority in sorted({share.job.priority for share in shares.values()}, reverse=True):
        _grow(_urged([each for each in shares.values() if each.job.priority == priority]), stock, used, rules, now)
    allocations = tuple(_told(job, shares.get(job.name), why[job.name]) for job in jobs)
    return Round(allocations, _missing(jobs, shares, used, rules))


def largest(job: Wanting, most: Mapping[str, int]) -> int:
    """The most nodes the job could ever have where there can be `most` of each kind: 0 when its minimum never fits."""
    can = max((count for kind, count in most.items() if not job.kinds or kind in job.kinds), default=0)
    fitting = min(can, job.nodes_max)
    fitting -= (fitting - job.nodes_min) % job.multiple if fitting >= job.nodes_min else 0
    return fitting if fitting >= job.nodes_min else 0


def _turn(job: Wanting) -> tuple[int, bool, float, float, str]:
    return -job.priority, not job.held, job.deadline_at, job.submitted_at, job.name


def _over_quota(job: Wanting, more: int, used: Mapping[str, int], rules: Rules) -> bool:
    return used.get(job.user, 0) + more > rules.quotas.get(job.user, math.inf)


def _begin(job: Wanting, stock: Stock, asked: Mapping[str, int], used: dict[str, int],
           rules: Rules) -> tuple[_Share | None, str]:  # fmt: skip
    """Its minimum, or the reason why it can't have it. `asked`: nodes of each kind that jobs before it would like to have."""
    if _over_quota(job, job.nodes_min, used, rules):
        return None, f"waits: {job.user} has {used.get(job.user, 0)} of {rules.quotas[job.user]} nodes, it needs {job.nodes_min}"
    best = 0
    for kind in _kinds(job, stock, asked):
        share = _Share(job, kind)
        while len(share.nodes) < job.nodes_min and (machine := _next(share, stock)) is not None:
            share.nodes.append(machine)
            stock.take(job, machine)
        if len(share.nodes) == job.nodes_min:
            used[job.user] = used.get(job.user, 0) + job.nodes_min
            return share, ""
        best = max(best, len(share.nodes))
        for machine in share.nodes:
            stock.give_back(job, machine)
    return None, f"waits: it needs {job.nodes_min} nodes at once, and {best} can be had"


def _kinds(job: Wanting, stock: Stock, asked: Mapping[str, int]) -> list[str]:
    """Kinds of node to try, the fastest for this job first, if all that asked for one share it as they asked; where it runs
    already, there before all others."""
    allowed = [kind for kind in stock.kinds() if not job.kinds or kind in job.kinds]
    has = {stock.machines[machine].kind for machine in job.held if machine in stock.machines}
    share = {
        kind: min(1.0, stock.count(kind) / (asked.get(kind, 0) + job.nodes_max)) * job.nodes_max if stock.room(job, kind) else 1.0
        for kind in allowed
    }
    return sorted(allowed, key=lambda kind: (kind not in has, -speed(job.time_on(kind), max(1.0, share[kind])), kind))


def _next(share: _Share, stock: Stock) -> str | None:
    """The machine the job should have next: one it has now, if that is possible."""
    job, has = share.job, share.nodes
    spot = sum(stock.machines[machine].spot for machine in has)
    on_demand = len(has) - spot < job.on_demand_min
    for machine in job.held:
        here = stock.machines.get(machine)
        if here and machine not in has and here.kind == share.kind and not (on_demand and here.spot) and stock.fits(job, machine):
            return machine
    return stock.pick(job, share.kind, has, on_demand=on_demand)


def _grow(shares: Sequence[_Share], stock: Stock, used: dict[str, int], rules: Rules, now: float) -> None:
    heap = [(-worth, share.job.name) for share in shares if (worth := _worth(share, rules, now)) > 0]
    by_name = {share.job.name: share for share in shares}
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        share = by_name[name]
        job, got = share.job, list[str]()
        if _over_quota(job, job.multiple, used, rules):
            continue
        while len(got) < job.multiple and (machine := _next(share, stock)) is not None:
            got.append(machine)
            share.nodes.append(machine)
            stock.take(job, machine)
        if len(got) < job.multiple:
            for machine in got:
                share.nodes.remove(machine)
                stock.give_back(job, machine)
            continue
        used[job.user] = used.get(job.user, 0) + job.multiple
        if (worth := _worth(share, rules, now)) > 0:
            heapq.heappush(heap, (-worth, name))


def _worth(share: _Share, rules: Rules, now: float) -> float:
    """What one more step up is worth, per node: 0 when the job may have no more, or it would not pay."""
    job, have = share.job, len(share.nodes)
    more = have + job.multiple
    if more > job.nodes_max:
        return 0.0
    time, keeps = job.time_on(share.kind), more <= len(job.held)
    if not keeps and not _pays(job, time.on(have), time.on(more), more / have, rules, now):
        return 0.0
    saved = (time.on(have) - time.on(more)) / share.least_s / job.multiple
    return max(0.0, job.weight * share.urge * (rules.stay if keeps else 1.0) * saved)


def _pays(job: Wanting, now_s: float, then_s: float, ratio: float, rules: Rules, now: float) -> bool:
    """Whether growing is worth interrupting the job for; one that waits or is being started has nothing to interrupt."""
    gain = 1 - then_s / now_s
    if gain < rules.gain_least * math.log2(ratio):
        return False
    if not job.held:
        return True
    left_s = min(rules.horizon_s, job.steps_left * now_s)
    return now - job.changed_at >= rules.settle_s and gain * left_s > job.resize_s


def _urged(shares: list[_Share]) -> list[_Share]:
    """With how much sooner each is through than the median of those of which that is known."""
    known = [each for each in shares if math.isfinite(each.job.steps_left)]
    left_s = {each.job.name: max(1.0, each.job.steps_left * each.least_s) for each in known}
    if left_s:
        usual_s = median(left_s.values())
        for each in shares:
            each.urge = math.sqrt(usual_s / left_s.get(each.job.name, usual_s))
    return shares


def _told(job: Wanting, share: _Share | None, reason: str) -> Allocation:
    before = len(job.held)
    if share is None:
        return Allocation(job.name, (), reason if not before else f"suspended, others go first: {reason}")
    nodes = tuple(sorted(share.nodes, key=lambda each: (each not in job.held, job.held.index(each) if each in job.held else 0)))
    after = len(nodes)
    if not before:
        return Allocation(job.name, nodes, f"starts on {after} of {job.nodes_min}..{job.nodes_max} nodes")
    if set(nodes) == set(job.held):
        return Allocation(job.name, job.held, f"keeps its {after} nodes")
    verb = "grows" if after > before else "shrinks" if after < before else "moves"
    left = [machine for machine in job.held if machine not in nodes]
    detail = f", without {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}" if left else ""
    return Allocation(job.name, nodes, f"{verb} from {before} to {after} nodes{detail}")


def _missing(jobs: Sequence[Wanting], shares: Mapping[str, _Share], used: Mapping[str, int], rules: Rules) -> dict[str, int]:
    """Nodes that would be used if they were there: waiting minima, and what running jobs would grow by with profit."""
    missing: dict[str, int] = {}
    for job in jobs:
        share = shares.get(job.name)
        room = rules.quotas.get(job.user, math.inf) - used.get(job.user, 0)
        if share is None:
            kind, more = (job.kinds[0] if len(job.kinds) == 1 else ""), job.nodes_min
        else:
            kind, more = share.kind, _useful(share, rules)
        if 0 < more <= room:
            missing[kind] = missing.get(kind, 0) + more
    return missing


def _useful(share: _Share, rules: Rules) -> int:
    """Nodes by which the job could still grow with profit."""
    job, have = share.job, len(share.nodes)
    time, most = job.time_on(share.kind), have
    while most + job.multiple <= job.nodes_max:
        more = most + job.multiple
        if 1 - time.on(more) / time.on(most) < rules.gain_least * math.log2(more / most):
            break
        most = more
    return most - have
