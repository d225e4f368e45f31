"""What a simulated worker says when it leaves a broken step, and whether it still has a whole state then."""

from __future__ import annotations

import random

from ray_dr.model.events import WorkerRaised, WorkerStopped
from ray_dr.simulator.clock import Clock
from ray_dr.simulator.swarm import Swarm
from ray_dr.simulator.things import Worker
from ray_dr.simulator.training import Doing


class LastWords:
    """Of the workers of one world."""

    def __init__(self, clock: Clock, swarm: Swarm, dice: random.Random) -> None:
        self._clock, self._swarm, self._dice = clock, swarm, dice

    def collateral(self, worker: Worker) -> WorkerRaised:
        """It left because a collective broke."""
        error = "RuntimeError: connection closed by peer"
        return WorkerRaised(self._clock.now, worker.id, worker.attempt, error, True, self._done(worker),
                            stands_at=self._stands_at(worker), twins=self._twins(worker))  # fmt: skip

    def aborted(self, worker: Worker) -> WorkerStopped:
        """It left because it was told to."""
        return WorkerStopped(self._clock.now, worker.id, worker.attempt, self._done(worker), self._stands_at(worker),
                             self._twins(worker))  # fmt: skip

    def _done(self, worker: Worker) -> int:
        assert worker.run is not None, "it was in it"
        return worker.run.steps(self._clock.now)

    def _stands_at(self, worker: Worker) -> int:
        """After which step what it still has is whole; -1: after none."""
        assert worker.run is not None, "it was in it"
        whole = worker.run.doing is Doing.BROKEN and worker.run.rate == 0.0 and not self._tears()
        return worker.run.steps(self._clock.now) if whole else -1

    def _tears(self) -> bool:
        return self._swarm.torn >= 1.0 or (self._swarm.torn > 0.0 and self._dice.random() < self._swarm.torn)

    def _twins(self, worker: Worker) -> tuple[int, ...]:
        return () if self._swarm.twins else (worker.rank,)
