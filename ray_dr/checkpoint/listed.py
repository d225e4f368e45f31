"""A copy in a store that is asked for nothing before it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ray_dr.checkpoint.reader import Kind, StoreSource
from ray_dr.errors import CheckpointError, NotFound, StoreError


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
    _failed: StoreError | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        return self.url

    def opened(self) -> StoreSource:
        """The copy. Raises NotFound when there is no whole part list, StoreError when the store is away: also later, without
        looking again, for whoever wants many chunks must not wait for a store that is away as many times."""
        with self._lock:
            if self._opened is None and self._failed is None:
                try:
                    self._opened = self.open()
                except StoreError as error:
                    self._failed = error
                except CheckpointError as error:
                    self._failed = NotFound(str(error))
            if self._opened is None:
                assert self._failed is not None, "one or the other"
                raise self._failed
            return self._opened

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Fill `into` from the stream at `start`."""
        self.opened().read(rank, start, into)
