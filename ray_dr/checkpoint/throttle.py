"""Holds a save's background work to what `duty` allows. One per node agent: it hears of every step, the writer asks it
between chunks.

    steps --stepped--> Duty(share) <--pass_chunk-- writer's threads, which wait here

A thread that worked for a chunk's time waits as long as makes its share of the time right. Nothing waits when there is
no training to slow (no step for a while: the job stops, restores, or is over), for a forced save, after `hurry`, and
once a save has waited as much as its job's recovery point objective leaves room for.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ray_dr.checkpoint.duty import Duty, observe

SHOWS = 0.02
"""Work of less than this share of a step is not beside it."""
PAUSE_MOST_S = 0.5
IDLE_STEPS, IDLE_LEAST_S = 3, 0.5
"""Without a step for so many steps' time, and at least so long, training is taken to stand."""
OVERHEAD = 0.01


class Throttle:
    """Thread-safe.

    clock   monotonic seconds
    cpu     seconds of processor time that the calling thread has used: what waits for a store or a disk slows nobody
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, cpu: Callable[[], float] = time.thread_time
    ) -> None:
        self._clock, self._cpu = clock, cpu
        self._overhead, self.most_s = OVERHEAD, math.inf
        self._lock = threading.Lock()
        self._duty = Duty()
        self._worked_s = 0.0
        self._heard: dict[str, tuple[float, float]] = {}  # worker -> work done when it was last heard, its step's time
        self._stepped_at = -math.inf
        self._hurried = threading.Event()
        self._mine = threading.local()

    def allow(self, overhead: float, most_s: float) -> None:
        """The job's word: steps may be slower by this share on average; a save may wait so many seconds in all."""
        self._overhead, self.most_s = overhead, most_s

    def stepped(self, worker: str, took_s: float) -> None:
        """A worker of this node did a step."""
        with self._lock:
            before, _ = self._heard.get(worker, (self._worked_s, 0.0))
            self._heard[worker] = self._worked_s, took_s
            self._stepped_at = self._clock()
            beside = self._worked_s - before > SHOWS * took_s
            self._duty = observe(self._duty, took_s, beside=beside, overhead=self._overhead)

    def restart(self) -> None:
        """A new attempt: steps of another size are no measure."""
        with self._lock:
            self._duty = Duty(share=self._duty.share, reason=self._duty.reason)
            self._heard.clear()

    def hurry(self) -> None:
        """From now on nothing waits: the node is leaving, or its agent ends."""
        self._hurried.set()

    def save(self, *, forced: bool = False) -> Turn:
        """One save's work, or one stage of it."""
        return Turn(self, forced)

    @property
    def duty(self) -> Duty:
        """What is allowed now, and why."""
        return self._duty

    # -- for turns

    def worked(self) -> float:
        """Seconds the calling thread has worked since it was last here."""
        now = self._cpu()
        spent_s, self._mine.at = now - getattr(self._mine, "at", 0.0), now
        return spent_s

    def count(self, spent_s: float) -> float:
        """Take note of work, and give the seconds to wait for it."""
        with self._lock:
            self._worked_s += spent_s
            share, steps_s = self._duty.share, [took_s for _, took_s in self._heard.values()]
            idle_s = max(IDLE_LEAST_S, IDLE_STEPS * max(steps_s, default=0.0))
            if share >= 1 or self._clock() - self._stepped_at > idle_s:
                return 0.0
        return min(PAUSE_MOST_S, spent_s * (1 / share - 1))

    def wait(self, pause_s: float) -> None:
        """Wait, unless there is hurry."""
        self._hurried.wait(pause_s)

    @property
    def hurried(self) -> bool:
        return self._hurried.is_set()


class Turn:
    """One save's passage through the throttle. Its threads call `pass_chunk`; `slept_s` is the longest any of them waited."""

    def __init__(self, throttle: Throttle, forced: bool) -> None:
        self._throttle, self._forced = throttle, forced
        self._slept: dict[int, float] = {}

    def pass_chunk(self, spent_s: float | None = None) -> None:
        """Between two chunks: wait as is due for `spent_s` seconds of work, or for what this thread worked since it was last
        here."""
        worked_s = self._throttle.worked()
        pause_s = self._throttle.count(worked_s if spent_s is None else spent_s)
        thread = threading.get_ident()
        slept_s = self._slept.get(thread, 0.0)
        pause_s = min(pause_s, self._throttle.most_s - slept_s)
        if self._forced or self._throttle.hurried or pause_s <= 0:
            return
        self._slept[thread] = slept_s + pause_s
        self._throttle.wait(pause_s)

    @property
    def slept_s(self) -> float:
        return max(self._slept.values(), default=0.0)
