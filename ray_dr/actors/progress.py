"""How far the current attempt has come: a fold over step records, each counted once however often it is heard of."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_dr.model.checkpoint import StepRecord

REMEMBERED = 4096


@dataclass(slots=True)
class Progress:
    """`began` is the step the attempt started from; `rank_steps` each rank's newest step done."""

    attempt: int = 0
    world: int = 0
    began: int = 0
    rank_steps: dict[int, int] = field(default_factory=dict)
    _seen: dict[tuple[int, int, int], None] = field(default_factory=dict)

    def begin(self, attempt: int, world: int, step: int) -> None:
        """A new attempt of `world` ranks goes on from `step`."""
        self.attempt, self.world, self.began = attempt, world, step
        self.rank_steps = {}

    def add(self, record: StepRecord) -> bool:
        """Count a record; False when it was heard of before."""
        key = (record.attempt, record.rank, record.step)
        if key in self._seen:
            return False
        self._seen[key] = None
        if len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]
        if record.attempt == self.attempt:
            self.rank_steps[record.rank] = max(record.step, self.rank_steps.get(record.rank, 0))
        return True

    @property
    def step(self) -> int:
        """Steps done by every rank."""
        if len(self.rank_steps) < self.world or not self.world:
            return self.began
        return min(self.rank_steps.values())

    @property
    def newest(self) -> int:
        """Steps done by the foremost rank."""
        return max(self.rank_steps.values(), default=self.began)
