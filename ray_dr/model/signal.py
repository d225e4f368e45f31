"""What is said about a job's health, as values: *samples* from workers, agents and the cluster, *findings* from detectors.

`at` is the host's monotonic time, in seconds, when it took the sample in: one clock, so that two samples can be compared.
Times of a node's own (`clock`, `since`) are only ever compared with each other. Names are those of model.recovery: a
worker is `<node>/<slot>.<incarnation>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

# ------------------------------------------------------------------------------------------------------------- samples


class WorkerPhase(StrEnum):
    """What a rank is doing, as its beacon says."""

    SETUP = "setup"
    """Everything before the first step: joining, building, restoring."""
    LOAD = "load"
    COMPUTE = "compute"
    COLLECTIVE = "collective"
    COMPILE = "compile"
    SAVE = "save"
    EVAL = "eval"
    DONE = "done"
    """`train` has returned."""


IN_STEP = (WorkerPhase.LOAD, WorkerPhase.COMPUTE, WorkerPhase.COLLECTIVE)


@dataclass(frozen=True, slots=True)
class Beacon:
    """Where a rank is. Written by the worker at each change of phase, read by its agent.

    step         steps done in all, so also the number, from 0, of the one it is in
    collective   how many collectives it has entered in this attempt
    since        when it entered the phase, or was last seen to enter a collective, in monotonic seconds of its node
    stopped      its process is stopped (state T in /proc), as the agent sees it
    """

    rank: int
    attempt: int
    step: int
    phase: WorkerPhase
    collective: int
    since: float
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """An agent that this one asks for a sign of life; `age_s` seconds ago it last answered (or was first asked)."""

    node: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Exit:
    """A worker's process has ended. `oom`: the kernel's or Ray's memory watch ended it."""

    worker: str
    how: str
    oom: bool = False


@dataclass(frozen=True, slots=True)
class StoreSeen:
    """How a place fared since the last report: requests that succeeded and that failed, each try counted.

    refused    why the last request failed, where trying again can't help: full, denied; empty: it did not
    oldest_s   how long the oldest request under way has been waiting
    """

    place: str
    done: int = 0
    failed: int = 0
    refused: str = ""
    oldest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Notice:
    """The node is to be taken away in `left_s` seconds (inf: nobody said when). `source`: who says so."""

    source: str
    left_s: float
    certain: bool = True
    """Else it is only likelier than usual: worth knowing, and nothing is done about it."""


@dataclass(frozen=True, slots=True)
class Xid:
    """An error of a GPU in the kernel's log."""

    gpu: int
    code: int


@dataclass(frozen=True, slots=True)
class Report:
    """A node agent's report. `clock`: its node's monotonic seconds when it was made."""

    at: float
    node: str
    clock: float
    beacons: tuple[Beacon, ...] = ()
    peers: tuple[Peer, ...] = ()
    exits: tuple[Exit, ...] = ()
    stores: tuple[StoreSeen, ...] = ()
    notices: tuple[Notice, ...] = ()
    xids: tuple[Xid, ...] = ()


@dataclass(frozen=True, slots=True)
class StepDone:
    """One rank is through with one step.

    took_s      the whole step on this rank
    arrived_s   from the step's beginning until it entered its first collective; None: unknown
    loss, grad_norm   as the rank logged them, the loss before it is averaged over ranks
    finite      whether loss and gradients are numbers
    digest      of the parameters after the step; empty where it is not due
    """

    at: float
    rank: int
    attempt: int
    step: int
    took_s: float
    arrived_s: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    finite: bool = True
    digest: str = ""
    shard: str = ""
    """What the digest is of: only digests of the same are compared."""
    skipped: str = ""
    """Why all ranks skipped the optimizers' step (`StepRecord.skipped`)."""


@dataclass(frozen=True, slots=True)
class WholeStep:
    """A step that every rank has done: `ranks` in rank order. Put together from StepDone."""

    at: float
    attempt: int
    step: int
    ranks: tuple[StepDone, ...]


