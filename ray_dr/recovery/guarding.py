"""Whether a job has lost its cluster, and whether to submit it again: `decide(watch, at, policy) -> Verdict`.

Theory of operation. A guard looks at a job's lease again and again. It trusts no clock but its own, and its own only while it
looks: a lease counts as stale when it has not changed for `stale_s` over which the guard has seen the store all along. Where
the store could not be read, or the guard itself stood still, the count begins anew: a supervisor could not have renewed
its lease then either, or could have without being seen.

A false alarm is harmless: the supervisor that is started takes the next term, and the other one is fenced off. It is not
free, so resubmissions back off, and after a number of them without a new step the guard gives up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ray_dr.model.lease import Guarding, Lease

MISSED_BEATS = 3
"""A lease is alive for at least so many times its interval; a cluster's head is there again within as much, or lost."""
HEARD_S = 2.0
"""A head that was heard of so lately is there."""


@dataclass(frozen=True, slots=True)
class GuardPolicy:
    """Seconds.

    stale_s      a lease that has not changed for so long is stale
    start_s      a resubmitted job has this long until its supervisor is seen
    backoff_s    between the first two resubmissions; doubles with each, up to `backoff_most_s`
    tries_most   resubmissions in a row without a new step, before the guard gives up
    """

    stale_s: float = 60.0
    start_s: float = 300.0
    backoff_s: float = 60.0
    backoff_most_s: float = 3600.0
    tries_most: int = 5


@dataclass(frozen=True, slots=True)
class Watch:
    """What a guard knows of one job. `changed_at`, `looked_at`: UTC seconds of the guard; 0: never."""

    done: Guarding = field(default_factory=Guarding)
    lease: Lease | None = None
    changed_at: float = 0.0
    looked_at: float = 0.0
    trouble: str = ""
    """Why the store could not be read the last time."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is to be done now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resubmit:
    """The job is to be submitted again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """The job needs no guard any more. `well`: it ended as it should, or as somebody asked; `for_good`: it would fail again."""

    reason: str
    well: bool
    for_good: bool = False


Verdict = Wait | Resubmit | Leave


def look(watch: Watch, at: float, lease: Lease | None, policy: GuardPolicy, *, trouble: str = "") -> Watch:
    """The watch after one more look at the store, `at` UTC seconds; `trouble`: why it could not be read."""
    if trouble:
        return replace(watch, trouble=trouble)
    gap = watch.trouble != "" or not 0 <= at - watch.looked_at <= policy.stale_s / 2
    changed = lease is None or watch.lease is None or (lease.term, lease.beat) != (watch.lease.term, watch.lease.beat)
    done = watch.done
    if lease is not None and done.tries and lease.term > done.term and lease.step > done.step:
        done = replace(done, tries=0)
    return Watch(done, lease, at if gap or changed else watch.changed_at, at)


def resubmitted(watch: Watch, at: float) -> Watch:
    """The watch after a resubmission; its `done` is to be kept before it is tried."""
    term, step = (watch.lease.term, watch.lease.step) if watch.lease else (0, 0)
    return replace(watch, done=Guarding(watch.done.tries + 1, at, term, max(step, watch.done.step)))


def refused(watch: Watch, at: float, *, counts: bool) -> Watch:
    """The watch after a resubmission of which nothing can come. `counts`: it is one of those after which the guard gives up;
    a cluster that can't be reached does not count, as it may take long to come."""
    tries = watch.done.tries if counts else watch.done.tries - 1
    return replace(watch, done=replace(watch.done, tries=tries, tried_at=at, refused=True))


def decide(watch: Watch, at: float, policy: GuardPolicy) -> Verdict:
    """What to do about a job now, and why."""
    lease = watch.lease
    if watch.trouble:
        return Wait(f"the store cannot be read ({watch.trouble})")
    if lease is None:
        return Wait("no supervisor has been heard of yet")
    if (ended := _ended(lease)) is not None:
        return ended
    why = _lost(lease, at - watch.changed_at, limit_s(lease, policy))
    if not why:
        return Wait(f"alive: term {lease.term}, {lease.phase.lower()}, step {lease.step}")
    if lease.phase == "Draining":
        return Leave(f"{why}, but it had been asked to stop", well=False)
    return _again(watch, lease, at, why, policy)


def _lost(lease: Lease, silent_s: float, limit: float) -> str:
    """Why a job that is not over for good needs to be submitted again; empty when it doesn't."""
    if lease.over:
        return f"it failed, and running it again can help: {lease.reason}"
    if silent_s >= limit:
        return f"the supervisor of term {lease.term} has not renewed its lease for {silent_s:.0f} s (limit {limit:g} s)"
    if lease.headless_s >= limit:
        return f"the head of its cluster has been away for {lease.headless_s:.0f} s (limit {limit:g} s)"
    return ""


def judge(first: Lease, newest: Lease, unchanged_s: float) -> bool | None:
    """Whether a supervisor lives, for one who wants to take its job now: None as long as it can't be told.

    first         its lease when the looking began
    newest        its lease now, which has been the same for `unchanged_s` of the looker's seconds
    """
    limit = MISSED_BEATS * newest.every_s
    if newest.over or unchanged_s >= limit or newest.headless_s >= limit:
        return False
    renewed = (newest.term, newest.beat) != (first.term, first.beat)
    return True if renewed and newest.headless_s < HEARD_S else None


def limit_s(lease: Lease, policy: GuardPolicy) -> float:
    """How long a lease may stay the same."""
    return max(policy.stale_s, MISSED_BEATS * lease.every_s)


def _ended(lease: Lease) -> Leave | None:
    match lease.over:
        case "finished" | "drained":
            stopped = " (somebody asked it to stop)" if lease.over == "drained" else ""
            return Leave(f"{lease.over} after step {lease.step}{stopped}", well=True)
        case "failed" if not lease.resubmit:
            return Leave(f"failed, and would fail again: {lease.reason}", well=False, for_good=True)
        case _:
            return None


def _again(watch: Watch, lease: Lease, at: float, why: str, policy: GuardPolicy) -> Verdict:
    done = watch.done
    since = at - done.tried_at
    if done.tries and lease.term <= done.term and not done.refused and since < policy.start_s:
        return Wait(f"submitted again {since:.0f} s ago: its supervisor is to begin")
    if done.tries >= policy.tries_most:
        return Leave(f"given up: {done.tries} resubmissions in a row brought no new step; {why}", well=False)
    pause = policy.backoff_s if done.refused else 0.0
    if done.tries:
        pause = min(policy.backoff_most_s, policy.backoff_s * 2 ** (done.tries - 1))
    if since < pause:
        return Wait(f"{why}; the next try is in {pause - since:.0f} s")
    return Resubmit(why)
