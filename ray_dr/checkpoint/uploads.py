"""What a node agent tells of its saves on their way to the store: the newest state of each rank's, never a backlog."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from ray_dr.model.checkpoint import Part
from ray_dr.model.upload import Upload

TOLD_S = 1.0
"""A save that goes on is told of this often; its beginning and its end at once."""


class Uploads:
    """The parts that are under way or were last. Thread-safe. `clock`: UTC seconds; `monotonic`: seconds."""

    def __init__(
        self, *, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._monotonic = clock, monotonic
        self._lock = threading.Lock()
        self._newest: dict[int, tuple[int, Upload]] = {}  # rank -> number of the change, what it made
        self._changes = self._urgent = 0

    @contextlib.contextmanager
    def under_way(self, part: Part) -> Iterator[UnderWay]:
        """A part sets out for the store; it replaces what was told of the same rank before. An error ends it as failed."""
        now = self._clock()
        with self._lock:
            self._change(Upload(part.version, part.rank, part.world, part.size, 0, 0, now, now), urgent=True)
        try:
            yield UnderWay(self, part)
        except BaseException:
            self._add(part, 0, 0, "failed")
            raise
        self._add(part, 0, 0, "stored")

    def listener(self) -> Callable[[], tuple[Upload, ...]]:
        """For one who listens: each call gives what changed since the last that gave anything, at first everything; nothing as
        long as that is too soon."""
        seen, told_at = 0, float("-inf")

        def news() -> tuple[Upload, ...]:
            nonlocal seen, told_at
            now = self._monotonic()
            with self._lock:
                if self._changes == seen or (now - told_at < TOLD_S and self._urgent <= seen):
                    return ()
                told = tuple(upload for number, upload in self._newest.values() if number > seen)
                seen, told_at = self._changes, now
            return told

        return news

    def _add(self, part: Part, done: int, sent: int, outcome: str = "") -> None:
        """More of a part is there; nothing is told of one that was replaced meanwhile."""
        with self._lock:
            known = self._newest[part.rank][1]
            if known.version != part.version or known.outcome:
                return
            at = max(known.at, self._clock())
            now = replace(known, done=known.done + done, sent=known.sent + sent, at=at, outcome=outcome)
            self._change(now, urgent=bool(outcome))

    def _change(self, upload: Upload, *, urgent: bool) -> None:
        self._changes += 1
        self._newest[upload.rank] = self._changes, upload
        self._urgent = self._changes if urgent else self._urgent


class UnderWay:
    """One part on its way. Thread-safe."""

    def __init__(self, uploads: Uploads, part: Part) -> None:
        self._uploads, self._part = uploads, part

    def put(self, done: int, sent: int) -> None:
        """So many more bytes are there, of which `sent` moved."""
        self._uploads._add(self._part, done, sent)
