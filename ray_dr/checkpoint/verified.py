"""Hashing ahead: while a group forms anew, the agent looks through what the node's memory holds of its version.

A hash of every byte takes four times as long as its copy. Between the decision to restore a version and the moment
a worker asks for it, the group forms and the program builds its model: the hashing is done in that time, once per node,
and the worker then copies what was found good without hashing it again.

What is promised: every chunk that a worker takes on this word was hashed after `begin`, hence after the failure, in
the very memory that it is copied from. What is not: a bit that flips in the window between that and the copy (as long as
the program takes to ask, seconds mostly) is not found here. Chunks that are not named good are hashed by the
worker after it has copied them, and a bad one is read from another copy.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from blake3 import blake3

from ray_dr.checkpoint.vault import Holding, Vault
from ray_dr.errors import NotFound
from ray_dr.model.checkpoint import Chunk, VersionId

WAIT_S = 10.0
"""Who asks is answered after so long: before it gives this memory up and reads from elsewhere."""


@dataclass(slots=True, eq=False)
class _Look:
    """A holding that is looked through: chunks nobody has taken yet, how many are being hashed, and those found good."""

    holding: Holding
    todo: deque[Chunk]
    under_way: int = 0
    good: dict[int, str] = field(default_factory=dict)


class Verified:
    """Thread-safe. Knows which chunks in this node's memory were found good since the last `begin`."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._changed = threading.Condition()
        self._looks: tuple[_Look, ...] = ()

    def begin(self, version: VersionId | None) -> None:
        """Forget what was found, and look through all parts of `version`, each in a thread; returns at once."""
        self.stop()
        looks = []
        for held in self._vault.held():
            if held.version != version:
                continue
            try:
                holding = self._vault.read(held.version, held.rank)
            except NotFound:
                continue  # given up in this very moment
            assert holding.part is not None, "only sealed parts are read"
            looks.append(_Look(holding, deque(holding.part.chunks)))
        with self._changed:
            self._looks = tuple(looks)
        for look in looks:
            threading.Thread(target=self._look_through, args=(look,), name="verify", daemon=True).start()

    def good(self, holding: Holding) -> dict[int, str]:
        """Place -> id of the chunks of a holding found good since `begin`: all of them were looked at, the calling thread
        helps, or as many as WAIT_S allows (the rest is hashed by who reads it).

        Empty for what `begin` did not name: nothing is hashed for it here.
        """
        with self._changed:
            look = next((look for look in self._looks if look.holding is holding), None)
        if look is None:
            return {}
        until = time.monotonic() + WAIT_S
        self._hash(look, until)
        with self._changed:
            self._changed.wait_for(lambda: not look.under_way, max(0.0, until - time.monotonic()))
            return dict(look.good)

    def stop(self) -> None:
        """Look through nothing more, and forget."""
        with self._changed:
            looks, self._looks = self._looks, ()
            for look in looks:
                look.todo.clear()

    def _look_through(self, look: _Look) -> None:
        """All of a holding, which was read for this."""
        try:
            self._hash(look)
        finally:
            self._vault.done(look.holding)

    def _hash(self, look: _Look, until: float = math.inf) -> None:
        """Take chunks of a look until none is left, or until then (monotonic seconds)."""
        while time.monotonic() < until and (chunk := self._take(look)) is not None:
            found = ""
            try:
                found = blake3(look.holding.view[chunk.at : chunk.at + chunk.size], max_threads=1).hexdigest()
            finally:
                with self._changed:
                    look.under_way -= 1
                    if found == chunk.id:
                        look.good[chunk.at] = chunk.id
                    self._changed.notify_all()

    def _take(self, look: _Look) -> Chunk | None:
        with self._changed:
            if not look.todo:
                return None
            look.under_way += 1
            return look.todo.popleft()
