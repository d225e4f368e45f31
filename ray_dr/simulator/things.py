"""What the simulated cluster is made of: nodes, their agents, and workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Event

if TYPE_CHECKING:
    from ray_dr.simulator.host import Supervisor
    from ray_dr.simulator.training import Run, Version

OUTBOX_MAX = 64
"""Messages that a node's agent keeps for a next supervisor; real ones keep more, of steps."""


@dataclass(slots=True, eq=False)
class Node:
    """One life of a machine. `frozen`, `cut` (from all), `unheard` (by the supervisor only): how many such troubles it has.

    later   what reaches it when it is well again
    """

    id: str
    machine: int
    rack: int
    alive: bool = True
    frozen: int = 0
    cut: int = 0
    unheard: int = 0
    slow: float = 1.0
    agents: list[Agent] = field(default_factory=list)
    workers: dict[str, Worker] = field(default_factory=dict)
    later: list[tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)
    troubled_at: float = math.inf
    announced: bool = False
    """Somebody said that it would be taken away."""

    @property
    def works(self) -> bool:
        """Its processes run, and others reach them."""
        return self.alive and not self.frozen and not self.cut

    @property
    def answers(self) -> bool:
        """The supervisor reaches it."""
        return self.alive and not self.frozen and not self.cut and not self.unheard


@dataclass(slots=True, eq=False)
class Agent:
    """`gone_at`: since when it can neither give nor take copies. It holds what was saved after `begun_at`, and `kept`."""

    node: Node
    alive: bool = True
    gone_at: float = math.inf
    watcher: Supervisor | None = None
    outbox: list[tuple[float, Message]] = field(default_factory=list)
    sent_at: float = 0.0
    begun_at: float = -math.inf
    kept: VersionId | None = None

    def holds(self, version: Version) -> bool:
        """Whether what it had of a version was not dropped for an attempt that began from another one."""
        return version.done_at > self.begun_at or version.id == self.kept

    def begin(self, at: float, keep: Version | None) -> None:
        """All but one version goes."""
        self.kept = keep.id if keep is not None and self.holds(keep) else None
        self.begun_at = at


@dataclass(frozen=True, slots=True)
class Lost:
    """What an agent says when a worker's connection closed."""

    worker: str


Message = Event | Lost


@dataclass(slots=True, eq=False)
class Worker:
    """A worker process. `inside`: in `train`, for `attempt`; `hung`: it does nothing any more, and leaves nothing.

    refused   an attempt that it was told to leave before it had been sent there
    """

    id: str
    node: Node
    agent: Agent
    ready_at: float
    ready: bool = False
    alive: bool = True
    attempt: int = 0
    inside: bool = False
    hung: bool = False
    refused: int = 0
    rank: int = -1
    run: Run | None = None
