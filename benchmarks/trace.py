"""Simulated weeks of a cluster that many jobs share: the trace, the clock, and the policies that `scheduler` compares.

The trace. Jobs arrive as a Poisson process whose rate swings by half around its mean over a day. A job's work is
lognormal (median 20 minutes on its smallest size, 90th percentile 4 hours); it can run on `nodes_min` (1, 2 or 4) to
`nodes_max` (4 to 16 times as many) nodes; its step takes `divided_s / n + fixed_s + per_node_s * (n - 1)` with a fixed
part of 2 to 10 % of the divided one and a growing part that outweighs what a further node saves from 16 to 128 nodes on.
As a rigid job it asks for a size between its smallest and the one beyond which a doubling is worth less than a third.
Nodes fail one by one and come back after half an hour.

Every policy gets the same trace, knows the same about the jobs, decides at the same moments (every `ROUND_S`) and pays the
same for a resize.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ray_dr.model.scheduling import Machine, Rules, StepTime, Wanting
from ray_dr.scheduling.allocate import allocate

DAY_S, ROUND_S = 86_400.0, 60.0
RESIZE_S = 10.0
REPAIR_S = 1800.0
Sizes = dict[str, int]
Policy = Callable[[Sequence[Wanting], int, float], Sizes]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job of the trace: what it wants, its steps, and the size it would ask for if it could not change it."""

    wanting: Wanting
    steps: float
    rigid: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs in the order they come, and (when, nodes gone or back) of `nodes` in all."""

    nodes: int
    arrivals: tuple[Arrival, ...]
    changes: tuple[tuple[float, int], ...]


def make_trace(seed: int, *, jobs: int, nodes: int, load: float, node_mtbf_s: float = 5 * DAY_S) -> Trace:
    """`load`: work that arrives, at each job's smallest size, over what the nodes can do."""
    chance = random.Random(seed)
    drawn = [_draw(chance, f"job-{number}") for number in range(jobs)]
    node_s = sum(each.steps * each.wanting.times[""].on(each.wanting.nodes_min) * each.wanting.nodes_min for each in drawn)
    rate = jobs / (node_s / (load * nodes))
    at, arrivals = 0.0, []
    for each in drawn:
        at += chance.expovariate(rate * (1 + 0.5 * math.sin(2 * math.pi * at / DAY_S)))
        arrivals.append(replace(each, wanting=replace(each.wanting, submitted_at=at)))
    changes, when = [], 0.0
    while when < 3 * at:
        when += chance.expovariate(nodes / node_mtbf_s)
        changes += [(when, -1), (when + REPAIR_S, 1)]
    return Trace(nodes, tuple(arrivals), tuple(sorted(changes)))


def _draw(chance: random.Random, name: str) -> Arrival:
    smallest = chance.choice((1, 1, 1, 2, 4))
    largest = smallest * chance.choice((4, 8, 16))
    divided_s = chance.uniform(1.0, 20.0) * smallest
    time = StepTime(divided_s, divided_s * chance.uniform(0.02, 0.1) / smallest, divided_s / chance.uniform(16, 128) ** 2)
    seconds = 1200 * math.exp(chance.gauss(0, math.log(12) / 1.2816))
    useful = smallest
    while useful * 2 <= largest and time.on(useful) / time.on(useful * 2) > 4 / 3:
        useful *= 2
    sizes = [size for size in (smallest * 2**power for power in range(8)) if size <= useful]
    wanting = Wanting(name, f"user-{chance.randrange(8)}", 0.0, smallest, largest, multiple=smallest, times={"": time},
                      resize_s=RESIZE_S)  # fmt: skip
    return Arrival(wanting, max(1.0, seconds / time.on(smallest)), chance.choice(sizes))


@dataclass(slots=True)
class Outcome:
    """Seconds from a job's arrival to its end; resizes; node-seconds of computation that all jobs together needed at least,
    over node-seconds that were given out."""

    completion_s: list[float] = field(default_factory=list)
    resizes: int = 0
    useful: float = 0.0
    given: float = 0.0


@dataclass(slots=True)
class _Live:
    arrival: Arrival
    left: float
    size: int = 0
    pause_s: float = 0.0
    changed_at: float = 0.0
    ran_s: float = 0.0


def play(trace: Trace, policy: Policy, *, known: bool) -> Outcome:
    """Run the trace to its end under a policy. `known`: whether policies are told how many steps a job has left."""
    outcome, live, now = Outcome(), dict[str, _Live](), 0.0
    arrivals, changes, nodes = list(trace.arrivals), list(trace.changes), trace.nodes
    while arrivals or live:
        while arrivals and arrivals[0].wanting.submitted_at <= now:
            each = arrivals.pop(0)
            live[each.wanting.name] = _Live(each, each.steps)
        while changes and changes[0][0] <= now:
            nodes += changes.pop(0)[1]
        sizes = policy([_view(job, known) for job in live.values()], nodes, now)
        assert sum(sizes.values()) <= nodes, "no policy gives out more than there is"
        for name, job in live.items():
            size = sizes.get(name, 0)
            if size != job.size:
                outcome.resizes += bool(job.size and size)
                job.pause_s = RESIZE_S if job.ran_s else 0.0
                job.size, job.changed_at = size, now
        for name in [name for name, job in live.items() if _advance(job, now, outcome)]:
            del live[name]
        now += ROUND_S
    return outcome


