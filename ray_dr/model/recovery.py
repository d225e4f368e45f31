"""The vocabulary of one job's life: its states, as a closed union of frozen values.

`model.events` has what comes in, `model.actions` what goes out.

Identifiers are strings given by the host: a *node* is Ray's node id, a *worker* is `<node>/<slot>.<incarnation>`; a
worker's identifier is never used again. `at` is UTC seconds and comes in with the event: nothing in here reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from ray_dr.model.budget import NOTHING_COUNTED, Ledger
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.departure import Departure
from ray_dr.model.ladder import UNMEASURED, Measured, Plan
from ray_dr.model.signal import FaultKind

# ---------------------------------------------------------------------------------------------------- parts of a state


class FailureKind(StrEnum):
    """What broke. The type checker lists the places to extend."""

    NODE_LOST = "node_lost"
    WORKER_LOST = "worker_lost"
    GROUP_BROKEN = "group_broken"
    """A collective failed and nobody is known to have died."""
    USER_ERROR = "user_error"
    START_TIMEOUT = "start_timeout"
    HANG = "hang"
    """A worker lives and does not get on, and the others wait for it."""
    PREEMPTED = "preempted"
    """A node was lost that had been announced to leave: never charged to a failure budget."""
    DIVERGED = "diverged"
    """Training itself went wrong, on every rank alike: numbers that are not finite, or a loss that does not come back."""
    CORRUPTION = "corruption"
    """Parameters that should be the same on several ranks are not: a machine computes or remembers wrongly."""


@dataclass(frozen=True, slots=True)
class Incident:
    """One failure, from detection to resolution. `subject` is the node or worker it began with."""

    number: int
    kind: FailureKind
    subject: str
    at: float
    step: int
    """The last step known to be done when it happened."""
    detail: str = ""
    cause: FaultKind | None = None
    """What the root cause is, as far as it is known: what a failure counts as goes by it (`detection.taxonomy`)."""
    root: str = ""
    """The node or worker that detection names, where that is not `subject`."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node with a live agent, and its workers.

    starting       how many processes were asked for and are not ready yet
    ready          those that are up, idle or in the group, in the order they came up
    lost           those that ended, newest last, a bounded number: a late or repeated word about one is recognised
    failed_starts  processes in a row that ended before they were ready
    """

    id: str
    starting: int = 0
    ready: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    failed_starts: int = 0
    asked_at: float = 0.0
    """When the newest of its processes was asked for, UTC seconds."""


@dataclass(frozen=True, slots=True)
class Group:
    """The workers of one attempt in rank order, and the version they began from (None: from scratch)."""

    attempt: int
    members: tuple[str, ...]
    restore: VersionId | None


@dataclass(frozen=True, slots=True)
class Policy:
    """What the job's owner allows; see model.job for the meaning and the units."""

    nodes_min: int
    nodes_max: int
    min_nodes_to_run: int
    workers_per_node: int
    unwind_s: float
    start_s: float
    settle_s: float
    attempts_without_progress: int
    standby_nodes: int = 0
    standby_processes: int = 0
    rescue_s: float = 10.0
    """Survivors have this long to stage the state they stand at: 10 GB each, into memory nobody has touched before."""
    rollbacks: int = 3
    measured: Measured = UNMEASURED
    """What the parts of a recovery took so far: it says which way out is the shortest, never whether one is right."""

    @property
    def nodes_wanted(self) -> int:
        """Nodes in all: those of the largest group, and those that stand by."""
        return self.nodes_max + self.standby_nodes

    @property
    def has_standbys(self) -> bool:
        """Whether more workers are wanted than a group takes."""
        return self.standby_nodes + self.standby_processes > 0


@dataclass(frozen=True, slots=True)
class Rollback:
    """What is known since a job had to go back: no version of attempts up to `attempt` and of steps beyond `good` is of any use.

    last      the last step that was done then
    batch     samples in a step that are not to come again (those of the steps from the version restored to `last`); 0: none
              are left out, as after a corruption, or where the program's samples are not ray_dr's
    base      the step it went on from, known once the next group is formed
    scratch   the attempt itself had begun from scratch: that is something to go back to
    why       in words
    """

    attempt: int
    good: int
    last: int
    batch: int = 0
    base: int | None = None
    scratch: bool = False
    diverged: bool = True
    why: str = ""


# -------------------------------------------------------------------------------------------------------------- states


@dataclass(frozen=True, slots=True)
class Queued:
    """Waits for `nodes_min` nodes to have all their workers ready, for the first time in this supervisor's life.

    asked   the nodes are there, and the host looks for what there is to restore (incident 0)
    """

    asked: bool = False


