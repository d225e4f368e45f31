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
        self._newest: dict[int, Upload] = {}
        self._changed: set[int] = set()
        self._urgent = False
        self._told_at = 0.0

    @contextlib.contextmanager
    def under_way(self, part: Part) -> Iterator[UnderWay]:
        """A part sets out for the store; it replaces what was told of the same rank before. An error ends it as failed."""
        now = self._clock()
        self._tell(Upload(part.version, part.rank, part.world, part.size, 0, 0, now, now))
        try:
            yield UnderWay(self, part)
        except BaseException:
            self._add(part, 0, 0, "failed")
            raise
        self._add(part, 0, 0, "stored")

    def news(self) -> tuple[Upload, ...]:
        """What changed since the last call that gave anything; nothing as long as that is too soon."""
        now = self._monotonic()
        with self._lock:
            if not self._changed or (now - self._told_at < TOLD_S and not self._urgent):
                return ()
            told = tuple(self._newest[rank] for rank in sorted(self._changed))
            self._changed.clear()
            self._urgent, self._told_at = False, now
            return told

    def again(self) -> None:
        """Somebody new listens: everything is news."""
        with self._lock:
            self._changed, self._urgent = set(self._newest), bool(self._newest)

    def _tell(self, upload: Upload) -> None:
        with self._lock:
            self._newest[upload.rank] = upload
            self._changed.add(upload.rank)
            self._urgent = True

    def _add(self, part: Part, done: int, sent: int, outcome: str = "") -> None:
        """More of a part is there; nothing is told of one that was replaced meanwhile."""
        with self._lock:
            known = self._newest[part.rank]
            if known.version != part.version or known.outcome:
                return
            now = max(known.at, self._clock())
            self._newest[part.rank] = replace(
                known, done=known.done + done, sent=known.sent + sent, at=now, outcome=outcome
            )
            self._changed.add(part.rank)
            self._urgent |= bool(outcome)


class UnderWay:
    """One part on its way. Thread-safe."""

    def __init__(self, uploads: Uploads, part: Part) -> None:
        self._uploads, self._part = uploads, part

    def put(self, done: int, sent: int) -> None:
        """So many more bytes are there, of which `sent` moved."""
        self._uploads._add(self._part, done, sent)
