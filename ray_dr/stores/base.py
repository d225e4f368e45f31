"""The Store protocol: five methods, and traits that say what the store guarantees.

Names ("keys") match KEY_PATTERN; values are bytes. Every method is synchronous, thread-safe and raises only
`ray_dr.errors.StoreError` and its children. A store never retries and never caches: that is what the wrappers are for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ray_dr.errors import StoreError

KEY_PATTERN = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9._=-]*(/[a-zA-Z0-9][a-zA-Z0-9._=-]*)*$")
KEY_MAX_CHARS = 512

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Traits:
    """What a store promises. `conditional_put`: put-if-absent has exactly one winner, also in a race."""

    conditional_put: bool
    durable: bool
    shared: bool
    """Readable from every node of the cluster."""
    parts_from_bytes: int = 0
    """An unconditional put of this size or more goes up in parts; 0: always in one piece."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object: its key and its size in bytes."""

    key: str
    size: int


class Store(Protocol):
    """Names to bytes, durable when the call returns."""

    @property
    def traits(self) -> Traits: ...

    @property
    def url(self) -> str:
        """Where it is, without credentials."""

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """Store `data` whole or not at all. With `if_absent`, raise AlreadyExists when the name is taken."""

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Bytes [start, start + size) of an object, or to its end; fewer if it is shorter. Raises NotFound."""

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        """Fill `into` with the object's bytes from `start`, without a copy. Raises NotFound, ObjectTooShort."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects whose key starts with `prefix`, in ascending order of key."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when there is none."""


def check_key(key: str) -> str:
    """`key` itself. Raises StoreError when it could not be a name in every store."""
    if len(key) > KEY_MAX_CHARS or not KEY_PATTERN.match(key) or ".." in key:
        expected = f"pattern {KEY_PATTERN.pattern}, {KEY_MAX_CHARS} characters"
        raise StoreError(f"not a valid object name ({expected})", key=key)
    return key
