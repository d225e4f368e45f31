"""Shared memory of the node's agent that this process has mapped to restore from.

A process that maps a pool meets each of its pages for the first time: 0.06 s per gigabyte, as much as the copy itself, and
0.03 s to let go of them. Neither is left to the restore: what it will read is mapped, and every page of it met,
while the group forms and the program builds its model; and it is let go in a thread afterwards.

A mapping keeps the agent's memory alive, so it lives for one restore: `drop` follows when that is through, when the attempt is
aborted, and when another begins. Until then the agent holds the version for the restore's sake.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterable

from ray_dr.checkpoint.memory import attach, meet
from ray_dr.errors import StoreError
from ray_dr.model.attempt import Assignment
from ray_dr.stores.peer import PeerReader

AHEAD_BYTES = 8 * 2**30
"""No further part is met ahead once so much of this node's memory has been: 0.8 s of a core, and 16 MB of page tables."""


class Pools:
    """Thread-safe. One per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._views: dict[tuple[str, int], memoryview] = {}

    def ahead(self, a: Assignment, token: bytes, *, own: str = "") -> threading.Thread:
        """Map in a thread, which is given, what the attempt's restore is likely to read of this node's memory.

        own    path of a pool that this process has mapped already
        """
        with self._lock:
            self._stop.set()
            stop = self._stop = threading.Event()
        thread = threading.Thread(target=self._ahead, args=(a, token, own, stop), name="map-ahead", daemon=True)
        thread.start()
        return thread

    def view(self, path: str, size: int) -> memoryview:
        """The first `size` bytes of the pool at `path`: as it was mapped ahead, or mapped now. Raises OSError when the agent
        is gone, or this is no pool of that size."""
        with self._lock:
            return self._view(path, size)

    def stop(self) -> None:
        """Map and meet nothing more ahead: the restore begins."""
        self._stop.set()

    def drop(self) -> None:
        """Let go of all of it, in a thread; what is still being read goes with its last reader."""
        with self._lock:
            self._stop.set()
            views = list(self._views.values())
            self._views.clear()
        if views:
            threading.Thread(target=_unmap, args=(views,), name="unmap", daemon=True).start()

    def _view(self, path: str, size: int) -> memoryview:
        key = path, os.stat(path).st_ino  # the agent may have used the descriptor again for another pool
        found = self._views.get(key)
        if found is None or len(found) < size:
            found = self._views[key] = attach(path, size, populate=False)
        return found[:size]

    def _ahead(self, a: Assignment, token: bytes, own: str, stop: threading.Event) -> None:
        if a.origin is None:
            return
        reader, left = PeerReader(a.agent, token), AHEAD_BYTES
        try:
            for rank in nearest(a.rank, a.world, a.origin.world):
                if left <= 0 or stop.is_set():
                    return
                if a.agent not in a.origin.holders.get(str(rank), ()):
                    continue
                place = reader.where(a.origin.version, rank)
                if place is None or place.path == own:
                    continue
                with self._lock:
                    if stop.is_set():
                        return
                    whole = self._view(place.path, place.offset + place.size)
                meet(whole[place.offset :], stop)
                left -= place.size
        except (StoreError, OSError):
            return  # the restore meets it too, and has other copies
        finally:
            reader.close()


def nearest(rank: int, world: int, parts: int) -> Iterable[int]:
    """The ranks of a version of so many parts, those first whose place among them is nearest to `rank`'s in its world."""
    return sorted(range(parts), key=lambda part: abs((part + 0.5) / parts - (rank + 0.5) / world))


def _unmap(views: list[memoryview]) -> None:
    while views:
        view = views.pop()
        owner = view.obj
        with contextlib.suppress(BufferError):  # it is still being read
            view.release()
            if isinstance(owner, mmap.mmap):
                owner.close()  # unlike the end of its last reference, this lets other threads of Python run meanwhile
