"""Nodes examined when they come: beside everything else, so that nothing waits for it; only one that is bad is given up.

    came > short examination > doubts beside the others' figures? > long examination > still? > given up, and avoided

Figures of one node may only make sense when more nodes have theirs, so each new one has all judged again that have not been
examined at length.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_dr.actors import cluster
from ray_dr.actors.sensing import short, write_down
from ray_dr.detection.preflight import Doubt, doubts, verdict
from ray_dr.model import codec
from ray_dr.model.preflight import Figures
from ray_dr.model.signal import FaultKind, Finding, Subject

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

THREADS = 4
EXAMINED_S, CLOCK_S = 60.0, 5.0
ASKED_CLOCK = 3


class Preflight:
    """Thread-safe. Does nothing when the job's owner wants none."""

    def __init__(self, host: Host) -> None:
        self._host, self._wanted = host, host.job.detection.preflight
        self._lock = threading.Lock()
        self._handles: dict[str, tuple[Any, str]] = {}
        self._figures: dict[str, Figures] = {}
        self._at_length: set[str] = set()
        self._pool = ThreadPoolExecutor(THREADS, "preflight")

    def came(self, node: str, handle: Any, address: str) -> None:
        """A node's agent is up."""
        if not self._wanted:
            return
        with self._lock:
            self._handles[node] = handle, address
            self._at_length.discard(node)
        self._submit(node, (), long=False)

    def went(self, node: str) -> None:
        """A node is lost or given back."""
        with self._lock:
            self._handles.pop(node, None)
            self._figures.pop(node, None)

    def close(self) -> None:
        """Examine nobody any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, node: str, before: tuple[Doubt, ...], *, long: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the job is over
            self._pool.submit(self._guarded, node, before, long)

    def _guarded(self, node: str, before: tuple[Doubt, ...], long: bool) -> None:
        try:
            self._examine(node, before, long)
        except Exception as error:  # a node that is lost meanwhile, or an agent of another version
            if node in self._handles:
                self._host.note("preflight.failed", node=node, error=repr(error))

    def _examine(self, node: str, before: tuple[Doubt, ...], long: bool) -> None:
        handle, _ = self._handles[node]
        (answer,) = cluster.gather([handle.examine.remote(self._peer_of(node, -1 if long else 1), long)], EXAMINED_S)
        if isinstance(answer, Exception):
            raise answer
        offset_s, error_s = _offset(handle)
        figures = replace(codec.from_json(Figures, answer), offset_s=offset_s, offset_error_s=error_s)
        with self._lock:
            if node not in self._handles:
                return
            self._figures[node] = figures
            known = tuple(self._figures.values())
        fields = {key: value for key, value in codec.to_json(figures).items() if key != "node"}
        self._host.note("node.examined", node=node, long=long, **fields)
        if long:
            self._conclude(node, verdict(before, doubts(figures, known)))
        else:
            self._doubt(known)

    def _doubt(self, known: tuple[Figures, ...]) -> None:
        for one in known:
            found = doubts(one, known)
            with self._lock:
                if not found or one.node in self._at_length:
                    continue
                self._at_length.add(one.node)
            self._submit(one.node, found, long=True)

    def _conclude(self, node: str, why: str) -> None:
        if not why:
            return
        evidence = f"node {short(node)} was found bad when it came: {why}"
        now = time.monotonic()
        write_down(self._host, Finding("preflight", FaultKind.PREFLIGHT, (Subject(short(node)),), now, now, evidence))
        self._host.machines.condemn(node, FaultKind.PREFLIGHT, why)
        self._host.perform.lose_node(node, evidence)

    def _peer_of(self, node: str, shift: int) -> str:
        """The address of the node so many after this one; empty when there is no other. The second look is along another
        line, as the fault may be at its other end."""
        with self._lock:
            names = sorted(self._handles)
            other = names[(names.index(node) + shift) % len(names)] if node in names else node
            return self._handles[other][1] if other != node else ""


def _offset(handle: Any) -> tuple[float | None, float]:
    """How far a node's clock is ahead of this one's, and how far that may be off, in seconds: by the quickest answer."""
    best: tuple[float | None, float] = None, float("inf")
    for _ in range(ASKED_CLOCK):
        asked_at, begun = time.time(), time.monotonic()
        (said,) = cluster.gather([handle.clock.remote()], CLOCK_S)
        error_s = (time.monotonic() - begun) / 2
        if isinstance(said, float) and error_s < best[1]:
            best = said - asked_at - error_s, error_s
    return best if best[0] is not None else (None, 0.0)