def _advance(job: _Live, now: float, outcome: Outcome) -> bool:
    """One round of a job; whether it is through."""
    if not job.size:
        return False
    time, run_s = job.arrival.wanting.times[""], max(0.0, ROUND_S - job.pause_s)
    need_s = job.left * time.on(job.size)
    begin, job.pause_s = min(job.pause_s, ROUND_S), max(0.0, job.pause_s - ROUND_S)
    done = need_s <= run_s
    worked_s = need_s if done else run_s
    outcome.given += job.size * (begin + worked_s)
    outcome.useful += worked_s / time.on(job.size) * time.on(1)
    job.left -= worked_s / time.on(job.size)
    job.ran_s += begin + worked_s
    if done:
        outcome.completion_s.append(now + begin + worked_s - job.arrival.wanting.submitted_at)
    return done


def _view(job: _Live, known: bool) -> Wanting:
    held = tuple(f"{job.arrival.wanting.name}/{number}" for number in range(job.size))
    return replace(job.arrival.wanting, held=held, changed_at=job.changed_at,
                   steps_left=job.left if known else math.inf)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ policies


def ours(jobs: Sequence[Wanting], nodes: int, now: float) -> Sizes:
    """`ray_dr.scheduling.allocate` on nodes that are all the same."""
    names = iter(range(nodes))
    held = {job.name: tuple(f"n{number}" for _, number in zip(job.held, names, strict=False)) for job in jobs}
    views = [replace(job, held=held[job.name]) for job in jobs]
    decided = allocate(views, [Machine(f"n{number}") for number in range(nodes)], Rules(), now)
    return {each.job: len(each.nodes) for each in decided.allocations}


def fifo(rigid: dict[str, int], *, overtaking: bool) -> Policy:
    """First come, first served, each with the size it asked for, until it is through. `overtaking`: one that does not fit lets
    smaller ones go first."""

    def decide(jobs: Sequence[Wanting], nodes: int, now: float) -> Sizes:
        sizes: Sizes = {}
        for job in sorted(jobs, key=lambda each: (not each.held, each.submitted_at)):
            size = min(rigid[job.name], nodes)
            if size <= nodes - sum(sizes.values()):
                sizes[job.name] = size
            elif not overtaking and not job.held:
                break
        return sizes

    return decide


def equal(jobs: Sequence[Wanting], nodes: int, now: float) -> Sizes:
    """The same number of nodes for all, as far as they can use them."""
    sizes = _minima(jobs, nodes)
    running = [job for job in jobs if job.name in sizes]
    share = nodes // max(1, len(running))
    for job in running:
        size = max(job.nodes_min, min(share, job.nodes_max) // job.multiple * job.multiple)
        if size > sizes[job.name] and sum(sizes.values()) + size - sizes[job.name] <= nodes:
            sizes[job.name] = size
    return sizes


def pollux(jobs: Sequence[Wanting], nodes: int, now: float) -> Sizes:
    """Pollux's policy (Qiao et al., OSDI 2021, section 4.2) on the same model: the power mean (p = -1) of speed-ups against a
    fair share, each less what a resize costs, `(age - R) / (age + R)`; its genetic search is replaced by steps up in order of
    worth, which finds the best where speed-ups are concave; and what runs stays unless the mean grows by 5 %."""
    fair = {job.name: max(job.nodes_min, min(nodes // max(1, len(jobs)), job.nodes_max)) for job in jobs}

    def cost(job: Wanting, size: int) -> float:
        up = job.times[""].on(fair[job.name]) / job.times[""].on(size)
        age = max(ROUND_S, now - job.submitted_at)
        kept = 1.0 if size == len(job.held) or not job.held else max(0.05, (age - RESIZE_S) / (age + RESIZE_S))
        return 1 / (up * kept)

    sizes = _minima(jobs, nodes)
    left = nodes - sum(sizes.values())
    by_name = {job.name: job for job in jobs}
    while True:
        steps = [
            ((cost(by_name[name], size) - cost(by_name[name], size + by_name[name].multiple)) / by_name[name].multiple, name)
            for name, size in sizes.items()
            if size + by_name[name].multiple <= by_name[name].nodes_max and by_name[name].multiple <= left
        ]
        if not steps or max(steps)[0] <= 0:
            break
        name = max(steps)[1]
        sizes[name] += by_name[name].multiple
        left -= by_name[name].multiple
    before = {job.name: len(job.held) for job in jobs if job.held}
    same = before.keys() == sizes.keys() and sum(before.values()) <= nodes
    if same and sum(cost(by_name[n], before[n]) for n in before) < 1.05 * sum(cost(by_name[n], sizes[n]) for n in sizes):
        return before
    return sizes


def _minima(jobs: Sequence[Wanting], nodes: int) -> Sizes:
    sizes: Sizes = {}
    for job in sorted(jobs, key=lambda each: (not each.held, each.submitted_at)):
        if sum(sizes.values()) + job.nodes_min <= nodes:
            sizes[job.name] = job.nodes_min
    return sizes
