"""A store in this process's memory: for tests, and for trying things out. Instances of one name share their objects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from ray_dr.errors import AlreadyExists, NotFound, ObjectTooShort
from ray_dr.stores.base import Buffer, Entry, Traits, check_key


@dataclass(slots=True)
class _Space:
    objects: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_SPACES: dict[str, _Space] = {}
_SPACES_LOCK = threading.Lock()


class MemoryStore:
    """Objects in a dictionary. Without a name the store is private to the instance."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._space = _named_space(name) if name else _Space()

    @property
    def traits(self) -> Traits:
        return Traits(conditional_put=True, durable=False, shared=False)

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        check_key(key)
        value = bytes(data)
        with self._space.lock:
            if if_absent and key in self._space.objects:
                raise AlreadyExists("the name is taken", key=key)
            self._space.objects[key] = value

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        value = self._value(key)
        return value[start:] if size is None else value[start : start + size]

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        piece = memoryview(self._value(key))[start : start + into.nbytes]
        if piece.nbytes < into.nbytes:
            raise ObjectTooShort(f"{into.nbytes} bytes asked for at {start}, {piece.nbytes} there", key=key)
        into.cast("B")[:] = piece

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._space.lock:
            found = sorted((key, len(value)) for key, value in self._space.objects.items() if key.startswith(prefix))
        return iter([Entry(key, size) for key, size in found])

    def delete(self, key: str) -> None:
        with self._space.lock:
            self._space.objects.pop(check_key(key), None)

    def _value(self, key: str) -> bytes:
        with self._space.lock:
            value = self._space.objects.get(check_key(key))
        if value is None:
            raise NotFound("no such object", key=key)
        return value


def forget(name: str) -> None:
    """Drop the objects of `memory://name`: a later store of this name starts empty."""
    with _SPACES_LOCK:
        _SPACES.pop(name, None)


def _named_space(name: str) -> _Space:
    with _SPACES_LOCK:
        return _SPACES.setdefault(name, _Space())
