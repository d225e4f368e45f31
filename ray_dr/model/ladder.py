"""The ways out of a failure, what is known of how long their parts take, and the way that was chosen, as values.

What they cost is predicted in `recovery.ladder`; the times are learned in `telemetry.phases`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Rung(StrEnum):
    """The ways, the smallest interference first."""

    SKIP = "skip"
    """The group stays; what one step came to is thrown away on all ranks."""
    REBUILD = "rebuild"
    """The same number of workers, all of whom were there before."""
    STANDBY = "standby"
    """Processes that are up and idle take the places of those lost."""
    PROCESS = "process"
    """Wait for processes that are starting on nodes of the job."""
    SPARE = "spare"
    """Start processes on nodes at hand that the job does not have yet."""
    SHRINK = "shrink"
    """Go on with fewer, and grow when the others come."""
    AUTOSCALE = "autoscale"
    """Wait for nodes that the autoscaler was asked for."""
    ROLLBACK = "rollback"
    """The newest version can't be used: an older one."""
    ELSEWHERE = "elsewhere"
    """Another cluster, from the store."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians of what this job's recoveries took, in seconds; what was never seen has the defaults.

    detect_s          from the failure until it was acted on
    unwind_s          until every survivor had left the broken step
    inventory_s       the search for the newest version
    form_s            until every member has met the others, restore_s: the state, fetched and loaded, on the slowest rank
    first_step_s      the rest, from the decision to form a group until every member has done a step
    stop_s            a planned stop, from the first member's leaving until the next group is formed
    process_start_s   a worker process, from being asked for until it is ready
    node_join_s       a node, from being asked for until its agent is up
    step_s            a step
    """

    detect_s: float = 0.1
    unwind_s: float = 0.1
    inventory_s: float = 0.05
    form_s: float = 0.1
    restore_s: float = 0.2
    first_step_s: float = 0.2
    stop_s: float = 0.1
    process_start_s: float = 5.0
    node_join_s: float = 60.0
    step_s: float = 1.0

    @property
    def begin_s(self) -> float:
        """From the decision to form a group until its first step is done."""
        return self.form_s + self.restore_s + self.first_step_s


UNMEASURED = Measured()


@dataclass(frozen=True, slots=True)
class Way:
    """One way out, with what it is expected to cost, in seconds.

    workers       that take part in the next step
    wait_s        until the group can form
    next_step_s   until the next step is done
    loss_s        of work at full size: time without steps, steps done again, time at reduced size until all are back, and the
                  interruptions that their coming back means
    """

    rung: Rung
    workers: int
    wait_s: float
    next_step_s: float
    loss_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The way that was chosen for an incident.

    at           when it was chosen, UTC seconds; wanted: how many workers make it whole
    besides      the best of the other ways
    hold_until   UTC seconds up to which workers that are about to be up are waited for; 0: nobody is
    """

    incident: int
    at: float
    wanted: int
    way: Way
    besides: Way | None = None
    hold_until: float = 0.0
