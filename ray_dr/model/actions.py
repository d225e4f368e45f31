"""What a job's machine has done, as a closed union of frozen values, and the decision that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray_dr.model.recovery import Group, State


@dataclass(frozen=True, slots=True)
class StartWorkers:
    """Start `count` worker processes on a node."""

    node: str
    count: int


@dataclass(frozen=True, slots=True)
class RequestNodes:
    """Ask the autoscaler to have `count` nodes for this job in all."""

    count: int


@dataclass(frozen=True, slots=True)
class ReleaseNode:
    """Give a node back: its agent and workers end."""

    node: str


@dataclass(frozen=True, slots=True)
class AbortGroup:
    """Unblock the members of an attempt: their collectives are aborted and `train` is left."""

    attempt: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KillWorker:
    """End a worker's process: it did not leave a broken step in time."""

    worker: str


@dataclass(frozen=True, slots=True)
class TakeInventory:
    """Find the newest version that can be restored. The answer repeats both numbers; a newer ask replaces an older."""

    incident: int
    ask: int = 0


@dataclass(frozen=True, slots=True)
class FormGroup:
    """Start an attempt."""

    group: Group


@dataclass(frozen=True, slots=True)
class StopGroup:
    """Ask the members to stop at a common step. `everywhere`: and to save to every store, not only to memory."""

    attempt: int
    everywhere: bool


@dataclass(frozen=True, slots=True)
class SaveFinal:
    """Commit the version the group stopped or ended at to every store."""

    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class CloseJob:
    """End every agent and worker, withdraw requests for nodes, record the outcome."""

    outcome: Literal["finished", "drained", "failed", "fenced"]


@dataclass(frozen=True, slots=True)
class Rescue:
    """Have survivors of a broken attempt stage the version at `step` that they stand at: `writers` has the worker that
    writes each rank's part."""

    attempt: int
    step: int
    writers: tuple[str, ...]


Action = (
    StartWorkers | RequestNodes | ReleaseNode | AbortGroup | KillWorker | TakeInventory | FormGroup | StopGroup
    | SaveFinal | CloseJob | Rescue
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows from an event: the next state, what to do, and why, in words."""

    state: State
    actions: tuple[Action, ...]
    reason: str
