"""A store that tries again: the only place where retries happen, so that they never multiply.

Only errors that say `retryable` are tried again, with exponential backoff and full jitter, within a bound on attempts
and on time. A store that throttles is there and says so: it is given minutes, where one that does not answer is given up
in seconds. A put-if-absent whose first try failed may have been applied all the same: when the next try finds the name
taken, the object is read back, and our own bytes there are success. Callers that need to know *who* won must therefore
put bytes that nobody else would put (a nonce, a term).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ray_dr.errors import AlreadyExists, StoreBusy, StoreError
from ray_dr.stores.base import Buffer, Entry, Store, Traits

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retry:
    """How long to insist.

    attempts    tries in all, the first included; answers that throttle are not counted
    first_s     upper bound of the first wait; it doubles each time, up to most_s
    deadline_s  no try starts later than this after the first one began
    busy_s      the same while the store throttles: longer than the minute that S3 takes to make room
    """

    attempts: int = 6
    first_s: float = 0.1
    most_s: float = 5.0
    deadline_s: float = 60.0
    busy_s: float = 180.0

    def wait_s(self, failures: int, rng: random.Random) -> float:
        """Seconds to wait after the n-th failure (from 1): uniform in [0, bound], so that clients spread out."""
        return rng.uniform(0.0, min(self.most_s, self.first_s * 2 ** (failures - 1)))


class Retrying:
    """`inner` with retries. `rng`, `sleep` and `clock` (monotonic seconds) are given so that a test owns them."""

    def __init__(
        self,
        inner: Store,
        retry: Retry | None = None,
        *,
        rng: random.Random | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner = inner
        self._retry = retry or Retry()
        self._rng = rng or random.Random()
        self._sleep = sleep
        self._clock = clock

    @property
    def traits(self) -> Traits:
        return self._inner.traits

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        failed: list[StoreError] = []
        try:
            self._insist(lambda: self._inner.put(key, data, if_absent=if_absent), failed)
        except AlreadyExists:
            if not (failed and self._holds(key, data)):
                raise

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        return self._insist(lambda: self._inner.get(key, start=start, size=size))

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        self._insist(lambda: self._inner.readinto(key, into, start=start))

    def delete(self, key: str) -> None:
        self._insist(lambda: self._inner.delete(key))

    def list(self, prefix: str) -> Iterator[Entry]:
        """A listing that breaks is begun anew; what was already given is skipped."""
        failed: list[StoreError] = []
        last, began = "", self._clock()
        while True:
            try:
                for entry in self._inner.list(prefix):
                    if entry.key > last:
                        last, began = entry.key, self._clock()
                        failed.clear()
                        yield entry
                return
            except StoreError as error:
                failed.append(error)
                self._wait_or_raise(failed, began)

    def _insist(self, act: Callable[[], T], failed: MutableSequence[StoreError] | None = None) -> T:
        failures: MutableSequence[StoreError] = [] if failed is None else failed
        began = self._clock()
        while True:
            try:
                return act()
            except StoreError as error:
                if not error.retryable:
                    raise
                failures.append(error)
                self._wait_or_raise(failures, began)

    def _wait_or_raise(self, failed: Sequence[StoreError], began: float) -> None:
        error = failed[-1]
        counted = sum(not isinstance(each, StoreBusy) for each in failed)
        if not error.retryable or counted >= self._retry.attempts:
            raise error
        wait_s = self._retry.wait_s(len(failed), self._rng)
        most_s = self._retry.deadline_s if counted == len(failed) else self._retry.busy_s
        if self._clock() + wait_s - began > most_s:
            raise error
        self._sleep(wait_s)

    def _holds(self, key: str, data: Buffer) -> bool:
        """Whether the object is `data`: then an earlier try of ours was applied though it reported an error."""
        return self.get(key) == bytes(data)
