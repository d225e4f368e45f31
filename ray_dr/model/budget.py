"""What failures have used up of what a job allows, as values. How it is counted: `recovery.budget`."""

from __future__ import annotations

from dataclasses import dataclass

from ray_dr.model.signal import FaultKind


@dataclass(frozen=True, slots=True)
class Root:
    """A root cause that attempts without a new step ended of.

    name    the fingerprint: the kind of fault, and the normalised error where there is one
    spent   tokens of it that are gone, when it was last charged
    ran_s   the ledger's `ran_s` at that moment: later seconds of running give tokens back
    """

    name: str
    cause: FaultKind
    spent: float
    ran_s: float


@dataclass(frozen=True, slots=True)
class Charge:
    """The newest incident's, so that it can be moved to another root cause when more is known.

    root   whose token was taken; empty: none was, as the attempt had made a new step, or the cause is free
    """

    incident: int
    cause: FaultKind
    root: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was counted so far. Seconds are the supervisor's.

    tries           failures in a row since the last new step, with the one that came right after it: what back-off goes by
    roots           those that were charged, the newest last, a bounded number
    ran_s           seconds for which groups have run, up to the newest incident
    running_since   UTC seconds of the first step since then; None: no group has run since
    """

    tries: int = 0
    roots: tuple[Root, ...] = ()
    ran_s: float = 0.0
    running_since: float | None = None
    newest: Charge | None = None


NOTHING_COUNTED = Ledger()
