"""A store that counts how it fares: what came of each request, and how long the oldest under way has been waiting."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_dr.errors import AccessDenied, AlreadyExists, NotFound, ObjectTooShort, StoreError, StoreFull
from ray_dr.model.signal import StoreSeen
from ray_dr.stores.base import Buffer, Entry, Store, Traits

ANSWERS = (NotFound, AlreadyExists, ObjectTooShort)
"""The store did what it was asked, and that was the answer."""
REFUSALS = (StoreFull, AccessDenied)
"""What trying again does not change."""


class Seen:
    """`inner`, counted, under a place's name. `clock`: monotonic seconds."""

    def __init__(self, inner: Store, place: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner, self._place, self._clock = inner, place, clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._begun: dict[int, float] = {}
        self._done = self._failed = 0
        self._refused = ""

    def take(self) -> StoreSeen | None:
        """How it fared since the last call; None when nothing was asked of it."""
        with self._lock:
            oldest_s = self._clock() - min(self._begun.values()) if self._begun else 0.0
            done, failed, refused = self._done, self._failed, self._refused
            self._done = self._failed = 0
            self._refused = ""
        return StoreSeen(self._place, done, failed, refused, round(oldest_s, 3)) if done or failed or oldest_s else None

    @property
    def traits(self) -> Traits:
        return self._inner.traits

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        with self._counted():
            self._inner.put(key, data, if_absent=if_absent)

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        with self._counted():
            return self._inner.get(key, start=start, size=size)

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        with self._counted():
            self._inner.readinto(key, into, start=start)

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._counted():
            yield from tuple(self._inner.list(prefix))

    def delete(self, key: str) -> None:
        with self._counted():
            self._inner.delete(key)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        number = next(self._numbers)
        with self._lock:
            self._begun[number] = self._clock()
        failed, refused = 0, ""
        try:
            yield
        except ANSWERS:
            raise
        except StoreError as error:
            failed, refused = 1, f"{type(error).__name__}: {error}" if isinstance(error, REFUSALS) else ""
            raise
        finally:
            with self._lock:
                del self._begun[number]
                self._done, self._failed = self._done + 1 - failed, self._failed + failed
                self._refused = refused or self._refused
