"""Virtual time: what happens next, in order of time and then of having been planned."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """`now` is UTC seconds of the simulated world; it jumps from one happening to the next."""

    def __init__(self, start: float) -> None:
        self.now = start
        self.happened = 0
        self._planned: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        """Do something at a time; at once when that has passed."""
        self._number += 1
        heapq.heappush(self._planned, (max(when, self.now), self._number, do, args))

    def after(self, delay_s: float, do: Callable[..., None], *args: Any) -> None:
        """Do something so many seconds from now."""
        self.at(self.now + delay_s, do, *args)

    def run(self, until: float, over: Callable[[], bool]) -> None:
        """Let everything happen up to a time, or until it is over."""
        planned = self._planned
        while planned and planned[0][0] <= until and not over():
            self.now, _, do, args = heapq.heappop(planned)
            self.happened += 1
            do(*args)
        if not over():
            self.now = max(self.now, until)
