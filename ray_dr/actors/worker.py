"""The worker process: a Ray actor around `train.session.Session`. It outlives the failures of others."""

from __future__ import annotations

import os
from typing import Any

import ray
import ray.cloudpickle

from ray_dr.model import codec
from ray_dr.model.attempt import Assignment, Cadence


class Worker:
    """Detached; ends when its agent does. `train` comes pickled from the driver, through Ray, never from storage."""

    def __init__(self, worker: str, agent: str, token: bytes, train: bytes, store_url: str) -> None:
        from ray_dr.train.session import Session  # torch is imported here, in the worker, and nowhere else

        host = ray.util.get_node_ip_address()
        self._worker = worker
        self._session = Session(worker, agent, token, host, ray.cloudpickle.loads(train), store_url)

    def describe(self) -> dict[str, Any]:
        """Identity, rendezvous address and what it is doing."""
        return {
            "worker": self._worker, "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(),
            "rendezvous": self._session.rendezvous, **self._session.status(),
            "reserves": bool(ray.get_runtime_context().get_assigned_resources()),
        }  # fmt: skip

    def start(self, assignment: Any) -> bool:
        """Begin an attempt (JSON of model.attempt.Assignment)."""
        return self._session.start(codec.from_json(Assignment, assignment))

    def abort(self, attempt: int) -> bool:
        """Leave a broken attempt."""
        return self._session.abort(attempt)

    def rescue(self, attempt: int, step: int, ranks: list[int], copy_to: list[str]) -> str:
        """Stage parts of the state that is left of a broken attempt; why not, in words."""
        return self._session.rescue(attempt, step, ranks, copy_to)

    def stop_at(self, attempt: int, step: int, everywhere: bool) -> int:
        """Stop after `step` steps; the answer is the steps done."""
        return self._session.stop_at(attempt, step, everywhere)

    def set_terms(self, attempt: int, terms: dict[str, int]) -> bool:
        """Save to these places from now on, in these terms."""
        return self._session.set_terms(attempt, terms)

    def set_keepers(self, attempt: int, addresses: list[str]) -> bool:
        """Have copies kept by these agents from now on."""
        return self._session.set_keepers(attempt, addresses)

    def set_cadence(self, attempt: int, cadence: Any) -> bool:
        """Save at other intervals."""
        return self._session.set_cadence(attempt, codec.from_json(Cadence, cadence))
