"""From what was measured to the next cadence: pure, fed with the journal's records, asked now and then."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from statistics import median

from ray_dr.checkpoint.cadence import AUTO, Bounds, Choice, Costs, choose, span
from ray_dr.checkpoint.failures import Losses, Rates, rates
from ray_dr.model.attempt import Cadence
from ray_dr.model.checkpoint import StepRecord
from ray_dr.model.job import DiskTier, Every, Job, StoreTier
from ray_dr.model.journal import PartSaved, Where

KEPT = 64
RECENT_STEPS = 16
PLAIN_STEPS = 2
SAVES = 2
SHOWS = 0.02
"""An agent that works on a save for less than this share of a step does not show in it."""
HYSTERESIS = 0.25
"""An interval changes only by more than this share: measured times wander, and a change is news for every rank."""
SPENT = 0.5
"""Of what memory checkpoints may cost, this share is spent in any case: where failures are rare, the interval that wastes
least would have a failure cost a minute of work for a gain nobody notices. 1: always as often as the budget allows."""
STORE_SHARE = 5.0
"""Saves to a store may cost so many times what saves to memory may: they are for failures that cost far more."""
SLOWDOWN, SLOWDOWN_LEAST, SLOWDOWN_STEPS = 0.5, 0.05, 3
"""By how much a write slows training before that is measured; at least; and from how many steps with and without one it is
taken to be measured. (The least: a store's requests and bandwidth are paid by others, too.)"""
ROUNDING = 0.02
"""An interval is whole steps of a time that wanders: so much beyond the objective is no news."""
UNMEASURED_S = 10.0
"""Between saves to a store with `every: auto`, before the first write is measured."""
TIMED_STEPS = 512
AHEAD_S = 0.5
"""A new cadence begins this far in the future, so that every rank hears of it before."""


def first_cadence(job: Job) -> Cadence:
    """Before anything is measured: as the user said; "auto" saves every fourth step, so that there are steps with and
    without a save to compare. Stores wait for the first measured step time unless their interval is in steps."""
    memory = 0 if _never(job.memory.every) else job.memory.every.steps or 4
    disk, second = (tier.every.steps or 0 if tier else 0 for tier in (job.disk, job.second))
    return Cadence(0, memory, job.store.every.steps or 0, disk, second)


@dataclass(slots=True)
class Pace:
    """Step times of rank 0, with and without a save just before, how long saves took, and what was lost. Times in seconds."""

    losses: Losses = field(default_factory=Losses)
    _saved_at: set[int] = field(default_factory=set)
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _after_save: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _seals: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _stalls: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    _writes: dict[Where, deque[float]] = field(default_factory=dict)
    _slowdowns: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _timed: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=TIMED_STEPS))
    _write_bytes: int = 0
    _pending: dict[int, float] = field(default_factory=dict)

    def stepped(self, record: StepRecord, at: float = 0.0) -> None:
        """One step of rank 0, done `at` (UTC seconds of its node). It is judged two steps later, when it is known whether a save
        came before it."""
        self._timed.append((at, record.took_s))
        self._pending[record.step] = record.took_s
        for step in [s for s in self._pending if s <= record.step - 2]:
            saved = step - 1 in self._saved_at
            (self._after_save if saved else self._plain).append(self._pending.pop(step))

    def saved(self, record: PartSaved) -> None:
        """Rank 0's part reached a place."""
        if record.where is Where.MEMORY:
            self._saved_at = {step for step in self._saved_at if step > record.version.step - KEPT}
            self._saved_at.add(record.version.step)
            self._stalls.append(record.stall_s)
            self._seals.append(record.took_s)
        elif record.where is not Where.PEER:
            self._writes.setdefault(record.where, deque(maxlen=KEPT)).append(record.took_s)
            if record.where is Where.STORE:
                self._write_bytes = record.size
                self._compare(record.at - record.took_s, record.at)

    def _compare(self, begun: float, ended: float) -> None:
        """How much slower steps were while a write ran than the others of that time."""
        during = [took_s for at, took_s in self._timed if begun + took_s <= at <= ended]
        others = [took_s for at, took_s in self._timed if at <= begun or at - took_s >= ended]
        if min(len(during), len(others)) >= SLOWDOWN_STEPS:
            self._slowdowns.append(max(0.0, median(during) / median(others) - 1))

    def restart(self) -> None:
        """A new attempt, perhaps of another size: step times begin anew; what saves cost is kept."""
        self._pending.clear()
        self._saved_at.clear()
        self._plain.clear()
        self._after_save.clear()
        self._timed.clear()

    @property
    def step_s(self) -> float:
        """Median time of a step without a save before it; of the first steps, as long as it is not known which those are; 0
        before the first."""
        times = self._plain or self._after_save or list(self._pending.values())
        return median(times) if times else 0.0

    @property
    def cost_s(self) -> float:
        """What one memory save costs training: the stall, and the time in which it is copied beside training and the agent
        works on it, as both take cores away where training fills them. (Comparing steps with and without a save would be
        truer, but step times wander by more than a save costs.)"""
        stall_s = median(self._stalls) if self._stalls else 0.0
        worked_s = median(self._seals) if self._seals else 0.0
        return stall_s + (worked_s if worked_s > SHOWS * self.step_s else 0.0)

    @property
    def write_s(self) -> float:
        """Seconds from a snapshot until it is durable in the store; 0 before the first."""
        return self._write_s(Where.STORE)

    def _write_s(self, where: Where) -> float:
        return median(self._writes[where]) if where in self._writes else 0.0

    @property
    def slowdown(self) -> float:
        """By which share steps are slower while a write to the store runs (0..1)."""
        return min(1.0, max(SLOWDOWN_LEAST, median(self._slowdowns))) if self._slowdowns else SLOWDOWN

    def rates(self) -> Rates:
        """The failures this job has to expect, on the nodes it has."""
        return rates(self.losses.tally(), self.losses.nodes)

    def next(self, job: Job, current: Cadence, step: int) -> Cadence | None:
        """A cadence that differs from the current one, to begin a little after `step`; None when there is no reason."""
        if len(self._plain) + len(self._after_save) < PLAIN_STEPS or self.step_s <= 0:
            return None
        memory, store = current.memory_every, 0
        chosen = self._memory(job, current)
        if chosen is not None:
            memory = _settled(current.memory_every, chosen.steps)
        if _never(job.memory.every):
            memory = 0
        if not _never(job.store.every):
            store = self._store(job, current, memory).steps
            fits = not _both_auto(job) or not memory or current.store_every % min(memory, store) == 0
            if fits and (store >= current.store_every or job.rpo_s == math.inf):  # an objective is no matter of about
                store = _settled(current.store_every, store)
            if memory and job.memory.every == AUTO:
                memory = min(memory, store)  # a save to the store is one to memory as well
        disk = self._other(job, job.disk, Where.DISK, current.disk_every)
        second = self._other(job, job.second, Where.SECOND, current.second_every)
        if replace(current, memory_every=memory, store_every=store, disk_every=disk, second_every=second) == current:
            return None
        return Cadence(step + max(2, round(AHEAD_S / self.step_s)), memory, store, disk, second)

    def _other(self, job: Job, tier: DiskTier | StoreTier | None, where: Where, current: int) -> int:
        """The interval of a further durable place, in steps; 0 for none."""
        if tier is None or _never(tier.every):
            return 0
        if where not in self._writes and tier.every == AUTO:
            return _settled(current, self._unmeasured(math.inf))
        write_s = self._write_s(where)
        costs = Costs(self.step_s, self.slowdown * write_s, write_s)
        chosen = choose(costs, self.rates().store, Bounds(tier.every, STORE_SHARE * job.overhead), current or None)
        return _settled(current, chosen.steps)

    def _unmeasured(self, rpo_s: float) -> int:
        return max(1, round(min(UNMEASURED_S, rpo_s) / self.step_s))

    def _memory(self, job: Job, current: Cadence) -> Choice | None:
        """The interval in memory, for failures that leave a copy there; None as long as too little is measured."""
        if _never(job.memory.every) or job.memory.every.steps is not None or len(self._stalls) < SAVES:
            return None
        rates = self.rates()
        rate = rates.own.plus(rates.peer) if self._copied(job) else rates.own
        return choose(
            Costs(self.step_s, self.cost_s), rate, Bounds(job.memory.every, job.overhead, SPENT), current.memory_every
        )

    def _store(self, job: Job, current: Cadence, memory: int) -> Choice:
        """The interval in the store, for the other failures. It reuses the snapshot: only slower steps are its cost."""
        if Where.STORE not in self._writes and job.store.every == AUTO:
            steps = self._unmeasured(job.rpo_s)
            return Choice(steps, f"no write is measured yet: one each {span(steps * self.step_s)}")
        rates = self.rates()
        rate = rates.store
        if _never(job.memory.every):
            rate = rate.plus(rates.own)
        if _never(job.memory.every) or not self._copied(job):
            rate = rate.plus(rates.peer)
        multiple = max(1, memory) if _both_auto(job) else 1
        bounds = Bounds(job.store.every, STORE_SHARE * job.overhead, rpo_s=job.rpo_s, multiple=multiple)
        costs = Costs(self.step_s, self.slowdown * self.write_s, self.write_s)
        return choose(costs, rate, bounds, current.store_every)

    def _copied(self, job: Job) -> bool:
        return job.memory.copies > 1 and self.losses.nodes != 1

    def reason(self, job: Job, current: Cadence) -> str:
        """Why the cadence that `next` gives beside `current` is what it is, in words with the measured numbers."""
        words = [f"a step takes {span(self.step_s)}"]
        memory = self._memory(job, current)
        if memory is not None:
            words.append(f"memory: {memory.reason}")
        if not _never(job.store.every):
            words.append(f"store: {self._store(job, current, current.memory_every).reason}")
        return "; ".join(words)

    def exposed_s(self, cadence: Cadence) -> float:
        """Seconds of work that are lost at most with everything but the store: one interval and one write (algorithms: the
        checkpoint under way does not count)."""
        return cadence.store_every * self.step_s + self.write_s if cadence.store_every else math.inf

    def unmet(self, job: Job, cadence: Cadence) -> str:
        """Why the recovery point objective cannot be met with what is measured; empty when it can, or nothing is known yet."""
        if job.rpo_s == math.inf or not self.step_s:
            return ""
        if _never(job.store.every):
            return f"at most {span(job.rpo_s)} of work may be lost, but nothing is ever saved to the store"
        exposed_s = self.exposed_s(cadence)
        if Where.STORE not in self._writes or not cadence.store_every or exposed_s <= job.rpo_s * (1 + ROUNDING):
            return ""
        speed = f"{self._write_bytes / 1e9:.3g} GB, {self._write_bytes / 1e9 / max(self.write_s, 1e-9):.2g} GB/s"
        return (
            f"at most {span(job.rpo_s)} of work may be lost, but a write takes {span(self.write_s)} (rank 0: {speed}) and the "
            f"next begins after it: up to {span(exposed_s)} would be lost"
        )


def _never(every: Every) -> bool:
    return every.seconds == float("inf")


def _both_auto(job: Job) -> bool:
    return job.memory.every == AUTO and job.store.every == AUTO


def _settled(current: int, wanted: int) -> int:
    """The wanted interval, or the current one when they are about the same."""
    return current if current and abs(wanted - current) <= HYSTERESIS * current else wanted
