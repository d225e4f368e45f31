"""Records of the journal: all that happened to a job, in order. Everything shown to anybody is a fold over these.

`at` is UTC seconds of the supervisor that wrote the record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ray_dr.model.actions import Action
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.events import Event
from ray_dr.model.recovery import State


class Where(StrEnum):
    """How far a part or a version has come. A version counts in a place when every one of its parts does."""

    MEMORY = "memory"
    """Sealed (hashed) in the shared memory of its own node's agent."""
    PEER = "peer"
    """Another node's agent holds a verified copy; for a version: as many as there are to be of each part."""
    DISK = "disk"
    """Synced to the local disk of its own node."""
    STORE = "store"
    """Every chunk and the part list are in the store; for a version: committed."""
    SECOND = "second"
    """The same in the second store."""


@dataclass(frozen=True, slots=True)
class JobOpened:
    """A supervisor took the job. `spec`: what it runs with, as JSON."""

    at: float
    term: int
    job: str
    spec: dict[str, object]
    python: str = ""
    ray: str = ""


@dataclass(frozen=True, slots=True)
class DataOpened:
    """What the program trains on: enough to recompute which sample belongs to which position."""

    at: float
    attempt: int
    samples: int
    global_batch: int
    micro_batches: int
    seed: int
    shuffle: bool
    left_out: tuple[tuple[int, int], ...] = ()
    """Windows [first, last) of positions in the sample stream that are quarantined: no step uses them."""


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision of the job's machine. `seq` counts from 1 within a term."""

    at: float
    term: int
    seq: int
    event: Event
    state: State
    actions: tuple[Action, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """One rank did one step."""

    at: float
    record: StepRecord


@dataclass(frozen=True, slots=True)
class PartSaved:
    """One rank's part reached a place. `node`: who holds it there; for a store, who put it. `took_s`: from the step's end, less
    what training stood for it, which is `stall_s`."""

    at: float
    version: VersionId
    rank: int
    world: int
    where: Where
    node: str
    size: int
    took_s: float
    stall_s: float = 0.0
    sent: int = 0
    """Bytes that really moved: chunks the place already had are not sent again."""


@dataclass(frozen=True, slots=True)
class VersionSaved:
    """Every part of a version is in a place; for the store: its manifest is committed."""

    at: float
    version: VersionId
    where: Where
    size: int


@dataclass(frozen=True, slots=True)
class Restored:
    """One rank took its state back. `sources`: bytes read per kind of source (memory, peer, disk, store, second); "shared":
    another rank of the node had fetched them from a peer or a store already, so that they count once per node there."""

    at: float
    attempt: int
    rank: int
    version: VersionId
    sources: dict[str, int]
    fetch_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class Marked:
    """A moment of an attempt worth a place on the timeline: "group_formed", "train_entered", "first_step", ..."""

    at: float
    attempt: int
    name: str
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Noted:
    """Something the operator should know that is no decision: a store in trouble, a corrupt copy, a stopped writer.

    name   dotted and stable, e.g. "store.unavailable", "chunk.corrupt", "chunk.healed", "journal.lagging"
    """

    at: float
    name: str
    fields: dict[str, object] = field(default_factory=dict)


Record = JobOpened | DataOpened | Decided | Stepped | PartSaved | VersionSaved | Restored | Marked | Noted
