"""A node examined from within, by its agent: processor, memory, disk, store, line to a peer, GPUs.

The short form takes well under two seconds and gives its place to whatever else the node does: it runs at the lowest
priority, and processor and memory are measured in processor time. Each figure is the best of several tries; the long form
tries more often.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable

import numpy as np

from ray_dr.actors.gpus import states
from ray_dr.errors import StoreError
from ray_dr.model.preflight import Figures
from ray_dr.stores.base import Store
from ray_dr.stores.checks import noise, own_folder
from ray_dr.stores.wire import Connection, connect

SHORT_S, LONG_S = 0.25, 1.5
"""A figure is tried again until so much time has passed, but TRIES_LEAST times in any case where a try is quick."""
TRIES_LEAST, TRIES_MOST = 2, 12
SIDE, MULTIPLIED = 48, 200
"""Matrices so small that one thread multiplies them."""
COPIED_BYTES, WRITTEN_BYTES, SENT_BYTES, SMALL_BYTES = 16 * 2**20, 4 * 2**20, 4 * 2**20, 1024
ANSWER_S = 2.0
LOWEST = 19


class Examination:
    """Examines this agent's node.

    store       the job's; directory: where the node's disk is to be written
    """

    def __init__(self, node: str, store: Callable[[], Store], directory: str, token: bytes) -> None:
        self._node, self._store, self._directory, self._token = node, store, directory, token

    def run(self, peer: str, *, long: bool) -> Figures:
        """The figures; `peer`: address of another node's agent, or empty. Waits for it; never raises for the node's faults."""
        found: list[Figures] = []
        thread = threading.Thread(target=lambda: found.append(self._run(peer, LONG_S if long else SHORT_S)), name="examine")
        thread.start()  # of its own, as a priority once lowered can't be raised again
        thread.join()
        return found[0] if found else Figures(self._node, troubles={"examination": "it failed"})

    def _run(self, peer: str, for_s: float) -> Figures:
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
        works: dict[str, Callable[[float], float]] = {
            "compute": _compute, "memory": _memory, "disk": lambda s: _disk(self._directory, s), "store": self._small_object,
        }  # fmt: skip
        if peer:
            works["peer"] = lambda s: _send(peer, self._token, s)
        costs, troubles = {}, {}
        for what, work in works.items():
            try:
                costs[what] = work(for_s)
            except (OSError, StoreError, MemoryError) as error:
                troubles[what] = str(error)
        return Figures(self._node, costs, troubles, states(), time.monotonic() - begun)

    def _small_object(self, for_s: float) -> float:
        store = self._store()
        data = noise(SMALL_BYTES)

        def there_and_back() -> None:
            with own_folder(store, f"probe/{uuid.uuid4().hex}") as (inside, folder):
                inside.put(f"{folder}/preflight", data)
                if inside.get(f"{folder}/preflight") != data:
                    raise StoreError("what was put came back as something else", key=f"{folder}/preflight")

        return _best(there_and_back, for_s, time.monotonic)


def _best(work: Callable[[], object], for_s: float, clock: Callable[[], float]) -> float:
    """Seconds of the quickest of several tries, by `clock`."""
    best, end = float("inf"), time.monotonic() + for_s
    for number in range(TRIES_MOST):
        begun = clock()
        work()
        best = min(best, clock() - begun)
        left_s = end - time.monotonic()
        if left_s <= 0 and (number + 1 >= TRIES_LEAST or best > for_s):
            break
    return best


def _compute(for_s: float) -> float:
    one, out = np.full((SIDE, SIDE), 0.5), np.empty((SIDE, SIDE))

    def multiply() -> None:
        for _ in range(MULTIPLIED):
            np.matmul(one, one, out=out)

    return _best(multiply, for_s, time.thread_time) / (2 * SIDE**3 * MULTIPLIED / 1e9)


def _memory(for_s: float) -> float:
    source, target = np.ones(COPIED_BYTES, np.uint8), np.zeros(COPIED_BYTES, np.uint8)
    return _best(lambda: np.copyto(target, source), for_s, time.thread_time) / (COPIED_BYTES / 1e9)


def _disk(directory: str, for_s: float) -> float:
    data = noise(WRITTEN_BYTES)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:  # without a name: nothing stays, whatever happens

        def write() -> None:
            file.seek(0)
            file.write(data)
            os.fsync(file.fileno())

        return _best(write, for_s, time.monotonic)


def _send(address: str, token: bytes, for_s: float) -> float:
    connection = connect(address, token, timeout_s=ANSWER_S)
    try:
        connection.timeout(ANSWER_S)
        data = memoryview(bytes(SENT_BYTES))
        return _best(lambda: connection.request({"op": "take in"}, data), for_s, time.monotonic) / (SENT_BYTES / 1e9)
    finally:
        connection.close()


def take_in(connection: Connection, size: int) -> None:
    """The other end of a measured line: read what comes, and say so, until it breaks (StoreError)."""
    while True:
        connection.read_into(memoryview(bytearray(size)))
        connection.send({"taken": size})
        _, size = connection.receive()