@dataclass(frozen=True, slots=True)
class Raised:
    """`train` left by an exception. `collateral`: by its type, the echo of somebody else's end."""

    at: float
    worker: str
    attempt: int
    step: int
    error: str
    collateral: bool


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection to a node's agent ended, and nobody had asked for it."""

    at: float
    node: str


@dataclass(frozen=True, slots=True)
class RayWord:
    """What Ray says of a node."""

    at: float
    node: str
    alive: bool


@dataclass(frozen=True, slots=True)
class Noticed:
    """That a node will be taken away: of its agent, from its cloud; or of Ray. No sign of life of the node."""

    at: float
    node: str
    notices: tuple[Notice, ...]


@dataclass(frozen=True, slots=True)
class Released:
    """A node or a worker ends because the host wants it to: its silence and its end are no news."""

    at: float
    name: str


@dataclass(frozen=True, slots=True)
class Member:
    """A rank of the group. Ranks of the same `shard` hold the same parameters."""

    rank: int
    worker: str
    shard: int = 0


@dataclass(frozen=True, slots=True)
class Formed:
    """A new attempt begins, with these members, in rank order; without members: the group is no more."""

    at: float
    attempt: int
    members: tuple[Member, ...]

    def subject(self, rank: int) -> Subject:
        """The rank, with its worker and node."""
        worker = self.members[rank].worker
        return Subject(node_of(worker), worker, rank)

    def subject_of(self, worker: str) -> Subject:
        """The worker, with its node, and its rank if it has one."""
        rank = next((member.rank for member in self.members if member.worker == worker), None)
        return Subject(node_of(worker), worker, rank)


@dataclass(frozen=True, slots=True)
class Now:
    """Time passes: to be said every 0.1 s or so, for silence is noticed only then."""

    at: float


Sample = Report | StepDone | WholeStep | Raised | Closed | RayWord | Released | Formed | Now | Noticed


def node_of(worker: str) -> str:
    """The node a worker lives on."""
    return worker.rpartition("/")[0]


# ------------------------------------------------------------------------------------------------------------ findings


class FaultKind(StrEnum):
    """What can be wrong. What each means is in detection.taxonomy."""

    PREEMPTION = "preemption"
    NODE_GONE = "node_gone"
    NODE_FROZEN = "node_frozen"
    NETWORK_CUT = "network_cut"
    GPU_FAULT = "gpu_fault"
    GPU_MISUSE = "gpu_misuse"
    OUT_OF_MEMORY = "out_of_memory"
    PROCESS_GONE = "process_gone"
    EXCEPTION = "exception"
    PROGRAM_ERROR = "program_error"
    """An exception that came back at the same step: never found, only concluded."""
    COLLECTIVE_BROKEN = "collective_broken"
    HANG = "hang"
    STRAGGLER = "straggler"
    NON_FINITE = "non_finite"
    LOSS_SPIKE = "loss_spike"
    CORRUPTION = "corruption"
    STORAGE = "storage"
    PREFLIGHT = "preflight"
    """A node that was found bad when it came."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a finding is about: a node, or a worker on it, with its rank if it has one."""

    node: str
    worker: str = ""
    rank: int | None = None

    def __str__(self) -> str:
        if self.rank is not None:
            return f"rank {self.rank}"
        return f"worker {self.worker}" if self.worker else f"node {self.node}"


Stage = Literal["suspected", "confirmed", "withdrawn"]
"""A suspicion is worth a look, not an action. A confirmed finding may be acted on. What is withdrawn was one of either."""
Severity = Literal["warning", "critical"]
"""With a warning training goes on, and there is time; what is critical stops it, or makes what it does worthless."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a detector says.

    subjects   whom it names; several, when it can't tell which of them, or when it is all of them
    at         when it was found; since: when it began, as far as known (both the host's monotonic seconds)
    evidence   in words, with `numbers` behind them
    step       the step it happened in, if that is known; error: a normalised exception, if it is about one
    shadow     the detector is on trial: nobody acts on this
    """

    detector: str
    kind: FaultKind
    subjects: tuple[Subject, ...]
    at: float
    since: float
    evidence: str
    severity: Severity = "critical"
    stage: Stage = "confirmed"
    numbers: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None
    error: str = ""
    shadow: bool = False
