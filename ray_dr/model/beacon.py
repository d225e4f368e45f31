"""The bytes of a worker's beacon: 64 in shared memory, written by its worker, read by its agent, without a lock between them.

    count  u64   even: whole; odd: being written. Written first and last
    then   i64   attempt, rank, step, phase (index in PHASES), collective, since (monotonic nanoseconds of the node)
"""

from __future__ import annotations

import struct

from ray_dr.model.signal import Beacon, WorkerPhase

MEMFD_NAME = "ray-dr-beacon"
SIZE = 64
PHASES = tuple(WorkerPhase)
_COUNT, _WORDS, _ALL = struct.Struct("=Q"), struct.Struct("=6q"), struct.Struct("=Q6q")
TRIES = 8


def pack_into(view: memoryview, count: int, attempt: int, rank: int, step: int, phase: int, collective: int, since: int) -> None:
    """Write a beacon; `count` is even and grows by two each time."""
    _ALL.pack_into(view, 0, count - 1, attempt, rank, step, phase, collective, since)
    _COUNT.pack_into(view, 0, count)


def read(view: memoryview, *, stopped: bool = False) -> Beacon | None:
    """What is there; None before the first word, or when it was being written each time this looked."""
    for _ in range(TRIES):
        (before,) = _COUNT.unpack_from(view, 0)
        attempt, rank, step, phase, collective, since = _WORDS.unpack_from(view, _COUNT.size)
        (after,) = _COUNT.unpack_from(view, 0)
        if before == after and before and before % 2 == 0:
            return Beacon(rank, attempt, step, PHASES[phase], collective, since / 1e9, stopped)
    return None
