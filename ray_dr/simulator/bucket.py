"""The simulated store: committed versions, the lease's term, and how far the journal knows of attempts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.recovery import Rollback
from ray_dr.simulator.breach import must

KEPT = 8


@dataclass(slots=True)
class Bucket:
    """`down`: how many outages it has now. `attempt`: the newest one that the journal's copy in the store tells of."""

    down: int = 0
    slow: float = 1.0
    committed: list[VersionId] = field(default_factory=list)
    term: int = 0
    attempt: int = 0
    rollbacks: tuple[Rollback, ...] = ()
    """As the journal's copy tells of them."""

    @property
    def newest(self) -> VersionId | None:
        """What can be restored from here."""
        return self.committed[-1] if self.committed else None

    def take_term(self) -> int:
        """A new supervisor's."""
        self.term += 1
        return self.term

    def commit(self, version: VersionId, term: int) -> bool:
        """Commit; False when a newer supervisor owns the job, or has a newer version here."""
        if term != self.term:
            return False
        if self.newest is not None and version <= self.newest:
            return version == self.newest
        self.committed.append(version)
        must(self.committed == sorted(self.committed), "I4: the head only grows")
        del self.committed[:-KEPT]
        return True
