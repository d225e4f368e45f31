"""What a job's machine is told, as a closed union of frozen values. Words and units: `model.recovery`."""

from __future__ import annotations

from dataclasses import dataclass

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.recovery import Group
from ray_dr.model.signal import FaultKind


@dataclass(frozen=True, slots=True)
class Opened:
    """A supervisor began with term `term`; `attempt` is the highest one any record or any agent knows of."""

    at: float
    term: int
    attempt: int


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node's agent is up. `workers`: those that live there already, because they outlived a supervisor."""

    at: float
    node: str
    workers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node's agent is gone: closed connection, silence, or Ray's word."""

    at: float
    node: str
    how: str
    step: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker's process is up, its imports done; it waits for a group."""

    at: float
    worker: str
    node: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is gone."""

    at: float
    worker: str
    node: str
    how: str
    step: int


@dataclass(frozen=True, slots=True)
class Hung:
    """Detection is sure that the group waits for these members of it, in vain; all of them: for nobody. `how`: in words."""

    at: float
    attempt: int
    workers: tuple[str, ...]
    how: str
    step: int


@dataclass(frozen=True, slots=True)
class WorkerRaised:
    """`train` left by an exception. `collateral`: a collective failed because of somebody else.

    error   the normalised exception: type and message without addresses, ranks and numbers
    """

    at: float
    worker: str
    attempt: int
    error: str
    collateral: bool
    step: int
    unreadable: bool = False
    """No copy of the version that was to be restored is whole: an older one has to do."""


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """A worker left `train` on request: at the common step of a stop, or out of a broken step (`step`: its last)."""

    at: float
    worker: str
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class WorkerReturned:
    """`train` returned."""

    at: float
    worker: str
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class FirstStep:
    """All members have done the attempt's first step."""

    at: float
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class InventoryTaken:
    """The newest version that can be restored from what is alive or stored; None: there is none.

    ask   of the TakeInventory this answers. 0: the host has one search at a time, so it is the newest
    """

    at: float
    incident: int
    newest: VersionId | None
    ask: int = 0


@dataclass(frozen=True, slots=True)
class Saved:
    """The version at `step` is committed to every store."""

    at: float
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody asks the job to stop and to keep its state, within `within_s` seconds."""

    at: float
    within_s: float
    why: str


@dataclass(frozen=True, slots=True)
class FencedOff:
    """A supervisor of a newer term owns the job."""

    at: float
    newest_term: int


@dataclass(frozen=True, slots=True)
class ActionFailed:
    """The host could not carry out an action: its class name, and the node, worker or attempt it was about, if any."""

    at: float
    action: str
    error: str
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Adopted:
    """Found by a new supervisor: these members are running this attempt, and `step` is the last they have done.

    NodeJoined and WorkerReady of those alive come before it.
    """

    at: float
    group: Group
    step: int


@dataclass(frozen=True, slots=True)
class Diagnosed:
    """What all that was found so far comes to: the root cause of an incident, which may not be what was seen first.

    incident   its number; only the newest one's matters
    cause      its kind; subject: the node or worker it struck, empty where that is not known
    """

    at: float
    incident: int
    cause: FaultKind
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes."""

    at: float


Event = (
    Opened | NodeJoined | NodeLost | WorkerReady | WorkerLost | Hung | WorkerRaised | WorkerStopped | WorkerReturned
    | FirstStep | InventoryTaken | Saved | StopRequested | FencedOff | ActionFailed | Adopted | Tick
    | Diagnosed
)  # fmt: skip
