"""A store that fails on request: for tests of whatever uses a store, ours and our users'.

    store = FaultyStore(MemoryStore())
    store.fail("put", times=2)                  # the next two puts raise StoreUnavailable, unapplied
    store.apply_then_fail("put")                # the next one is applied, and raises all the same
    hung = store.hang("get"); ...; hung.set()   # the next get waits until released
    store.stale_list()                          # the next listing shows what is there now
    store.unavailable = True                    # everything raises, until it is set to False

Faults are used up in the order in which they were planned; `calls` lists every call as (operation, key).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ray_dr.errors import ObjectTooShort, StoreError, StoreFull, StoreUnavailable
from ray_dr.stores.base import Buffer, Entry, Store, Traits

Operation = Literal["put", "get", "readinto", "list", "delete"]
Kind = Literal["fail", "apply_then_fail", "hang", "slow", "truncate", "flip", "stale"]


@dataclass(slots=True)
class Fault:
    """One planned fault: applies to the next `times` calls of `operation` on keys starting with `prefix`."""

    operation: Operation
    kind: Kind
    prefix: str
    times: int
    error: type[StoreError] = StoreUnavailable
    amount: float = 0.0
    """slow: seconds. truncate: bytes left. flip: the byte whose lowest bit is flipped."""
    seen: tuple[Entry, ...] = ()
    """stale: what is listed."""
    released: threading.Event = field(default_factory=threading.Event)


class FaultyStore:
    """`inner` with planned faults. `sleep` is given so that a test owns time."""

    def __init__(self, inner: Store, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.calls: list[tuple[Operation, str]] = []
        self.unavailable = False
        self.full = False
        self._inner = inner
        self._sleep = sleep
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def fail(
        self, operation: Operation, *, times: int = 1, prefix: str = "", error: type[StoreError] = StoreUnavailable
    ) -> None:
        """The next `times` calls raise, without effect."""
        self._plan(Fault(operation, "fail", prefix, times, error=error))

    def apply_then_fail(
        self, operation: Operation, *, times: int = 1, prefix: str = "", error: type[StoreError] = StoreUnavailable
    ) -> None:
        """The next `times` calls take effect and raise: an answer lost on its way."""
        self._plan(Fault(operation, "apply_then_fail", prefix, times, error=error))

    def hang(self, operation: Operation, *, times: int = 1, prefix: str = "") -> threading.Event:
        """The next `times` calls wait until the returned event is set."""
        fault = Fault(operation, "hang", prefix, times)
        self._plan(fault)
        return fault.released

    def slow(self, operation: Operation, seconds: float, *, times: int = 1, prefix: str = "") -> None:
        """The next `times` calls take `seconds` longer."""
        self._plan(Fault(operation, "slow", prefix, times, amount=seconds))

    def truncate(self, operation: Operation, left: int, *, times: int = 1, prefix: str = "") -> None:
        """The next `times` calls move only `left` bytes: a torn put, or a get that ends early."""
        self._plan(Fault(operation, "truncate", prefix, times, amount=left))

    def flip(self, operation: Operation, at: int, *, times: int = 1, prefix: str = "") -> None:
        """The next `times` calls move the bytes with the lowest bit of byte `at` flipped."""
        self._plan(Fault(operation, "flip", prefix, times, amount=at))

    def stale_list(self, *, times: int = 1, prefix: str = "") -> None:
        """The next `times` listings show what is there now, whatever is put and deleted until then."""
        self._plan(Fault("list", "stale", prefix, times, seen=tuple(self._inner.list(prefix))))

    @property
    def traits(self) -> Traits:
        return self._inner.traits

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        fault = self._before("put", key)
        if self.full:
            raise StoreFull("no space left (planned)", key=key)
        self._inner.put(key, _damaged(bytes(data), fault) if fault else data, if_absent=if_absent)
        _after(fault, key)

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        fault = self._before("get", key)
        value = self._inner.get(key, start=start, size=size)
        _after(fault, key)
        return _damaged(value, fault)

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        fault = self._before("readinto", key)
        self._inner.readinto(key, into, start=start)
        _after(fault, key)
        value = _damaged(bytes(into), fault)
        if len(value) < into.nbytes:
            raise ObjectTooShort(f"{into.nbytes} bytes asked for, {len(value)} there (planned)", key=key)
        into.cast("B")[:] = value

    def list(self, prefix: str) -> Iterator[Entry]:
        fault = self._before("list", prefix)
        entries = list(self._inner.list(prefix))
        if fault and fault.kind == "stale":
            entries = [entry for entry in fault.seen if entry.key.startswith(prefix)]
        yield from entries[: int(fault.amount)] if fault and fault.kind == "truncate" else entries
        _after(fault, prefix)
        if fault and fault.kind == "truncate":
            raise StoreUnavailable("the listing broke off (planned)", key=prefix)

    def delete(self, key: str) -> None:
        fault = self._before("delete", key)
        self._inner.delete(key)
        _after(fault, key)

    def _plan(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _before(self, operation: Operation, key: str) -> Fault | None:
        with self._lock:
            self.calls.append((operation, key))
            fault = self._take(operation, key)
        if self.unavailable:
            raise StoreUnavailable("unreachable (planned)", key=key)
        if fault is None:
            return None
        if fault.kind == "fail":
            raise fault.error("failed (planned)", key=key)
        if fault.kind == "hang":
            fault.released.wait()
        if fault.kind == "slow":
            self._sleep(fault.amount)
        return fault

    def _take(self, operation: Operation, key: str) -> Fault | None:
        if self.unavailable:
            return None
        for fault in self._faults:
            if fault.operation == operation and fault.times > 0 and key.startswith(fault.prefix):
                fault.times -= 1
                return fault
        return None


def _damaged(value: bytes, fault: Fault | None) -> bytes:
    if fault is None or fault.kind not in ("truncate", "flip"):
        return value
    at = int(fault.amount)
    if fault.kind == "truncate":
        return value[:at]
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def _after(fault: Fault | None, key: str) -> None:
    if fault is not None and fault.kind == "apply_then_fail":
        raise fault.error("failed after it was applied (planned)", key=key)
