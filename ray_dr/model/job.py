"""A job as a value: what its `job.yaml` says, checked and in base units (seconds, bytes)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Workers:
    """The nodes a job wants.

    nodes_min .. nodes_max   it starts with at least the one and grows to the other
    min_nodes_to_run         after a loss it goes on with as few as this
    """

    nodes_min: int = 1
    nodes_max: int = 1
    min_nodes_to_run: int = 1
    per_node: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    standby_nodes: int = 0
    """Nodes beyond `nodes_max`, with all their workers up, that take the places of lost ones."""
    standby_processes: int = 0
    """Processes beyond `per_node` on each node of the group, that take the places of lost ones there."""


@dataclass(frozen=True, slots=True)
class Every:
    """How often: a number of steps, or of seconds, or "auto" (both None): as often as the overhead budget allows."""

    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryTier:
    """Shared memory of the node agents. `copies` counts the rank's own node: 3 means two more, on two other nodes, of other
    failure domains (see `recovery.replicas`) where there are any."""

    every: Every = Every()
    copies: int = 2


@dataclass(frozen=True, slots=True)
class DiskTier:
    """A directory on each node's own disk: survives the processes and a restart of the machine. `url` is a file store's,
    `keep_last` how many whole versions stay."""

    url: str
    every: Every = Every(seconds=10.0)
    keep_last: int = 2


@dataclass(frozen=True, slots=True)
class Keep:
    """Which committed checkpoints stay: those that any of the rules wants (`repository.retention` says how)."""

    last: int = 3
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    within_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreTier:
    """A store that outlives the nodes. `keep_...` say which committed checkpoints stay; `share_with` another job of the same
    store, whose chunks are not put again (`repository.sharing`)."""

    url: str
    every: Every = Every(seconds=30.0)
    keep_last: int = 3
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_within_s: float = 0.0
    share_with: str = ""

    @property
    def keep(self) -> Keep:
        """The rules as one value."""
        return Keep(self.keep_last, self.keep_hourly, self.keep_daily, self.keep_weekly, self.keep_within_s)


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a job deals with failure. Times in seconds.

    unwind_s       a surviving worker has this long to leave a broken step before its process is replaced
    start_s        a new attempt has this long until its first step before it counts as failed
    settle_s       after a node arrives, wait this long for others before growing
    attempts_without_progress   this many failed attempts in a row without a new step end the job
    """

    unwind_s: float = 15.0
    start_s: float = 300.0
    settle_s: float = 1.0
    attempts_without_progress: int = 5
    silent_s: float = 5.0
    """A node agent whose report is this old is taken for lost."""
    hang_s: float = 300.0
    """A worker that is sure to hang, with the others waiting for it, is ended after so long. Long, because an evaluation in
    the middle of a step that does not say so (`ctx.evaluating`) looks the same."""
    notices: tuple[str, ...] = ()
    """Who on each node is asked whether it will be taken away: aws, gcp, azure, file:/path. Ray's own drain is always heard."""


DETECTORS = (
    "process_gone", "node_gone", "node_frozen", "network_cut", "hang", "straggler", "non_finite", "loss_spike", "corruption",
    "preemption", "exceptions", "out_of_memory", "storage", "gpu",
)  # fmt: skip
"""Names of the detectors, as a job's spec says them."""


@dataclass(frozen=True, slots=True)
class Detecting:
    """How a job watches itself.

    shadow      detectors on trial: what they find is recorded and marked, and nobody acts on it
    off         detectors that are not asked at all
    preflight   whether a node is measured when it comes, and not kept if it is far worse than the others
    """

    shadow: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    preflight: bool = True


@dataclass(frozen=True, slots=True)
class Health:
    """What is done when training itself goes wrong.

    non_finite       gradients (or a logged loss) that are no numbers: all ranks skip the step, the job stops, or nobody looks
    skips_in_a_row   so many skipped steps one after the other are no accident any more
    spike            a loss that stays three times above its course for twenty steps: go back, or leave it be
    rollbacks        after so many returns to before such a thing, the next one ends the job
    check_every      steps between comparisons of the replicas' parameters; 0: they are not compared
    """

    non_finite: Literal["skip", "stop", "ignore"] = "skip"
    skips_in_a_row: int = 5
    spike: Literal["rollback", "ignore"] = "rollback"
    rollbacks: int = 3
    check_every: int = 100


@dataclass(frozen=True, slots=True)
class Job:
    """One training program's spec. `name` is what it resumes by."""

    name: str
    store: StoreTier
    workers: Workers = Workers()
    memory: MemoryTier = MemoryTier()
    recovery: Recovery = Recovery()
    deterministic: bool = False
    seed: int = 0
    overhead: float = 0.01
    """Share of a step's time that memory checkpoints may cost with `every: auto` (0..1)."""
    rpo_s: float = float("inf")
    """Recovery point objective: seconds of work that may be lost with all nodes. The store's interval is shortened to keep it."""
    disk: DiskTier | None = None
    second: StoreTier | None = None
    """Another store, in another place, with a commit log and retention of its own: what a job goes on from when the first
    one has lost everything. The first stays the root of trust, with journal and lease."""
    settings: dict[str, str | int | float | bool] = field(default_factory=dict)
    """The program's own values, as `ctx.settings`."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    detection: Detecting = Detecting()
    health: Health = field(default_factory=Health)
