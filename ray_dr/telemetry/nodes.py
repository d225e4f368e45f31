"""What is held against machines, in a store, for all jobs of it.

    nodes/<machine>/<milliseconds:015d>-<digest>.json     one charge or pardon, never changed

An entry's name follows from what it says: writers have nothing to race for, the same thing told twice is one object, and
no conditional put is needed. What is older than FORGOTTEN_S has faded to nothing and is removed, and so is what a machine
has beyond its newest ENTRIES_MOST: that is the bound, for each machine seen in that time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable

from ray_dr.errors import NotFound
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.nodes import Charge, Entry
from ray_dr.stores.base import Store

PREFIX = "nodes/"
ENTRIES_MOST = 32
FORGOTTEN_S = 70 * 86400.0
NAME_CHARS = 120

_KEY = re.compile(rf"^{PREFIX}([^/]+)/(\d{{15}})-[0-9a-f]{{16}}\.json$")


def machine_name(host: str, instance: str = "") -> str:
    """A machine's name as it can stand in an object's: other characters become dashes."""
    name = re.sub(r"[^a-zA-Z0-9._=-]|\.(?=\.)", "-", f"{host}.{instance}" if instance else host)[:NAME_CHARS]
    return name if re.match(r"[a-zA-Z0-9]", name) else f"x{name}"


def key_of(entry: Entry) -> str:
    """Where an entry lies."""
    told = f"{entry.job} {entry.incident}" if isinstance(entry, Charge) else "pardon"
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    return f"{PREFIX}{entry.machine}/{max(0, round(entry.at * 1000)):015d}-{digest}.json"


class NodeBook:
    """Reads and adds to what is held against machines. Every method may raise StoreError. For one thread.

    clock   UTC seconds
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self._read: dict[str, Entry | None] = {}

    def entries(self) -> tuple[Entry, ...]:
        """All that counts; what was read once is not read again. What can't be understood (written by a newer version, or
        damaged) is left out: it is held against nobody."""
        keys = [entry.key for entry in self._store.list(PREFIX)]
        kept = self._tidy(keys)
        self._read = {key: self._read[key] if key in self._read else self._get(key) for key in kept}
        return tuple(entry for entry in self._read.values() if entry is not None)

    def add(self, entry: Entry) -> None:
        """Durable when it returns."""
        self._store.put(key_of(entry), json.dumps(to_json(entry, tagged=True)).encode())

    def _get(self, key: str) -> Entry | None:
        try:
            entry: Entry = from_json(Entry, json.loads(self._store.get(key)))
        except (NotFound, ValueError, TypeError, KeyError):
            return None
        return entry if key_of(entry) == key else None

    def _tidy(self, keys: list[str]) -> list[str]:
        """Remove what no longer counts; the rest."""
        named: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for key in keys:
            if (found := _KEY.match(key)) is not None:
                named[found[1]].append((found[2], key))
        oldest = f"{max(0, round((self._clock() - FORGOTTEN_S) * 1000)):015d}"
        kept = {key for each in named.values() for at, key in sorted(each)[-ENTRIES_MOST:] if at >= oldest}
        for each in named.values():
            for _, key in each:
                if key not in kept:
                    self._store.delete(key)
        return [key for key in keys if key in kept]
