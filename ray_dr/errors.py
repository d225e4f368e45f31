"""What can go wrong, one tree.

    RayDrError
    ├── ConfigError            job.yaml (or an argument) asks for something that cannot be: file, line, key, remedy
    ├── StoreError             a store did not do what was asked          (retryable: says the error)
    │   ├── NotFound           no object of that name
    │   ├── AlreadyExists      a conditional put lost
    │   ├── AccessDenied       credentials are missing, wrong or too weak
    │   ├── StoreFull          no space or quota left
    │   ├── ObjectTooShort     an object ends before the bytes that were asked for
    │   ├── BrokenPromise      a check found a store to do other than its interface says
    │   └── StoreUnavailable   unreachable, timed out, 5xx                (retryable)
    │       └── StoreBusy      throttled: it asks for patience
    ├── CheckpointError        a checkpoint cannot be used
    │   ├── CorruptChunk       bytes do not match their hash
    │   ├── CopiesAway         no copy can be read now, but not all of them are damaged or gone
    │   ├── IncompatibleState  names, shapes or dtypes differ: carries the list of differences
    │   ├── UnsupportedState   a state_dict holds something that cannot be stored without pickle
    │   └── NoCheckpoint       nothing to restore from
    ├── NonFinite              training met numbers that are not finite, and the job is not to go on with that
    ├── Fenced                 a supervisor of a newer term owns the job
    ├── StillAlive             somebody wants to resume a job whose supervisor lives
    ├── JobFailed              the job ended in failure: carries the root cause and whether resubmitting can help
    └── ClusterError           Ray did not do what was asked
"""

from __future__ import annotations


class RayDrError(Exception):
    """Root of the tree. `retryable`: doing the same again may succeed."""

    retryable: bool = False


class ConfigError(RayDrError):
    """A setting that cannot hold. The message reads `file:line: key: what is wrong (remedy)`."""

    def __init__(self, what: str, *, remedy: str, key: str = "", file: str = "", line: int = 0) -> None:
        self.what, self.remedy, self.key, self.file, self.line = what, remedy, key, file, line
        place = f"{file}:{line}: " if file and line else (f"{file}: " if file else "")
        super().__init__(f"{place}{key + ': ' if key else ''}{what} ({remedy})")


class StoreError(RayDrError):
    """A store did not do what was asked. Carries the operation and the object's name."""

    def __init__(self, what: str, *, key: str = "", retryable: bool = False) -> None:
        self.key = key
        self.retryable = retryable
        super().__init__(f"{what}: {key}" if key else what)


class NotFound(StoreError):
    """No object of that name."""


class AlreadyExists(StoreError):
    """A put-if-absent found the name taken."""


class AccessDenied(StoreError):
    """Credentials are missing, wrong or too weak for the operation."""


class StoreFull(StoreError):
    """No space or quota left. Retried only with the next save: space does not come back in seconds."""


class ObjectTooShort(StoreError):
    """An object ends before the bytes that were asked for: truncated, or not what it was taken for."""


class BrokenPromise(StoreError):
    """A check found a store to do other than its interface says."""


class StoreUnavailable(StoreError):
    """Unreachable, timed out or failing inside."""

    def __init__(self, what: str, *, key: str = "") -> None:
        super().__init__(what, key=key, retryable=True)


class StoreBusy(StoreUnavailable):
    """Throttled: the store is there, and takes requests again when fewer come."""


class CheckpointError(RayDrError):
    """A checkpoint cannot be used as asked."""


class CorruptChunk(CheckpointError):
    """Bytes do not match their hash. `source` names the copy that was bad."""

    def __init__(self, chunk: str, *, source: str) -> None:
        self.chunk, self.source = chunk, source
        super().__init__(f"chunk {chunk[:16]} read from {source} does not match its hash")


class CopiesAway(CheckpointError):
    """A chunk can't be read now: of its copies at least one is neither damaged nor missing, only out of reach."""


class IncompatibleState(CheckpointError):
    """The checkpoint is of another model. Nothing was loaded; `differences` lists every mismatch."""

    def __init__(self, differences: tuple[str, ...]) -> None:
        self.differences = differences
        shown = "\n  ".join(differences[:40])
        more = f"\n  ... and {len(differences) - 40} more" if len(differences) > 40 else ""
        super().__init__(f"the checkpoint does not fit this program ({len(differences)} differences):\n  {shown}{more}")


class UnsupportedState(CheckpointError):
    """A state_dict holds an object that cannot be stored without pickle. Names it and the remedy."""


class NoCheckpoint(CheckpointError):
    """There is nothing to restore from."""


class NonFinite(RayDrError):
    """Gradients, or a number that the program logged, are not finite, and the job says to stop then."""


class Fenced(RayDrError):
    """A supervisor of a newer term owns the job; this one must stop writing."""

    def __init__(self, job: str, *, mine: int, newest: int) -> None:
        self.job, self.mine, self.newest = job, mine, newest
        super().__init__(f"job {job}: term {mine} is fenced by term {newest}")


class StillAlive(RayDrError):
    """The job's supervisor renews its lease: there is nothing to resume."""

    def __init__(self, job: str, owner: str, age_s: float) -> None:
        self.job, self.owner = job, owner
        super().__init__(
            f"job {job} lives: its supervisor ({owner}) renewed its lease {age_s:.0f} s ago (follow it with `ray-dr status`;"
            " --force takes the job from it)"
        )


class JobFailed(RayDrError):
    """The job ended in failure. `resubmit` says whether running it again can help."""

    def __init__(self, job: str, reason: str, *, resubmit: bool) -> None:
        self.job, self.reason, self.resubmit = job, reason, resubmit
        advice = "running it again continues it" if resubmit else "do not resubmit: it would fail the same way"
        super().__init__(f"job {job} failed: {reason} ({advice})")


class ClusterError(RayDrError):
    """Ray did not do what was asked."""
