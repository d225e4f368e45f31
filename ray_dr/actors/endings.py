"""How a process that is not our child ended: asked of the kernel, within a few milliseconds of its end.

A process descriptor opened while it lived tells its exit status once its parent has fetched it (Linux 6.15 and newer: the ioctl
PIDFD_GET_INFO of pidfd(2)); until then /proc shows it as a zombie, with its status. On older kernels, where neither was seen in
time, nobody knows. Whether the kernel's memory killer struck is told by counters, of this control group and of the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

WAIT_S = 0.02
"""So long the news of an end may wait for how it came about."""
POLL_S = 0.001
INFO = struct.Struct("=QQ11Ii")
INFO_EXIT = 1 << 3
GET_INFO = 3 << 30 | INFO.size << 16 | 0xFF << 8 | 11
STATUS_FIELD = 52 - 3
"""In /proc/<pid>/stat, counted behind the name; proc(5)."""
COUNTED_S, COUNTS_KEPT = 5.0, 4
"""Memory kills are counted that often; one of the last COUNTS_KEPT times that may be the process's."""
UNKNOWN = "its connection closed"


@dataclass(frozen=True, slots=True)
class Ending:
    """In words, and whether the kernel ended it for the memory it used."""

    how: str
    oom: bool = False


class Endings:
    """The processes of a node's workers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[int, int]] = {}
        self._kills: deque[tuple[float, tuple[int, ...]]] = deque([(time.monotonic(), _kills())], maxlen=COUNTS_KEPT)

    def watch(self, worker: str, pid: int) -> None:
        """A worker has come up. One that has ended already is never known."""
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            with self._lock:
                self._open[worker] = descriptor, pid
        self.count()

    def count(self) -> None:
        """Time passes: look at the counters when it is due."""
        now = time.monotonic()
        with self._lock:
            if now - self._kills[-1][0] >= COUNTED_S:
                self._kills.append((now, _kills()))

    def of(self, worker: str) -> Ending:
        """How a worker's process ended, whose connection has closed. Waits for it a little."""
        with self._lock:
            found = self._open.pop(worker, None)
        if found is None:
            return Ending(UNKNOWN)
        descriptor, pid = found
        try:
            end = time.monotonic() + WAIT_S
            while (status := _status(descriptor, pid)) is None and time.monotonic() < end:
                time.sleep(POLL_S)
        finally:
            os.close(descriptor)
        return self._told(status)

    def close(self) -> None:
        """Watch nobody any more."""
        with self._lock:
            for descriptor, _ in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _told(self, status: int | None) -> Ending:
        if status is None:
            return Ending(UNKNOWN)
        if not os.WIFSIGNALED(status):
            return Ending(f"it exited with status {os.WEXITSTATUS(status)}")
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else "unnamed"
        how = f"it was ended by signal {number} ({name})"
        if number != signal.SIGKILL:
            return Ending(how)
        with self._lock:
            before = self._kills[0][1]
        struck = any(now > then for now, then in zip(_kills(), before, strict=True))
        return Ending(f"{how}, and the kernel ended a process for want of memory meanwhile" if struck else how, struck)


def _status(descriptor: int, pid: int) -> int | None:
    """The wait status of a process that has ended; None: it has not, or it can't be known."""
    with contextlib.suppress(OSError):
        asked = bytearray(INFO.pack(INFO_EXIT, *(0,) * 13))
        fcntl.ioctl(descriptor, GET_INFO, asked)
        mask, *_, status = INFO.unpack(asked)
        if mask & INFO_EXIT:
            return int(status)
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] == "Z":
            return int(fields[STATUS_FIELD])
    return None


def _kills() -> tuple[int, ...]:
    """How many processes the kernel has ended for want of memory: of this control group, on this machine."""
    group = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = next((line[3:] for line in lines if line.startswith("0::")), "")
    return _counter(Path(f"/sys/fs/cgroup{group}/memory.events")), _counter(Path("/proc/vmstat"))


def _counter(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
