"""Healing in place: the state that survivors of a broken attempt still have becomes a version, and no step is lost.

Theory of operation. Whoever leaves a broken step says after which step its state stands whole, if it does, and which
ranks' parts of it it has the bytes of (`Standing`): under plain data parallelism everybody has everything, under hybrid
sharding those with the same shards have each other's, under full sharding each has its own only. Once nobody is unwinding
any more and the inventory is in, the newest step is taken for which there is a writer for every rank's part, and these
stage it as an ordinary version of the broken attempt. The inventory is then taken once more, and finds it.

Survivors that stand at different steps are not brought together: those at the step taken write for the others too, and
all restore the version. Whatever goes wrong, or takes too long, costs nothing but its time: the version that the first
inventory found is there still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ray_dr.model.actions import Decision, Rescue
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Event, Rescued, WorkerRaised, WorkerStopped
from ray_dr.model.recovery import Policy, Recovering, Standing, State
from ray_dr.recovery.fleet import ready_workers
from ray_dr.recovery.groups import restore_of, take_inventory
from ray_dr.recovery.incidents import note_step
from ray_dr.recovery.quarantine import usable
from ray_dr.recovery.words import also, count, ignored

OVER = 0.0
"""What `rescue_until` says when there is nothing to wait for any more."""


def noted(decision: Decision, event: Event) -> Decision:
    """The decision on a member's word, and what it said of the state it still has."""
    phase = decision.state.phase
    if not isinstance(event, WorkerRaised | WorkerStopped) or not isinstance(phase, Recovering) or event.stands_at < 0:
        return decision
    standing = Standing(event.worker, event.stands_at, event.twins)
    after = replace(phase, standing=(*phase.standing, standing))
    return replace(decision, state=replace(decision.state, phase=after))


def instead(state: State, phase: Recovering, at: float, policy: Policy) -> Decision | None:
    """What comes before the next group, now that it could be formed: asking for a rescue, or waiting for one; None: nothing.

    The state given back without a rescue says that there is none to come.
    """
    if phase.rescue_until == OVER:
        return None
    if phase.rescue_until is not None:
        return ignored(state, f"step {state.step} is being rescued")
    found = plan(state, phase)
    if isinstance(found, str):
        return None
    after = replace(state, phase=replace(phase, rescue_until=at + policy.rescue_s))
    behalf = sum(writer != worker for writer, worker in zip(found.writers, state.order, strict=True))
    who = count(len(set(found.writers)), "survivor")
    for_others = f", {behalf} of {count(len(state.order), 'part')} on behalf of others" if behalf else ""
    return Decision(after, (found,), f"step {found.step} lives on: {who} to stage it{for_others}")


def lost_without(state: State, phase: Recovering) -> str:
    """Why steps are lost all the same, in words; empty when none is, or when it was said already."""
    base = restore_of(phase.found)
    behind = state.step > (base.step if base else 0) and usable(VersionId(phase.attempt, state.step), state.rollbacks)
    found = plan(state, phase) if behind and phase.rescue_until is None else ""
    return found if isinstance(found, str) else ""


def plan(state: State, phase: Recovering) -> Rescue | str:
    """Who writes whose part of which step; or why nothing newer than what was found can be rescued."""
    alive, base = frozenset(ready_workers(state)), restore_of(phase.found)
    standing = [each for each in phase.standing if each.worker in alive]
    newer = [each for each in standing if base is None or VersionId(phase.attempt, each.step) > base]
    newer = [each for each in newer if each.step > 0 and usable(VersionId(phase.attempt, each.step), state.rollbacks)]
    if not newer:
        return "" if standing else "no survivor's state stands whole at the end of a step"
    steps = sorted({each.step for each in newer}, reverse=True)
    why = ""
    for step in steps:
        writers = assign(state.order, [each for each in newer if each.step == step])
        if isinstance(writers, tuple):
            return Rescue(phase.attempt, step, writers)
        why = why or f"nobody who stands at step {step} has rank {writers}'s part"
    return why if len(steps) == 1 else f"survivors stand at steps {', '.join(map(str, steps))}: {why}"


def assign(order: Sequence[str], standing: Sequence[Standing]) -> tuple[str, ...] | int:
    """The worker that writes each rank's part, its own where it can; the first rank without anybody who could.

    order      the attempt's members by rank
    standing   those that stand at one and the same step; what they write for others is dealt out evenly
    """
    mine = {each.worker for each in standing}
    everyone = [each.worker for each in standing if not each.twins]
    of: dict[int, list[str]] = {}
    for each in standing:
        for rank in each.twins:
            of.setdefault(rank, []).append(each.worker)
    writers: list[str] = []
    behalf = 0
    for rank, worker in enumerate(order):
        able = [*of.get(rank, ()), *(() if rank in of else everyone)]
        if worker in mine:
            writers.append(worker)
        elif able:
            writers.append(able[behalf % len(able)])
            behalf += 1
        else:
            return rank
    return tuple(writers)


def ended(state: State, event: Rescued, policy: Policy) -> Decision:
    """The survivors are through: what they have staged is looked for, or what was found before is gone on from."""
    phase = state.phase
    if not isinstance(phase, Recovering) or event.attempt != phase.attempt or not phase.rescue_until:
        return ignored(state, f"no rescue of attempt {event.attempt} is awaited")
    if event.failed:
        return _over(state, phase, f"step {event.step} could not be rescued ({event.failed})")
    done = _over(note_step(state, event.step), phase, f"step {event.step} of attempt {event.attempt} is staged")
    return also(done, take_inventory(done.state, event.at, policy))


def out_of_time(state: State, phase: Recovering, policy: Policy) -> Decision:
    """The rescue took too long."""
    return _over(state, phase, f"no step was rescued within {policy.rescue_s:g} s")


def _over(state: State, phase: Recovering, reason: str) -> Decision:
    return Decision(replace(state, phase=replace(phase, rescue_until=OVER, standing=())), (), reason)