@dataclass(frozen=True, slots=True)
class Starting:
    """A group is forming: processes join, restore and run their first step."""

    group: Group
    since: float


@dataclass(frozen=True, slots=True)
class Running:
    """Steps are being done."""

    group: Group


@dataclass(frozen=True, slots=True)
class Resizing:
    """The group was asked to stop at a common step, so that it can go on with other members and lose nothing."""

    group: Group
    stopped: tuple[str, ...]
    """Members that have stopped, so far."""
    since: float
    at_step: int | None = None
    """The common step, known once the first member has stopped."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A survivor of a broken attempt still has the state after `step` steps: its own rank's share, and those of its twins
    (none named: every rank's)."""

    worker: str
    step: int
    twins: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Recovering:
    """The group is broken: survivors leave the step, and the host looks for the newest complete version.

    unwinding   members that have not yet left the broken step
    found       None until the inventory is in; then the version to go on from ("scratch" when there is none)
    """

    incident: Incident
    unwinding: tuple[str, ...]
    found: VersionId | Literal["scratch"] | None
    since: float
    attempt: int = 0
    """The attempt that broke."""
    began: VersionId | None = None
    """What it had begun from."""
    standing: tuple[Standing, ...] = ()
    """Of those that have left it, the ones that still have a whole state."""
    rescue_until: float | None = None
    """They are staging it, and have time until then; 0.0: that is over, well or not."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """Fewer than `min_nodes_to_run` nodes: waits for capacity. The state lies in memory and in the store."""

    incident: Incident | None
    since: float
    asked: bool = False
    """Capacity is back, and the host looks for the newest version."""


@dataclass(frozen=True, slots=True)
class Draining:
    """Asked to stop: the group stops at a common step and saves everywhere before the job ends as drained.

    group     None when there is no group that could stop: then the newest version found is what gets saved
    saving    the version being saved, once it is known
    deadline  UTC seconds; then the job ends, saved or not
    suspends  nobody asked the job to end: its nodes leave, and then it waits for others
    """

    group: Group | None
    stopped: tuple[str, ...]
    deadline: float
    at_step: int | None = None
    saving: VersionId | None = None
    suspends: bool = False


@dataclass(frozen=True, slots=True)
class Finishing:
    """Every member's `train` returned; the last checkpoint is being committed."""

    group: Group
    since: float


@dataclass(frozen=True, slots=True)
class Finished:
    """Over, and well. `drained`: stopped on request, running it again goes on."""

    drained: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """Over, and not well. `resubmit`: whether running it again can help."""

    reason: str
    resubmit: bool


Phase = (
    Queued | Starting | Running | Resizing | Recovering | Suspended | Draining | Finishing | Finished | Failed
)


@dataclass(frozen=True, slots=True)
class State:
    """All that decisions about one job need to know.

    attempt      number of the newest group ever formed (0: none)
    step         newest step known to be done, ever
    failures     failed attempts in a row without a new step
    reached      `step` as it was when the last attempt failed: only going beyond it is progress
    first_cause  what the row of failures began with, in words
    last_error   normalised text and step of the last user error, to recognise the same one
    done         members of the current group whose `train` returned
    changed_at   when a worker last became ready or a node last came or went
    order        members of the newest group in rank order: who survives keeps this order
    asks         how often the host was asked for an inventory
    retry_at     when to ask again for what was refused or never answered (an inventory, nodes); None: nothing is open
    departures   of nodes of the job that will be taken away: no group is formed with them any more
    """

    phase: Phase
    nodes: tuple[Node, ...] = ()
    attempt: int = 0
    step: int = 0
    incidents: int = 0
    failures: int = 0
    last_error: tuple[str, int] | None = None
    done: tuple[str, ...] = ()
    changed_at: float = 0.0
    requested: int = 0
    """Nodes asked of the autoscaler and not all here yet; 0: nothing is asked."""
    order: tuple[str, ...] = ()
    reached: int = 0
    first_cause: str = ""
    asks: int = 0
    retry_at: float | None = None
    departures: tuple[Departure, ...] = ()
    rollbacks: tuple[Rollback, ...] = ()
    """How often the job had to go back to before something went wrong in training, oldest first: in its whole life."""
    ledger: Ledger = NOTHING_COUNTED
    not_before: float = 0.0
    """UTC seconds before which no next group forms, after attempts that came to nothing; 0: at once."""
    plan: Plan | None = None
    """The way out of the newest incident, from when it was chosen until the first step after it."""
