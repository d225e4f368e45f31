"""Agents as each other's witnesses: who asks whom, the small question, its answer, and since when none came.

The nodes stand in a ring in the order of their names, and each asks the next two twice a second, on a line and with a thread
for each: one that does not answer makes nobody else look silent. What is heard goes into the agent's report as it is; what it
means is for `detection.network_cut` and `detection.node_frozen`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from time import monotonic

from ray_dr.errors import StoreError
from ray_dr.model.signal import Peer
from ray_dr.stores.wire import Connection, connect

NEXT = 2
"""Each asks so many, and is asked by as many."""
ASK_S = 0.5
PATIENCE_S = 1.0
"""An answer, or a new line, is waited for so long; then the line is made anew."""


def answer(connection: Connection) -> None:
    """Answer every question on a line, until it breaks (StoreError)."""
    while True:
        connection.send({"here": True})
        connection.receive()


class Peers:
    """The peers one agent asks. Thread-safe."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}

    def ask(self, peers: Mapping[str, str]) -> None:
        """From now on these, by name, at their addresses; a line that stays goes on."""
        with self._lock:
            for name, line in tuple(self._lines.items()):
                if peers.get(name) != line.address:
                    self._lines.pop(name).close()
            for name, address in peers.items():
                if name not in self._lines:
                    self._lines[name] = _Line(address, self._token)

    def heard(self) -> tuple[Peer, ...]:
        """Each peer, and how long ago it last answered, or was first asked."""
        now = monotonic()
        with self._lock:
            return tuple(Peer(name, round(max(0.0, now - line.heard_at), 3)) for name, line in sorted(self._lines.items()))

    def close(self) -> None:
        """Ask nobody any more."""
        self.ask({})


class _Line:
    """One peer, asked by a thread of its own."""

    def __init__(self, address: str, token: bytes) -> None:
        self.address, self._token = address, token
        self.heard_at = monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._run, name="ask-peer", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def _run(self) -> None:
        connection: Connection | None = None
        while not self._over.is_set():
            try:
                connection = connection or self._open()
                connection.request({"op": "here"})
                self.heard_at = monotonic()
            except StoreError:
                if connection is not None:
                    connection.close()
                connection = None
            self._over.wait(ASK_S)
        if connection is not None:
            connection.close()

    def _open(self) -> Connection:
        connection = connect(self.address, self._token, timeout_s=PATIENCE_S)
        connection.timeout(PATIENCE_S)
        return connection


class Ring:
    """Tells each node whom to ask, and again only when that changes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[str, dict[str, str]] = {}

    def close_up(self, addresses: Mapping[str, str], tell: Callable[[str, dict[str, str]], None]) -> None:
        """These nodes are there, at these addresses: `tell(node, peers)` whomever it concerns."""
        with self._lock:
            names = sorted(addresses)
            for place, name in enumerate(names):
                peers = [names[(place + shift) % len(names)] for shift in range(1, min(NEXT + 1, len(names)))]
                asks = {peer: addresses[peer] for peer in peers}
                if self._told.get(name, {}) != asks:
                    self._told[name] = asks
                    tell(name, asks)
            for name in self._told.keys() - addresses.keys():
                del self._told[name]
