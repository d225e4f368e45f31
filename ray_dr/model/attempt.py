"""What one worker is told about the attempt it is to take part in."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_dr.model.checkpoint import PartRef, VersionId
from ray_dr.model.job import Health


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a restore comes from.

    holders   per part's rank, addresses of the node agents that hold it in memory, nearest first
    disks     the same of those that have it on their local disk
    parts     the committed part lists, when the version is in the store
    second    the same for the second store
    """

    version: VersionId
    world: int
    holders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[PartRef, ...] = ()
    disks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    second: tuple[PartRef, ...] = ()


@dataclass(frozen=True, slots=True)
class Cadence:
    """From step `from_step` on, save to memory at every multiple of `memory_every` steps, and also to the store, the local
    disk and the second store at every multiple of theirs (0: not until told again). See `checkpoint.cadence.Rhythm`."""

    from_step: int
    memory_every: int
    store_every: int
    disk_every: int = 0
    second_every: int = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """A worker's place in an attempt.

    rendezvous    host:port of rank 0's store
    agent         address of the node agent beside this worker
    copy_to       addresses of the agents that keep copies of this rank's parts
    terms         the term in each place that parts go to (by its name, `model.journal.Where`)
    disk          the part of the local disk that is this life's of the job: (URL, name there); empty without such a tier
    second_url    the second store; empty without one
    world_most    the most workers the job can ever have: the default number of micro-batches when deterministic
    local_world   how many of the attempt's workers are on this one's node
    left_out      windows of the sample stream that are quarantined (`model.data.Order`)
    """

    job: str
    attempt: int
    worker: str
    rank: int
    world: int
    local_rank: int
    rendezvous: str
    agent: str
    copy_to: tuple[str, ...]
    origin: Origin | None
    cadence: Cadence
    backend: str
    deterministic: bool
    seed: int
    world_most: int
    store_url: str
    settings: dict[str, str | int | float | bool] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)
    disk: tuple[str, ...] = ()
    second_url: str = ""
    local_world: int = 1
    left_out: tuple[tuple[int, int], ...] = ()
    health: Health = field(default_factory=Health)

    @property
    def origin_wanting(self) -> bool:
        """Whether a store that this attempt may save to lacks the version it goes on from. The same for every rank."""
        if self.origin is None:
            return False
        return not self.origin.parts or ("second" in self.terms and not self.origin.second)
