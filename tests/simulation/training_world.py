"""A training job in virtual time, as its supervisor hears of it: reports, steps, the time. Faults are switched on and off.

Jitter is meant to be worse than life: step times are lognormal with p99 at about five times their median, either common to
all ranks (long batches) or each rank's own; ranks and agents pause now and then as a garbage collection does; saves
stall everybody, evaluations keep rank 0 busy while the others wait for it; the first step takes twenty seconds; one
store request in a hundred fails.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from ray_dr.model.signal import (
    Beacon,
    Formed,
    Member,
    Now,
    Peer,
    Report,
    Sample,
    StepDone,
    StoreSeen,
    WorkerPhase,
)

TICK_S = 0.1
COLLECTIVES_PER_STEP = 3
P99 = math.log(5) / 2.326
FIRST_STEP_S = 20.0
SAVE_EVERY, EVAL_EVERY, DIGEST_EVERY = 50, 400, 50


@dataclass
class World:
    """`common` and `own` are the sigmas of the logarithm of step times, in units of the one that puts p99 at 5 x the median."""

    seed: int
    nodes: int = 4
    per_node: int = 2
    step_s: float = 0.12
    common: float = 0.95
    own: float = 0.15
    shards: int = 1
    digits: int = 0
    """Of the nodes' names: with twelve a name is its own short form."""

    frozen: set[str] = field(default_factory=set)
    cut_from_head: set[str] = field(default_factory=set)
    cut_from_peers: set[str] = field(default_factory=set)
    stuck: dict[int, WorkerPhase] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    slow: dict[int, float] = field(default_factory=dict)
    not_finite: set[int] = field(default_factory=set)
    wrong: set[int] = field(default_factory=set)
    loss_factor: float = 1.0

    at: float = 1000.0
    steps_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.names = [f"n{number:0{self.digits}}" for number in range(self.nodes)]
        self.world = self.nodes * self.per_node
        self.attempt, self.step = 1, 0
        self._offset = {name: self.dice.uniform(0, 1e5) for name in self.names}
        self._due: list[tuple[float, str]] = [(self.at + TICK_S, "")]
        self._due += [(self.at + self.dice.uniform(0, 0.25), name) for name in self.names]
        heapq.heapify(self._due)
        self._deaf_since: dict[tuple[str, str], float] = {}
        self._lines: list[list[tuple[float, WorkerPhase, int]]] = [[] for _ in range(self.world)]
        self._collectives = 0

    def worker(self, rank: int) -> str:
        return f"{self.node(rank)}/{rank % self.per_node}.0"

    def node(self, rank: int) -> str:
        return self.names[rank // self.per_node]

    def formed(self) -> Formed:
        """What the host says when the group forms."""
        members = tuple(Member(rank, self.worker(rank), rank % self.shards) for rank in range(self.world))
        return Formed(self.at, self.attempt, members)

    def run(self, seconds: float) -> Iterator[Sample]:
        """What the supervisor hears in the next seconds (a step that has begun is finished, unless it can't be)."""
        until = self.at + seconds
        while self.at < until:
            yield from self._one_step(until)

    def _one_step(self, until: float) -> Iterator[Sample]:
        begun, dice = self.at, self.dice
        common = math.exp(dice.gauss(0, self.common * P99)) * self.step_s
        arrivals, stuck = [], False
        for rank in range(self.world):
            line = [(begun, WorkerPhase.LOAD, self._collectives)]
            load_s = 0.02 * self.step_s
            if self.step and self.step % EVAL_EVERY == 0 and rank == 0:
                line[0] = begun, WorkerPhase.EVAL, self._collectives
                load_s = dice.uniform(40, 80) * self.step_s
            line.append((begun + load_s, WorkerPhase.COMPUTE, self._collectives))
            own = math.exp(dice.gauss(0, self.own * P99)) * self.slow.get(rank, 1.0)
            pause_s = dice.uniform(0.1, 0.8) if dice.random() < 0.001 else 0.0
            arrival = begun + load_s + common * own + pause_s + (FIRST_STEP_S if self.step == 0 else 0.0)
            if self.node(rank) in self.frozen or rank in self.stuck:
                stuck, phase = True, self.stuck.get(rank, WorkerPhase.COMPUTE)
                line = [(begun, phase, self._collectives + (phase is WorkerPhase.COLLECTIVE))]
            else:
                line.append((arrival, WorkerPhase.COLLECTIVE, self._collectives + 1))
            arrivals.append(arrival)
            self._lines[rank] = line
        if stuck:
            yield from self._until(until)
            return
        end = max(arrivals) + 0.05 * self.step_s
        yield from self._until(end)
        self._collectives += COLLECTIVES_PER_STEP
        self.step += 1
        yield from self._done(begun, end, arrivals)
        self.steps_s.append(end - begun)
        if self.step % SAVE_EVERY == 0:
            yield from self._save()

    def _done(self, begun: float, end: float, arrivals: list[float]) -> Iterator[Sample]:
        base = (2.0 + 3.0 * math.exp(-self.step / 2000)) * self.loss_factor
        norm = math.exp(self.dice.gauss(0, 0.3)) * (3.0 if self.dice.random() < 0.01 else 1.0) * self.loss_factor
        for rank in range(self.world):
            yield StepDone(
                end, rank, self.attempt, self.step, end - begun, arrivals[rank] - begun,
                loss=base * math.exp(self.dice.gauss(0, 0.05)), grad_norm=norm, finite=rank not in self.not_finite,
                digest=self._digest(rank),
            )  # fmt: skip

    def _digest(self, rank: int) -> str:
        if self.step % DIGEST_EVERY:
            return ""
        return f"{self.step}-{rank % self.shards}-{rank if rank in self.wrong else ''}"

    def _save(self) -> Iterator[Sample]:
        for line in self._lines:
            line.append((self.at, WorkerPhase.SAVE, self._collectives))
        yield from self._until(self.at + 0.5 * self.step_s * math.exp(self.dice.gauss(0, P99)))

    def _until(self, end: float) -> Iterator[Sample]:
        """Reports and ticks up to `end`, which is now then."""
        while self._due[0][0] <= end:
            at, name = heapq.heappop(self._due)
            self.at = at
            if not name:
                heapq.heappush(self._due, (at + TICK_S, name))
                yield Now(at)
                continue
            late_s = 0.01 * math.exp(self.dice.gauss(0, 1)) + (self.dice.uniform(0, 0.8) if self.dice.random() < 0.002 else 0)
            heapq.heappush(self._due, (at + 0.25 + late_s, name))
            if name not in self.frozen | self.cut_from_head:
                yield self._report(name)
        self.at = end

    def _report(self, name: str) -> Report:
        clock = self.at + self._offset[name]
        first = self.names.index(name) * self.per_node
        beacons = tuple(self._beacon(rank, self._offset[name]) for rank in range(first, first + self.per_node))
        stores: tuple[StoreSeen, ...] = ()
        if self.dice.random() < 0.1:
            failed = self.dice.random() < 0.05
            stores = (StoreSeen("store", 5, int(failed), oldest_s=self.dice.expovariate(2.0)),)
        return Report(self.at, name, clock, beacons, tuple(self._peers(name)), stores=stores)

    def _beacon(self, rank: int, offset: float) -> Beacon:
        line = self._lines[rank] or [(self.at, WorkerPhase.SETUP, 0)]
        since, phase, collective = next((entry for entry in reversed(line) if entry[0] <= self.at), line[0])
        return Beacon(rank, self.attempt, self.step, phase, collective, since + offset, rank in self.stopped)

    def _peers(self, name: str) -> Iterator[Peer]:
        """Each node asks the next two."""
        place = self.names.index(name)
        for shift in range(1, min(3, self.nodes)):
            other = self.names[(place + shift) % self.nodes]
            deaf = other in self.frozen or bool({name, other} & self.cut_from_peers)
            if deaf:
                age_s = self.at - self._deaf_since.setdefault((name, other), self.at - self.dice.uniform(0, 0.3))
            else:
                self._deaf_since.pop((name, other), None)
                age_s = self.dice.uniform(0, 0.5)
            yield Peer(other, age_s)
