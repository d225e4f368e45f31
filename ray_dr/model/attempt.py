"""What one worker is told about the attempt it is to take part in."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_dr.model.checkpoint import PartRef, VersionId


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a restore comes from.

    holders   per part's rank, addresses of the node agents that hold it in memory, nearest first
    parts     the committed part lists, when the version is in the store
    """

    version: VersionId
    world: int
    holders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[PartRef, ...] = ()


@dataclass(frozen=True, slots=True)
class Cadence:
    """From step `from_step` on, save to memory at every multiple of `memory_every` steps and also to the store at every
    multiple of `store_every` (0: not until told again)."""

    from_step: int
    memory_every: int
    store_every: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """A worker's place in an attempt.

    rendezvous    host:port of rank 0's store
    agent         address of the node agent beside this worker
    copy_to       address of the agent that keeps a copy of this rank's parts; empty: none
    world_most    the most workers the job can ever have: the default number of micro-batches when deterministic
    """

    job: str
    attempt: int
    term: int
    worker: str
    rank: int
    world: int
    local_rank: int
    rendezvous: str
    agent: str
    copy_to: str
    origin: Origin | None
    cadence: Cadence
    backend: str
    deterministic: bool
    seed: int
    world_most: int
    store_url: str
    settings: dict[str, str | int | float | bool] = field(default_factory=dict)
