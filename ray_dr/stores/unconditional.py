"""A store without conditional writes, as safe as it can be made: look, put, wait, look again.

Such a server ignores `If-None-Match: *` and overwrites, or refuses it. Put-if-absent here finds a taken name by reading
it, and a writer that was faster by reading back what lies there SETTLE_S later: of several that looked at the same time
the last to put wins, and the others are told so. That holds as long as a put is through SETTLE_S after its look. A
writer that is slower than that can still overwrite a commit that another one believes in: so a job must not be run by
two supervisors at once, from two clusters, on such a store. A supervisor that was replaced stays fenced in any case,
since it finds the newer term when it looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from ray_dr.errors import AlreadyExists, NotFound
from ray_dr.stores.base import Buffer, Entry, Store, Traits

SETTLE_S = 0.2

GUARANTEE = (
    "it has no conditional writes: of two supervisors that write at the same moment both could believe to own the job; "
    "run it from one cluster at a time, or use a store with conditional writes (AWS S3, Ceph without versioning, a "
    "directory)"
)
"""What is left, in words, after the store's name."""


class Unconditional:
    """`inner` with put-if-absent done by hand; everything else passes. `settle` waits SETTLE_S."""

    def __init__(self, inner: Store, *, settle: Callable[[float], None] = time.sleep) -> None:
        self._inner = inner
        self._settle = settle

    @property
    def traits(self) -> Traits:
        return replace(self._inner.traits, conditional_put=False)

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        if not if_absent:
            self._inner.put(key, data)
            return
        if self._there(key) is not None:
            raise AlreadyExists("the name is taken", key=key)
        self._inner.put(key, data)
        self._settle(SETTLE_S)
        if self._there(key) != bytes(data):
            raise AlreadyExists("another writer took the name at the same time", key=key)

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        return self._inner.get(key, start=start, size=size)

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        self._inner.readinto(key, into, start=start)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def _there(self, key: str) -> bytes | None:
        try:
            return self._inner.get(key)
        except NotFound:
            return None
