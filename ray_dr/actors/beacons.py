"""The beacons of a node's workers, as its agent reads them: without a word from the workers, which may hang."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from time import monotonic

from ray_dr.checkpoint.memory import attach
from ray_dr.model import beacon, codec
from ray_dr.model.signal import Beacon
from ray_dr.stores.wire import Header

EVERY_S = 0.1
"""A report carries them at most that often."""


class Beacons:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[memoryview, int]] = {}

    def add(self, worker: str, path: str, pid: int) -> None:
        """A worker has come up. One that can't be read, because it has just ended, is left out."""
        with contextlib.suppress(OSError):
            view = attach(path, beacon.SIZE, name=beacon.MEMFD_NAME)
            with self._lock:
                self._known[worker] = view, pid

    def drop(self, worker: str) -> None:
        """A worker has ended."""
        with self._lock:
            self._known.pop(worker, None)

    def read(self) -> tuple[Beacon, ...]:
        """Where each worker is now."""
        with self._lock:
            known = tuple(self._known.values())
        found = (beacon.read(view, stopped=_stopped(pid)) for view, pid in known)
        return tuple(each for each in found if each is not None)

    def listener(self) -> Callable[[], list[Header]]:
        """What tells the news to one who watches: a sign of life of this node, with all beacons."""
        told_at = 0.0

        def news() -> list[Header]:
            nonlocal told_at
            now = monotonic()
            if now - told_at < EVERY_S:
                return []
            told_at = now
            return [{"beat": now, "beacons": codec.to_json(self.read())}]

        return news


def _stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP or a debugger."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
