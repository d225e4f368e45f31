"""What each kind of failure means for a job, as data.

charged     whether it counts against the budget of failures. What is announced, or what the job is not to blame for and can't
            repeat for ever, is not; everything else is bounded, by progress (recovery.budget)
resubmit    whether running the job again can help, once it is given up
exit_code   of `ray-dr run` when the job ends of it: 1 (running it again continues it) or 3 (do not resubmit)
remedy      what to try first, in words for `ray-dr why`

Sources: the classes are those of algorithms 13 and 14 (restart budgets, bad nodes) of the design; GPU codes are in xid.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ray_dr.model.signal import FaultKind

CONTINUES, DO_NOT_RESUBMIT = 1, 3


class Budget(StrEnum):
    """Which allowance a failure takes from."""

    FREE = "free"
    INFRASTRUCTURE = "of the infrastructure"
    PROGRAM = "of the program"
    UNKNOWN = "of unknown cause"


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of failure."""

    budget: Budget
    remedy: str
    resubmit: bool = True

    @property
    def charged(self) -> bool:
        """Whether it counts against the budget of failures."""
        return self.budget is not Budget.FREE

    @property
    def exit_code(self) -> int:
        """Exit status of a job that ends of it."""
        return CONTINUES if self.resubmit else DO_NOT_RESUBMIT


FAULTS: dict[FaultKind, Fault] = {
    FaultKind.PREEMPTION: Fault(
        Budget.FREE, "save what the time allows, move the node's shards to those that stay, and go on without it"
    ),
    FaultKind.NODE_GONE: Fault(
        Budget.INFRASTRUCTURE, "go on with the copies on other nodes; take another node, not this one again at once"
    ),
    FaultKind.NODE_FROZEN: Fault(
        Budget.INFRASTRUCTURE, "fence the node so that it can't come back into the group, then go on as if it were gone"
    ),
    FaultKind.NETWORK_CUT: Fault(
        Budget.INFRASTRUCTURE, "go on with the nodes that reach each other and the head; look at the cut node's network"
    ),
    FaultKind.GPU_FAULT: Fault(
        Budget.INFRASTRUCTURE, "leave the node; reset its GPU, or have it replaced, before it is used again"
    ),
    FaultKind.GPU_MISUSE: Fault(
        Budget.PROGRAM, "restart the process; if it comes again run the step under compute-sanitizer"
    ),
    FaultKind.OUT_OF_MEMORY: Fault(
        Budget.PROGRAM, "restart the process; if it comes again use smaller micro-batches or more memory"
    ),
    FaultKind.PROCESS_GONE: Fault(Budget.UNKNOWN, "start another process in its place; see the worker's log for its last words"),
    FaultKind.EXCEPTION: Fault(Budget.UNKNOWN, "try the step once more: the same error at the same step again is the program's"),
    FaultKind.PROGRAM_ERROR: Fault(
        Budget.PROGRAM, "mend the program; it fails at this step every time", resubmit=False
    ),
    FaultKind.COLLECTIVE_BROKEN: Fault(Budget.UNKNOWN, "form the group anew; nobody is known to have died"),
    FaultKind.HANG: Fault(Budget.UNKNOWN, "keep the stacks of the ranks named, end them, and form the group anew"),
    FaultKind.STRAGGLER: Fault(
        Budget.FREE, "replace the node at the next checkpoint if a spare is cheaper than waiting for it"
    ),
    FaultKind.NON_FINITE: Fault(
        Budget.PROGRAM, "skip the step on all ranks; if it stays, go back to before it and leave these samples out"
    ),
    FaultKind.LOSS_SPIKE: Fault(
        Budget.PROGRAM, "go back to a verified version from before it, leave these samples out, and go on"
    ),
    FaultKind.CORRUPTION: Fault(
        Budget.INFRASTRUCTURE, "go back to a verified version, and take the node named out for tests"
    ),
    FaultKind.STORAGE: Fault(
        Budget.INFRASTRUCTURE, "save to the other places meanwhile; look at the store's space, rights and service"
    ),
    FaultKind.PREFLIGHT: Fault(
        Budget.INFRASTRUCTURE, "take another node; look at what the examination found before this one is used again"
    ),
}  # fmt: skip
