"""`ray-dr resume`: a job whose cluster is gone goes on, on this one or another, from what its store holds."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle

from ray_dr.actors import cluster, launch, packing
from ray_dr.errors import ClusterError, StillAlive
from ray_dr.model.job import Job
from ray_dr.model.lease import Lease, Program
from ray_dr.recovery.guarding import MISSED_BEATS, judge
from ray_dr.repository.lease import read_lease
from ray_dr.repository.program import read_blob
from ray_dr.stores.base import Store

LOOK_S = 0.25
SKEW_S = 60.0
"""Clocks of two machines may differ by so much: only a lease that is older by more needs no watching."""


@dataclass(frozen=True, slots=True)
class Found:
    """A job to resume. `program` is what was kept, `train` the function in its place, if one was given.

    lease     what its supervisor said last, `seen_at` monotonic seconds; None: it is not to be waited for
    """

    spec: Job
    store: Store
    program: Program | None
    lease: Lease | None
    seen_at: float
    train: Callable[[Any], None] | None = None


def resume(found: Found, *, address: str | None, environment: Mapping[str, str], say: Callable[[str], None]) -> Any:
    """The supervisor of the job, started on the cluster at `address` (None: as `ray-dr run`).

    environment   values for variables of the program's runtime environment
    Raises StillAlive, ClusterError, StoreError.
    """
    with tempfile.TemporaryDirectory(prefix="ray-dr-resume-") as folder:
        runtime, paths = _runtime(found, Path(folder), environment)
        try:
            cluster.connect_again(address, runtime, paths)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(f"no Ray cluster can be joined at {address or 'RAY_ADDRESS'}: {error}") from error
    if found.program is not None and found.train is None and found.program.ray != ray.__version__:
        say(f"WARNING: the job ran on Ray {found.program.ray}, this is {ray.__version__}")
    if found.lease is not None:
        _await_silence(found, found.lease, found.seen_at)
    return launch.submit_pickled(_pickled(found), found.spec)


def _pickled(found: Found) -> bytes:
    if found.train is not None:
        return bytes(ray.cloudpickle.dumps(found.train))
    assert found.program is not None, "there is one or the other"
    return read_blob(found.store, found.spec.name, found.program.train)


def _runtime(found: Found, folder: Path, environment: Mapping[str, str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The runtime environment and the Python path the program had; its working directory is unpacked in `folder`."""
    program = found.program
    if program is None:
        return {}, ()
    os.environ.update({"RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"})  # of a guard's submission, whose variables are among these
    runtime: dict[str, Any] = dict(program.runtime)
    if variables := {**program.env, **environment}:
        runtime["env_vars"] = variables
    if program.package and found.train is None:
        packing.unpack(read_blob(found.store, found.spec.name, program.package), folder)
        runtime["working_dir"] = str(folder)
    return runtime, tuple(path for path in program.paths if os.path.isdir(path))


def _await_silence(found: Found, first: Lease, seen: float) -> None:
    """Wait until the supervisor whose lease was read at `seen` (monotonic seconds) is known not to live, or to have lost its
    cluster; at once where that lease is old. Raises StillAlive."""
    newest = first
    while time.time() - newest.at < MISSED_BEATS * newest.every_s + SKEW_S:
        lives = judge(first, newest, time.monotonic() - seen)
        if lives is False:
            return
        if lives:
            raise StillAlive(found.spec.name, newest.owner, max(0.0, time.time() - newest.at))
        time.sleep(LOOK_S)
        now = read_lease(found.store, found.spec.name)
        if now is not None and (now.term, now.beat) != (newest.term, newest.beat):
            newest, seen = now, time.monotonic()


def strangeness(program: Program) -> tuple[str, ...]:
    """What may keep a kept program from running here, in words."""
    told = [f"{what} could not be kept" for what in program.missing]
    if program.python != platform.python_version():
        told.append(f"the job ran on Python {program.python}, this is {platform.python_version()}")
    return tuple(told)
