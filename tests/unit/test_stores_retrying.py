"""Retries: bounded, spread out, and honest about who won."""

from __future__ import annotations

import random

import pytest

from ray_dr.errors import AccessDenied, AlreadyExists, NotFound, StoreFull, StoreUnavailable
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.retrying import Retry, Retrying


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def make(retry: Retry, time: Time | None = None) -> tuple[FaultyStore, Retrying, Time]:
    time = time or Time()
    faulty = FaultyStore(MemoryStore())
    return faulty, Retrying(faulty, retry, rng=random.Random(0), sleep=time.sleep, clock=lambda: time.now), time


def test_gives_up_after_so_many_attempts() -> None:
    faulty, store, _ = make(Retry(attempts=3))
    faulty.unavailable = True
    with pytest.raises(StoreUnavailable):
        store.put("k", b"x")
    assert len(faulty.calls) == 3


def test_waits_grow_are_capped_and_never_equal() -> None:
    faulty, store, time = make(Retry(attempts=9, first_s=1.0, most_s=8.0, deadline_s=1000.0))
    faulty.unavailable = True
    with pytest.raises(StoreUnavailable):
        store.get("k")
    bounds = [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    assert len(time.slept) == len(bounds)
    assert all(0 <= slept <= bound for slept, bound in zip(time.slept, bounds, strict=True))
    assert len(set(time.slept)) == len(bounds)
    assert max(time.slept) > 2.0


def test_gives_up_at_the_deadline() -> None:
    faulty, store, time = make(Retry(attempts=1000, first_s=1.0, most_s=8.0, deadline_s=30.0))
    faulty.unavailable = True
    with pytest.raises(StoreUnavailable):
        store.delete("k")
    assert 15.0 < time.now <= 30.0


@pytest.mark.parametrize("error", [StoreFull, AccessDenied, NotFound])
def test_does_not_repeat_what_cannot_succeed(error: type) -> None:
    faulty, store, time = make(Retry())
    faulty.fail("put", error=error)
    with pytest.raises(error):
        store.put("k", b"x")
    assert (len(faulty.calls), time.slept) == (1, [])


def test_our_own_put_applied_under_an_error_is_success() -> None:
    faulty, store, _ = make(Retry())
    faulty.apply_then_fail("put")
    store.put("k", memoryview(b"mine"), if_absent=True)
    assert store.get("k") == b"mine"


def test_somebody_elses_object_is_a_loss_also_after_an_error() -> None:
    faulty, store, _ = make(Retry())
    faulty.put("k", b"theirs")
    faulty.fail("put")
    with pytest.raises(AlreadyExists):
        store.put("k", b"mine", if_absent=True)


def test_without_an_error_before_the_same_bytes_of_another_are_a_loss() -> None:
    faulty, store, _ = make(Retry())
    faulty.put("k", b"same")
    with pytest.raises(AlreadyExists):
        store.put("k", b"same", if_absent=True)
    assert [operation for operation, _ in faulty.calls] == ["put", "put"]


def test_a_listing_that_breaks_again_and_again_is_given_once() -> None:
    faulty, store, _ = make(Retry(attempts=2))
    keys = [f"k{number}" for number in range(10)]
    for key in keys:
        faulty.put(key, b"")
    for left in (3, 5, 6):
        faulty.truncate("list", left)
    assert [entry.key for entry in store.list("k")] == keys


def test_a_listing_that_makes_no_progress_ends() -> None:
    faulty, store, _ = make(Retry(attempts=4))
    faulty.unavailable = True
    with pytest.raises(StoreUnavailable):
        list(store.list(""))
    assert len(faulty.calls) == 4


def test_a_hanging_call_goes_on_when_released() -> None:
    faulty, store, _ = make(Retry())
    faulty.hang("put").set()
    faulty.full = True
    with pytest.raises(StoreFull):
        store.put("k", b"x")
    faulty.full = False
    store.put("k", b"x")
    assert store.get("k") == b"x"
