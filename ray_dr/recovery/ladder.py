"""The recovery ladder: what each way out of a failure is expected to cost, from what its parts took before, and which to take.

All is counted in seconds of work at full size. A way costs

    the time without steps      waiting, forming the group, restoring, the first step
    the work that is lost       steps that were done and have to be done again
    the time at reduced size    until everybody who is on the way has come: with k of n workers, 1 - k/n of it
    the interruptions to come   each later growth stops the group once more
    the risk of waiting         who is waited for may not come: RISK of the wait

so that going on at once with fewer is weighed against waiting for those that are about to be up: it wins unless they come
sooner than the interruption that their coming would mean. Speed is taken to grow with the number of workers; what is common to
all ways (noticing, leaving the broken step) is in none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ray_dr.model.ladder import Measured, Rung, Way
from ray_dr.recovery.words import count

RISK = 0.1
TOGETHER_S = 1.0
"""Workers that come up within so many seconds come as one."""
RUNGS = tuple(Rung)


@dataclass(frozen=True, slots=True)
class Situation:
    """A job that has lost its group, its survivors out of the broken step.

    wanted         workers of the whole group
    up             those that are up, of whom `newcomers` were not in the broken group
    least          with fewer it can't go on
    starting       seconds until each process that is starting is expected to be up
    spare          processes that could be started on nodes at hand which the job does not have yet
    coming         workers on nodes that the autoscaler was asked for `asked_s` seconds ago
    steps_lost     steps that were done after the newest version that was found
    twins          living twins hold all state after the last step: nothing is lost
    bad_step       nobody is lost; one step's numbers are bad, and all ranks agree to throw it away
    distrusted     the newest version must not be used; `older_steps_lost` those done after the newest verified one
    elsewhere_s    until another cluster could form a group; None: there is none
    """

    wanted: int
    up: int
    newcomers: int = 0
    least: int = 1
    starting: tuple[float, ...] = ()
    spare: int = 0
    coming: int = 0
    asked_s: float = 0.0
    steps_lost: int = 0
    twins: bool = False
    bad_step: bool = False
    distrusted: bool = False
    older_steps_lost: int = 0
    elsewhere_s: float | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """Workers that are expected to be up in `after_s` seconds, by way of `rung`."""

    after_s: float
    workers: int
    rung: Rung


def choose(now: Situation, measured: Measured) -> tuple[Way | None, Way | None]:
    """The way that costs least, and the best of the others; None: there is none. Of two that cost the same, the smaller
    interference."""
    best = sorted(ways(now, measured), key=lambda way: (way.loss_s, RUNGS.index(way.rung)))
    return best[0] if best else None, best[1] if len(best) > 1 else None


def ways(now: Situation, measured: Measured) -> Iterator[Way]:
    """All that are open."""
    lost_s = measured.step_s * (now.older_steps_lost if now.distrusted else 0 if now.twins else now.steps_lost)
    if now.bad_step and not now.distrusted and now.up >= now.wanted:
        yield Way(Rung.SKIP, now.up, 0.0, measured.step_s, measured.step_s)
        lost_s += measured.step_s  # any other way does it again
    coming = arrivals(now, measured)
    for awaited in range(len(coming) + 1):
        workers = min(now.wanted, now.up + sum(arrival.workers for arrival in coming[:awaited]))
        if workers >= max(1, now.least):
            yield _way(now, measured, coming, awaited, workers, lost_s)
        if workers >= now.wanted:
            break
    if now.elsewhere_s is not None:
        next_s = now.elsewhere_s + measured.begin_s
        yield Way(Rung.ELSEWHERE, now.wanted, now.elsewhere_s, next_s, next_s + lost_s)


def arrivals(now: Situation, measured: Measured) -> Sequence[Arrival]:
    """Who is on the way, or could be, the soonest first; those that come together as one, when the last of them is there."""
    each = [Arrival(max(0.0, after_s), 1, Rung.PROCESS) for after_s in now.starting]
    if now.spare:
        each.append(Arrival(measured.process_start_s, now.spare, Rung.SPARE))
    if now.coming:
        node_s = expected_s(measured.node_join_s, now.asked_s)
        each.append(Arrival(node_s + measured.process_start_s, now.coming, Rung.AUTOSCALE))
    found: list[Arrival] = []
    for arrival in sorted(each, key=lambda arrival: arrival.after_s):
        last = found[-1] if found else None
        if last is not None and last.rung is arrival.rung and arrival.after_s - last.after_s <= TOGETHER_S:
            found[-1] = Arrival(arrival.after_s, last.workers + arrival.workers, last.rung)
        else:
            found.append(arrival)
    return found


def expected_s(takes_s: float, passed_s: float) -> float:
    """Seconds until something is there that was asked for `passed_s` seconds ago. What is overdue is expected to take as long
    again as it is late already."""
    return abs(takes_s - passed_s)


def _way(
    now: Situation, measured: Measured, coming: Sequence[Arrival], awaited: int, workers: int, lost_s: float
) -> Way:
    """To wait for the first `awaited` arrivals, and go on with `workers`."""
    wait_s = coming[awaited - 1].after_s if awaited else 0.0
    rung = _rung(now, coming, awaited, workers)
    next_s = wait_s + measured.begin_s
    loss_s, size, at_s = next_s + lost_s + RISK * wait_s, workers, next_s
    for arrival in coming[awaited:]:
        if size >= now.wanted:
            break
        grows_s = max(arrival.after_s, at_s)
        loss_s += (1 - size / now.wanted) * (grows_s - at_s) + measured.stop_s + measured.begin_s
        size, at_s = min(now.wanted, size + arrival.workers), grows_s
    return Way(rung, workers, wait_s, next_s, loss_s)


def _rung(now: Situation, coming: Sequence[Arrival], awaited: int, workers: int) -> Rung:
    if now.distrusted:
        return Rung.ROLLBACK
    if awaited:
        return coming[awaited - 1].rung
    if workers < now.wanted:
        return Rung.SHRINK
    return Rung.STANDBY if now.newcomers else Rung.REBUILD


def told(way: Way, wanted: int) -> str:
    """A way in words."""
    of = f"{way.workers} of {count(wanted, 'worker')}"
    match way.rung:
        case Rung.SKIP:
            return "skipping the step"
        case Rung.REBUILD | Rung.SHRINK:
            return f"going on with {of}"
        case Rung.STANDBY:
            return f"going on with {of}, newcomers in the places of the lost"
        case Rung.PROCESS:
            return f"waiting for processes that are starting ({of})"
        case Rung.SPARE:
            return f"starting processes on spare nodes ({of})"
        case Rung.AUTOSCALE:
            return f"waiting for the autoscaler ({of})"
        case Rung.ROLLBACK:
            return f"going back to an older version with {of}"
        case Rung.ELSEWHERE:
            return "going on in another cluster"


def weighed(way: Way, besides: Way | None, wanted: int) -> str:
    """A choice in words, with what it was weighed against."""
    text = f"{told(way, wanted)}: {seconds(way.next_step_s)} expected"
    if besides is None:
        return text
    text = f"{text}; {told(besides, wanted)} would take {seconds(besides.next_step_s)}"
    if besides.next_step_s >= way.next_step_s:
        return text
    return f"{text}, but cost {seconds(besides.loss_s - way.loss_s)} of work more in all"


def seconds(number: float) -> str:
    """`0.52 s`, `4.1 s`, `130 s`."""
    return f"{number:.2g} s" if number < 100 else f"{number:.0f} s"
