"""What a job's machine is told, as a closed union of frozen values. Words and units: `model.recovery`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.departure import Rates
from ray_dr.model.recovery import Group, Rollback
from ray_dr.model.signal import FaultKind


@dataclass(frozen=True, slots=True)
class Opened:
    """A supervisor began with term `term`; `attempt` is the highest one any record or any agent knows of."""

    at: float
    term: int
    attempt: int
    rollbacks: tuple[Rollback, ...] = ()


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
class NodeLeaving:
    """A node will be taken away at `deadline` (UTC seconds; inf: nobody said when). `how`: who says so; `rates`: how long what
    can be done until then takes."""

    at: float
    node: str
    deadline: float
    how: str
    rates: Rates = field(default_factory=Rates)


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
class Diverged:
    """Training went wrong at step `onset` and did not come back up to `step`, the last done. `batch`: samples per step that
    are ray_dr's to leave out, 0: none."""

    at: float
    attempt: int
    onset: int
    how: str
    step: int
    batch: int = 0


@dataclass(frozen=True, slots=True)
class Corrupted:
    """Replicas differ, and were the same after step `good`. `workers`: those that are wrong; none: nobody can tell which."""

    at: float
    attempt: int
    good: int
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
    stands_at: int = -1
    twins: tuple[int, ...] = ()
    """As in WorkerStopped."""


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """A worker left `train` on request: at the common step of a stop, or out of a broken step (`step`: its last).

    stands_at  the state it still has is that after so many whole steps; -1: there is none, or it may be torn
    twins      ranks whose parts of that state it has the bytes of; none named: of every rank
    """

    at: float
    worker: str
    attempt: int
    step: int
    stands_at: int = -1
    twins: tuple[int, ...] = ()


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

    NodeJoined and WorkerReady of those alive come before it. `left`: members that live and are out of `train` already, told
    when nobody is in it any more.
    """

    at: float
    group: Group
    step: int
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rescued:
    """The survivors of a broken attempt have staged the version at `step`, or not, for the reason in `failed`."""

    at: float
    attempt: int
    step: int
    failed: str = ""


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
    | FirstStep | InventoryTaken | Saved | StopRequested | FencedOff | ActionFailed | Adopted | Tick | Rescued | NodeLeaving
    | Diverged | Corrupted | Diagnosed
)  # fmt: skip
