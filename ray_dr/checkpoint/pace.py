"""From what was measured to the next cadence: pure, fed with the journal's records, asked now and then."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from statistics import median

from ray_dr.checkpoint.cadence import memory_interval, store_interval
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
    """Step times of rank 0, with and without a save just before, and how long saves took. Times in seconds."""

    _saved_at: set[int] = field(default_factory=set)
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _after_save: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _seals: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _stalls: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    _writes: dict[Where, deque[float]] = field(default_factory=dict)
    _pending: dict[int, float] = field(default_factory=dict)

    def stepped(self, record: StepRecord) -> None:
        """One step of rank 0. It is judged two steps later, when it is known whether a save came before it."""
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

    def restart(self) -> None:
        """A new attempt, perhaps of another size: step times begin anew; what saves cost is kept."""
        self._pending.clear()
        self._saved_at.clear()
        self._plain.clear()
        self._after_save.clear()

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

    def next(self, job: Job, current: Cadence, step: int) -> Cadence | None:
        """A cadence that differs from the current one, to begin a little after `step`; None when there is no reason."""
        if len(self._plain) + len(self._after_save) < PLAIN_STEPS or self.step_s <= 0:
            return None
        memory, store = current.memory_every, 0
        if _never(job.memory.every):
            memory = 0
        elif job.memory.every.steps is None and len(self._stalls) >= SAVES:
            memory = memory_interval(self.step_s, self.cost_s, budget=job.overhead, current=memory, every=job.memory.every)
        if not _never(job.store.every):
            store = store_interval(
                self.step_s, self.write_s, slowdown=0.5, budget=5 * job.overhead,
                memory_steps=1, current=current.store_every or None, every=job.store.every, rpo_s=job.rpo_s,
            )  # fmt: skip
        memory = _settled(current.memory_every, memory)
        if store >= current.store_every or job.rpo_s == math.inf:  # an objective is no matter of about
            store = _settled(current.store_every, store)
        disk = self._other(job, job.disk, Where.DISK, current.disk_every)
        second = self._other(job, job.second, Where.SECOND, current.second_every)
        if replace(current, memory_every=memory, store_every=store, disk_every=disk, second_every=second) == current:
            return None
        return Cadence(step + max(2, round(AHEAD_S / self.step_s)), memory, store, disk, second)

    def _other(self, job: Job, tier: DiskTier | StoreTier | None, where: Where, current: int) -> int:
        """The interval of a further durable place, in steps; 0 for none."""
        if tier is None or _never(tier.every):
            return 0
        wanted = store_interval(
            self.step_s, self._write_s(where), slowdown=0.5, budget=5 * job.overhead,
            memory_steps=1, current=current or None, every=tier.every,
        )  # fmt: skip
        return _settled(current, wanted)


    def reason(self, job: Job, cadence: Cadence) -> str:
        """Why a cadence is what it is, in words with the measured numbers."""
        step_s, words = self.step_s, [f"a step takes {self.step_s:.3g} s"]
        if cadence.memory_every and job.memory.every == Every():
            words.append(f"a save to memory costs {self.cost_s:.3g} s, and {job.overhead:.3g} of a step may be spent")
        if cadence.store_every:
            said = job.store.every.seconds or (job.store.every.steps or 0) * step_s
            asked = f", one each {said:.3g} s is asked for" if said else ""
            words.append(f"a write to the store takes {self.write_s:.3g} s{asked}")
        if job.rpo_s < math.inf and cadence.store_every:
            words.append(f"at most {job.rpo_s:.3g} s of work may be lost")
        return "; ".join(words)

    def exposed_s(self, cadence: Cadence) -> float:
        """Seconds of work that are lost at most with everything but the store: one interval and one write (algorithms: the
        checkpoint under way does not count)."""
        return cadence.store_every * self.step_s + self.write_s if cadence.store_every else math.inf


def _never(every: Every) -> bool:
    return every.seconds == float("inf")


def _settled(current: int, wanted: int) -> int:
    """The wanted interval, or the current one when they are about the same."""
    return current if current and abs(wanted - current) <= HYSTERESIS * current else wanted
