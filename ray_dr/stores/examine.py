"""A store examined: which checks hold, how long small requests take, how fast bytes move."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles

from ray_dr.errors import AccessDenied, StoreError, StoreFull, StoreUnavailable
from ray_dr.model.checkpoint import CHUNK_BYTES
from ray_dr.stores.base import Store
from ray_dr.stores.checks import CHECKS, Check, expect, noise, own_folder

THREADS = 4
SMALL_BYTES = 4096
SMALL_REQUESTS = 30
DEFAULT_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check came to: `said` is what was seen, or what is wrong."""

    check: Check
    holds: bool
    said: str
    took_s: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of a request of `size` bytes, one at a time."""

    operation: str
    size: int
    median_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """`size` bytes in objects of `piece` bytes, moved by so many threads, in all."""

    operation: str
    threads: int
    size: int
    piece: int
    took_s: float

    @property
    def mb_per_s(self) -> float:
        """10**6 bytes per second."""
        return self.size / self.took_s / 1e6


@dataclass(frozen=True, slots=True)
class Examined:
    """All that was found out about a store."""

    outcomes: tuple[Outcome, ...]
    latencies: tuple[Latency, ...]
    throughputs: tuple[Throughput, ...]

    @property
    def sound(self) -> bool:
        """Whether everything holds that commits and data rest on."""
        return all(outcome.holds or outcome.check.rests == "listings" for outcome in self.outcomes)

    @property
    def weaker(self) -> tuple[str, ...]:
        """In words, what is left of each guarantee that does not hold."""
        return tuple(dict.fromkeys(outcome.check.weaker for outcome in self.outcomes if not outcome.holds))


def examine(
    store: Store, size: int = DEFAULT_BYTES, *,
    show: Callable[[str], None] = lambda _: None, left: Callable[[str], None] = lambda _: None,
) -> Examined:  # fmt: skip
    """Check everything, then move `size` bytes four times (put and get, by one thread and by THREADS).

    Works in a folder of its own, which is gone afterwards. `show` is told what is going on, `left` the name of each
    object that could not be removed. Raises AccessDenied, StoreUnavailable, ... when it cannot be gone on with.
    """
    with own_folder(store, f"probe/{uuid.uuid4().hex}", left=left) as (inside, folder):
        reach(inside, f"{folder}/reached")
        outcomes = []
        for number, check in enumerate(CHECKS):
            show(f"{number + 1} of {len(CHECKS)}: {check.name}")
            outcomes.append(try_out(check, inside, f"{folder}/{number:02d}"))
        show(f"latency: {SMALL_REQUESTS} small puts and gets")
        latencies = measure_latency(inside, f"{folder}/small")
        throughputs: list[Throughput] = []
        for threads in (1, THREADS):
            show(f"throughput: {size / 1e6:.0f} MB with {threads} threads")
            throughputs += measure_throughput(inside, f"{folder}/big-{threads}", size, threads)
    return Examined(tuple(outcomes), latencies, tuple(throughputs))


def reach(store: Store, key: str) -> None:
    """Nothing, when an object can be put, read, listed and deleted. Raises what the store raises, or BrokenPromise."""
    store.put(key, b"ray_dr")
    back = store.get(key) == b"ray_dr" and [entry.key for entry in store.list(key)] == [key]
    expect(back, f"{store.url} does not give back what was just stored there; use a consistent store")
    store.delete(key)


def try_out(check: Check, store: Store, at: str) -> Outcome:
    """Run one check. An error of the store is a promise not kept, too; that it is out of reach or full is raised."""
    began = time.perf_counter()
    try:
        said, holds = check.run(store, at), True
    except (StoreUnavailable, StoreFull, AccessDenied):
        raise
    except StoreError as error:
        said, holds = str(error), False
    return Outcome(check, holds, said, time.perf_counter() - began)


def measure_latency(store: Store, at: str) -> tuple[Latency, Latency]:
    """Of small puts and gets, one after the other; the first of each, which may connect, is not counted."""
    data = noise(SMALL_BYTES)
    names = [f"{at}/{number}" for number in range(SMALL_REQUESTS + 1)]
    puts = [_timed(partial(store.put, name, data)) for name in names][1:]
    gets = [_timed(partial(store.get, name)) for name in names][1:]
    return _latency("put", puts), _latency("get", gets)


def measure_throughput(store: Store, at: str, size: int, threads: int) -> tuple[Throughput, Throughput]:
    """Of chunks as checkpoints have them, put and read into reused memory. Raises BrokenPromise for other bytes."""
    piece = min(CHUNK_BYTES, size)
    data = memoryview(noise(piece))
    names = [f"{at}/{number}" for number in range(-(-size // piece))]
    cuts = [min(piece, size - number * piece) for number in range(len(names))]
    rooms = [memoryview(bytearray(piece)) for _ in range(min(threads, len(names)))]

    def put(which: int) -> None:
        store.put(names[which], data[: cuts[which]])

    def get(worker: int) -> None:
        for which in range(worker, len(names), len(rooms)):
            store.readinto(names[which], rooms[worker][: cuts[which]])

    with ThreadPoolExecutor(len(rooms)) as pool:
        list(pool.map(lambda _: time.sleep(0), rooms))
        put_s = _timed(lambda: list(pool.map(put, range(len(names)))))
        get_s = _timed(lambda: list(pool.map(get, range(len(rooms)))))
    last = len(names) - 1
    expect(bytes(rooms[last % len(rooms)][: cuts[last]]) == bytes(data[: cuts[last]]), "a chunk came back different")
    return Throughput("put", threads, size, piece, put_s), Throughput("get", threads, size, piece, get_s)


def _latency(operation: str, times: Sequence[float]) -> Latency:
    return Latency(operation, SMALL_BYTES, median(times), quantiles(times, n=20)[-1])


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
