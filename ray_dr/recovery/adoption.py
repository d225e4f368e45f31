"""What a new supervisor makes of the workers it finds alive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.recovery import Group


@dataclass(frozen=True, slots=True)
class Living:
    """What a worker says of itself: its newest attempt, rank and steps there, whether it is in `train`, and what it and how
    many others began from. A worker that was never in a group says rank -1 of attempt 0."""

    worker: str
    attempt: int = 0
    rank: int = -1
    step: int = 0
    running: bool = False
    restore: VersionId | None = None
    world: int = 0


def living_group(workers: Sequence[Living]) -> tuple[Group | None, int]:
    """The newest attempt's members in rank order, whether they are in it still or not; and the step all those have done.

    A rank that nobody has any more has a name of its own, of no worker: without it the group is not whole.
    """
    attempt = max((worker.attempt for worker in workers), default=0)
    members = {worker.rank: worker for worker in workers if worker.attempt == attempt and attempt and worker.world}
    if not members:
        return None, 0
    some = next(iter(members.values()))
    names = (members[rank].worker if rank in members else f"rank {rank} of attempt {attempt}" for rank in range(some.world))
    return Group(attempt, tuple(names), some.restore), min(worker.step for worker in members.values())


def who_left(workers: Sequence[Living], group: Group) -> tuple[str, ...]:
    """Members that live and are out of `train`, when all of them are; nobody while one is in it: it may be that the others
    have returned, and what they say of their end is still to come."""
    living = [worker for worker in workers if worker.worker in group.members]
    return () if any(worker.running for worker in living) else tuple(worker.worker for worker in living)
