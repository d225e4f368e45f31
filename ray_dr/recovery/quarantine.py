"""What a job must not go on from, and which samples must not come again, since something went wrong in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.data import Windows, leave_out
from ray_dr.model.recovery import Rollback


def usable(version: VersionId, rollbacks: Sequence[Rollback]) -> bool:
    """Whether a version is from before all that went wrong, or of an attempt that began after it."""
    return not any(version.attempt <= back.attempt and version.step > back.good for back in rollbacks)


def settled(rollbacks: tuple[Rollback, ...], restore: VersionId | None) -> tuple[Rollback, ...]:
    """Now it is known what the job goes on from: with that, what is left out."""
    base = restore.step if restore else 0
    return tuple(replace(back, base=base) if back.base is None else back for back in rollbacks)


def windows(rollbacks: Sequence[Rollback]) -> Windows:
    """Windows of the sample stream that no step uses any more."""
    found: Windows = ()
    for back in rollbacks:
        if back.base is not None:
            found = leave_out(found, back.base * back.batch, back.last * back.batch)
    return found


def out_of_reach(rollbacks: Sequence[Rollback]) -> Rollback | None:
    """What has left no version to go on from, should none be found: to begin from scratch would throw away all that was trained
    before the attempt in which it happened."""
    return next((back for back in reversed(rollbacks) if back.base is None and not back.scratch), None)
