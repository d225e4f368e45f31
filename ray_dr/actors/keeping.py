"""What the supervisor keeps in its job's store for the case that the whole cluster is lost: its lease, and the program.

A thread of its own does it, beside the host's loop: a slow store delays nobody, and a recovery never waits for it. With each
renewal it looks whether a supervisor of a newer term has the job, so that one that was cut off and comes back ends within
EVERY_S, also when it has nothing to commit.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from typing import TYPE_CHECKING

from ray_dr.actors import packing
from ray_dr.errors import StoreError
from ray_dr.model.events import FencedOff
from ray_dr.model.journal import Where
from ray_dr.model.lease import Lease, Over
from ray_dr.model.recovery import Failed, Finished
from ray_dr.repository.lease import sweep_leases, write_lease
from ray_dr.repository.program import write_program

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

EVERY_S = 2.0
LAST_S = 5.0
"""The end waits so long for the last word to be in the store."""


class Keeping:
    """Begins with `start`; `close` says how the job ended."""

    def __init__(self, host: Host, train: bytes) -> None:
        self._host, self._train = host, train
        self._beat = 0
        self._kept = self._swept = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        """Renew the lease from now on."""
        self._thread.start()

    def close(self) -> None:
        """Write down how it ended, once, within LAST_S."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(LAST_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(StoreError):  # the journal tells of a store that is away
                self._renew()
                self._keep_program()
                self._sweep()
            self._closing.wait(EVERY_S)
        with contextlib.suppress(StoreError):
            self._renew()

    def _renew(self) -> None:
        host = self._host
        newest = host.saves.depots[Where.STORE].log.term()
        if newest > host.term:  # what this one says of the job's end is no word about the job any more
            host.post(FencedOff(time.time(), newest))
            return
        phase = host.state.phase
        over: Over = "failed" if isinstance(phase, Failed) else ""
        if isinstance(phase, Finished):
            over = "drained" if phase.drained else "finished"
        self._beat += 1
        write_lease(host.store, host.job.name, Lease(
            host.term, self._beat, time.time(), EVERY_S, f"{platform.node()}:{os.getpid()}",
            max(host.progress.step, host.state.step), type(phase).__name__, over,
            phase.reason if isinstance(phase, Failed) else "", phase.resubmit if isinstance(phase, Failed) else True,
            time.monotonic() - host.head_heard_at,
        ))  # fmt: skip

    def _keep_program(self) -> None:
        if self._kept:
            return
        host = self._host
        try:
            program, blobs = packing.describe(host.job, host.term, self._train)
            if write_program(host.store, host.job.name, program, blobs) and program.missing:
                host.note("program.partial", missing=list(program.missing))
        except OSError as error:  # of the working directory
            host.note("program.unavailable", error=repr(error))
        self._kept = True

    def _sweep(self) -> None:
        if not self._swept:
            sweep_leases(self._host.store, self._host.job.name, self._host.term)
            self._swept = True
