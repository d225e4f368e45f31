"""Where this rank is, in memory that its node's agent reads: told at each change of phase, heard of even when Python hangs."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from ray_dr.model.beacon import MEMFD_NAME, PHASES, SIZE, pack_into
from ray_dr.model.signal import WorkerPhase

COUNT_S = 0.2
"""The number of collectives entered is looked up that often: no hook of a collective is paid for at each."""
NUMBERS = {phase: number for number, phase in enumerate(PHASES)}


class Beacon:
    """One per worker process. `enter` takes about half a microsecond; a thread of its own keeps count of the collectives, so
    that a rank that waits in one is ahead of the rank that has not come to it."""

    def __init__(self) -> None:
        fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        self._closed = weakref.finalize(self, os.close, fd)
        self._view = memoryview(mmap.mmap(fd, SIZE))
        self._count = self._attempt = self._rank = self._step = self._collective = 0
        self._phase, self._since = NUMBERS[WorkerPhase.SETUP], time.monotonic_ns()
        self._over = threading.Event()
        self._writing = threading.Lock()
        threading.Thread(target=self._keep_count, name="beacon", daemon=True).start()

    def begin(self, attempt: int, rank: int) -> None:
        """An attempt begins: nothing is done of it, and no collective entered."""
        self._attempt, self._rank, self._collective = attempt, rank, 0
        self.enter(WorkerPhase.SETUP, 0)

    def enter(self, phase: WorkerPhase, step: int | None = None) -> None:
        """From now on in this phase, after so many steps; None: as many as before."""
        self._phase, self._since = NUMBERS[phase], time.monotonic_ns()
        if step is not None:
            self._step = step
        self._write()

    @contextlib.contextmanager
    def within(self, phase: WorkerPhase) -> Iterator[None]:
        """In this phase for a while, then again in the one before, as if that began anew."""
        before = PHASES[self._phase]
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def close(self) -> None:
        """End the thread; the memory goes with the object."""
        self._over.set()

    def _write(self) -> None:
        with self._writing:
            self._count += 2
            pack_into(self._view, self._count, self._attempt, self._rank, self._step, self._phase, self._collective, self._since)

    def _keep_count(self) -> None:
        while not self._over.wait(COUNT_S):
            with contextlib.suppress(Exception):  # the group is just being formed or left
                entered = _entered()
                if entered not in (None, self._collective):
                    self._collective, self._since = entered, time.monotonic_ns()  # it gets on, be the phase ever so long
                    self._write()


def _entered() -> int | None:
    """How many collectives this process has entered in all groups. Keeps no group: one that is left must go at once."""
    if not dist.is_initialized():
        return None
    groups: tuple[Any, ...] = tuple(dist.distributed_c10d._world.pg_map)
    return sum(int(group._get_sequence_number_for_group()) for group in groups)
