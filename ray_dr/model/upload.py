"""A save on its way to a store, as it is told while it lasts."""

from __future__ import annotations

from dataclasses import dataclass

from ray_dr.model.checkpoint import VersionId


@dataclass(frozen=True, slots=True)
class Upload:
    """One rank's part on its way. Times in UTC seconds of its node, sizes in bytes.

    done     bytes that are there, also those that the store had already; `sent`: those that really moved
    outcome  empty while it lasts; then "stored" or "failed"
    """

    version: VersionId
    rank: int
    world: int
    size: int
    done: int
    sent: int
    begun_at: float
    at: float
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class Saving:
    """A version on its way: all its parts that were heard of. `parts` of `world` have begun, `stored` of them are through.

    begun_at, at   when the first part began and when one was last heard of
    failed         a part was given up: the version will not be complete
    """

    version: VersionId
    world: int
    parts: int
    stored: int
    size: int
    done: int
    sent: int
    begun_at: float
    at: float
    failed: bool = False

    @property
    def bytes_per_s(self) -> float:
        """Bytes that moved, by the time since the first part began; 0 before there is any."""
        return self.sent / (self.at - self.begun_at) if self.at > self.begun_at else 0.0
