"""A copy in a store that is asked for nothing before it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ray_dr.checkpoint.reader import Kind, StoreSource
from ray_dr.errors import CheckpointError, NotFound


@dataclass(slots=True, eq=False)
class ListedSource:
    """A part's stream in the store at `url`, behind a nearer copy: not even its part list is read before a chunk of it is
    wanted. Thread-safe.

    open    reads the part list
    """

    url: str
    kind: Kind
    open: Callable[[], StoreSource]
    _opened: StoreSource | None = None
    _gone: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        return self.url

    def opened(self) -> StoreSource:
        """The copy. Raises NotFound when there is no whole part list (then it is not looked for again), StoreError when the
        store is away."""
        with self._lock:
            if self._opened is None and not self._gone:
                try:
                    self._opened = self.open()
                except (NotFound, CheckpointError) as error:
                    self._gone = str(error)
            if self._opened is None:
                raise NotFound(self._gone)
            return self._opened

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Fill `into` from the stream at `start`."""
        self.opened().read(rank, start, into)
