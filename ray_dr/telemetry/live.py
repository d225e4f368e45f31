"""What is going on right now: the newest word about the saves on their way, kept by the supervisor, never in the journal.

    jobs/<job>/live.json    overwritten while saves are under way, so that `ray-dr status` sees them without the cluster

It is for eyes only: nothing decides by it, and a copy that is old or missing costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ray_dr.errors import NotFound, StoreError
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.upload import Saving, Upload
from ray_dr.stores.base import Store

WRITE_S = 2.0
"""The object in the store is written at most this often."""
KEPT = 2
"""Versions whose parts are remembered: the one on its way, and one more while a slow rank is still with it."""


@dataclass(frozen=True, slots=True)
class LiveView:
    """`saving` is on its way (None: nothing is); `saved` was the last to arrive. `at`: UTC seconds of the supervisor."""

    at: float
    term: int
    saving: Saving | None = None
    saved: Saving | None = None


def live_key(job: str) -> str:
    """Where it lies."""
    return f"jobs/{job}/live.json"


def read_live(store: Store, job: str) -> LiveView | None:
    """What the supervisor last told; None when it told nothing, or not in this form. Raises StoreError."""
    try:
        view: LiveView = from_json(LiveView, json.loads(store.get(live_key(job))))
    except (NotFound, ValueError, TypeError):
        return None
    return view


def gather(parts: Iterable[Upload]) -> Saving:
    """One version, from what was heard of its parts; at least one."""
    told = tuple(parts)
    return Saving(
        told[0].version, told[0].world, len(told), sum(each.outcome == "stored" for each in told),
        sum(each.size for each in told), sum(each.done for each in told), sum(each.sent for each in told),
        min(each.begun_at for each in told), max(each.at for each in told),
        any(each.outcome == "failed" for each in told),
    )  # fmt: skip


class Live:
    """The supervisor's view of saves, and its copy in the store, written by a thread of its own. Thread-safe.

    clock   UTC seconds
    """

    def __init__(self, store: Store, job: str, term: int, clock: Callable[[], float], write_s: float = WRITE_S) -> None:
        self._store, self._job, self._term, self._clock = store, job, term, clock
        self._write_s = write_s
        self._changed = threading.Condition()
        self._parts: dict[VersionId, dict[int, Upload]] = {}
        self._stored: dict[VersionId, set[int]] = {}
        self._saved: Saving | None = None
        self._dirty = self._closing = False
        threading.Thread(target=self._run, name=f"live-{job}", daemon=True).start()

    def heard(self, upload: Upload) -> None:
        """An agent's newest word about one part."""
        with self._changed:
            if self._saved is not None and upload.version <= self._saved.version:
                return  # said again to somebody new
            self._parts.setdefault(upload.version, {})[upload.rank] = upload
            stored = self._stored.setdefault(upload.version, set())
            stored.discard(upload.rank)
            if upload.outcome == "stored":
                stored.add(upload.rank)
            if len(stored) == upload.world:
                self._saved = gather(self._parts[upload.version].values())
                self._forget(version for version in self._parts if version <= upload.version)
            self._forget(sorted(self._parts)[:-KEPT])
            self._tell()

    def begin(self) -> None:
        """A new attempt: what was on its way with lost nodes will not arrive."""
        with self._changed:
            self._forget(self._parts)
            self._tell()

    def view(self) -> LiveView:
        """How it stands."""
        with self._changed:
            saving = gather(self._parts[max(self._parts)].values()) if self._parts else None
            return LiveView(self._clock(), self._term, None if saving and saving.failed else saving, self._saved)

    def close(self) -> None:
        """Write what is new, and then no more. The object stays, and says what was saved last."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _tell(self) -> None:
        self._dirty = True
        self._changed.notify_all()

    def _forget(self, versions: Iterable[VersionId]) -> None:
        for version in tuple(versions):
            del self._parts[version], self._stored[version]

    def _run(self) -> None:
        while self._wait():
            with contextlib.suppress(StoreError):  # the journal tells of a store that is away
                self._store.put(live_key(self._job), json.dumps(to_json(self.view())).encode())
            with self._changed:
                self._changed.wait_for(lambda: self._closing, self._write_s)

    def _wait(self) -> bool:
        """Until there is something to write; False when it was the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._dirty or self._closing)
            dirty, self._dirty = self._dirty, False
            return dirty
