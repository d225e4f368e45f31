"""What a supervisor leaves in its job's store for those who look after its cluster is gone: a sign of life, and the program.

Both are values; `repository.lease` and `repository.program` say where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Over = Literal["", "finished", "drained", "failed"]


@dataclass(frozen=True, slots=True)
class Lease:
    """A supervisor's sign of life, renewed every `every_s` seconds while it lives. The lease of the highest term counts.

    beat   how often it was renewed: who watches looks whether this changes, so that no two clocks are compared
    at     UTC seconds of the supervisor
    step   the newest step all ranks have done
    phase  the job's state by its name
    over   how the job ended; empty while it goes on. `reason`, `resubmit`: as in `model.recovery.Failed`
    headless_s   how long nothing was heard of the cluster's head: without it, Ray ends every node after a minute
    """

    term: int
    beat: int
    at: float
    every_s: float
    owner: str = ""
    step: int = 0
    phase: str = ""
    over: Over = ""
    reason: str = ""
    resubmit: bool = True
    headless_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Program:
    """What it takes to run a job again without whoever submitted it.

    spec      the job, as JSON
    train     digest of the pickled training function
    package   digest of its working directory, as a zip; empty: it had none
    env       variables of its runtime environment, with their values: only in an encrypted store
    names     such variables whose values are not here: they may be secrets, and this store is readable
    runtime   the rest of its runtime environment (pip, ...)
    paths     directories of Python's path that are nobody's installation
    missing   what could not be kept, in words
    """

    spec: dict[str, object]
    train: str
    python: str
    ray: str
    term: int = 0
    at: float = 0.0
    package: str = ""
    env: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    runtime: dict[str, object] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Guarding:
    """What a guard has done for a job, kept in the store so that it, or another one, goes on from there.

    tries       resubmissions in a row after which no new step was done
    tried_at    of the newest, UTC seconds of the guard; 0: never
    term, step  of the lease that was found stale then
    refused     no supervisor can come of it: the cluster could not be reached, or what was submitted there failed
    """

    tries: int = 0
    tried_at: float = 0.0
    term: int = 0
    step: int = 0
    refused: bool = False
