"""What a life cost: counted while it goes."""

from __future__ import annotations

from collections import Counter

from ray_dr.model.actions import Decision, KillWorker
from ray_dr.model.recovery import Group
from ray_dr.simulator.swarm import Swarm
from ray_dr.simulator.training import Run


class Tally:
    """`lost_steps`: done and done again. `found`: by which detector, how often; `false_alarms`: nodes taken for lost that were
    well. `met`: faults that took effect, by kind."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self.found: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.false_alarms = 0
        self.events = self.attempts = self.breaks_seen = self.closed = self.killed = self.lost_steps = self.worst_lost_steps = 0

    def decided(self, decision: Decision, now: float) -> None:
        """One more event."""
        self.events += 1
        self.killed += sum(isinstance(action, KillWorker) for action in decision.actions)

    def begins(self, group: Group, before: Run | None, now: float) -> None:
        """A group forms."""
        self.attempts += 1
        lost = before.steps(now) - (group.restore.step if group.restore else 0) if before is not None else 0
        self.lost_steps += max(0, lost)
        self.worst_lost_steps = max(self.worst_lost_steps, lost)

    def breaks(self, run: Run, now: float) -> None:
        """An attempt cannot go on."""
        self.breaks_seen += 1
