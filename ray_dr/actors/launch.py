"""`ray_dr.run`: from a training function and a `job.yaml` to a running job, and its outcome."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle

from ray_dr import config
from ray_dr.actors import cluster
from ray_dr.actors.supervisor import Supervisor
from ray_dr.errors import ClusterError, ConfigError, JobFailed
from ray_dr.model import codec
from ray_dr.model.job import Job, StoreTier
from ray_dr.model.recovery import Failed, Finished
from ray_dr.repository.commit import CommitLog
from ray_dr.stores.open import open_store
from ray_dr.stores.unconditional import GUARANTEE

PIECE_BYTES = 64 * 1024
"""Ray keeps arguments below 100 KB with the actor itself, for a restart elsewhere; larger ones die with the driver."""
TRAIN_MAX_BYTES = 8 * 2**20
POLL_S = 1.0
SUBMIT_TRIES = 20
GONE_S = 0.25
START_S = 120.0
DRAIN_S = 120.0
CALLS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. `drained`: it was asked to stop and goes on when run again. `step`: steps done."""

    job: str
    drained: bool
    step: int


def run(train: Callable[[Any], None], job: str | Path | Job, *, quiet: bool = False,
        watch: Callable[[dict[str, Any]], None] | None = None) -> Outcome:  # fmt: skip
    """Run `train(ctx)` on a Ray cluster until it is done, through failures and resizes; resumes by the job's name.

    job     path of a job.yaml, or a Job
    quiet   print nothing
    watch   called about once a second with what is going on

    Ctrl-C drains: the job stops at a step boundary, saves, and leaves nothing behind; running it again goes on.
    Should this process die, the job goes on without it; running it again attaches to it.
    Raises ConfigError before anything starts; JobFailed with the cause when the job fails.
    """
    spec = job if isinstance(job, Job) else config.load(job)
    traits = config.check_store(spec, None if isinstance(job, Job) else job)
    for tier in (spec.store, spec.second):
        if tier is not None and tier.share_with:
            _check_base(spec.name, tier)
    say = speech(quiet)
    if not traits.conditional_put:
        say(f"job {spec.name}: WARNING: about the store {spec.store.url}: {GUARANTEE}")
    if config.store_is_default(spec):
        say(f"job {spec.name}: no store is given, checkpoints go to the local directory {spec.store.url}")
    connect()
    return conduct(submit(train, spec), spec, say, watch)


def conduct(supervisor: Any, spec: Job, say: Callable[[str], None],
            watch: Callable[[dict[str, Any]], None] | None = None) -> Outcome:  # fmt: skip
    """Follow a job to its end; Ctrl-C drains it. Raises JobFailed."""
    try:
        ended = _follow(supervisor, spec, say, watch)
    except KeyboardInterrupt:
        say(f"job {spec.name}: stopping at the next step and saving (Ctrl-C again leaves it running)")
        ray.get(supervisor.stop.remote(DRAIN_S, "Ctrl-C"))
        ended = _follow(supervisor, spec, say, watch)
    cluster.kill(supervisor)
    if isinstance(ended, Failed):
        raise JobFailed(spec.name, ended.reason, resubmit=ended.resubmit)
    return ended


def _check_base(job: str, tier: StoreTier) -> None:
    store = open_store(tier.url)
    if not any(CommitLog(store, name).checkpoints() for name in (tier.share_with, job)):
        raise ConfigError(f"job {tier.share_with} has no checkpoint in {store.url} that could be shared", key="share_with",
                          remedy="check its name, or remove the key")  # fmt: skip


def connect() -> None:
    """Join the cluster of this process's environment, or the local one; start one when there is none."""
    if not ray.is_initialized():
        ray.init(namespace=cluster.NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)


def submit(train: Callable[[Any], None], job: Job, *, where: Any = "DEFAULT") -> Any:
    """The job's supervisor, started or found: it needs no driver from here on. `where` is a Ray scheduling strategy."""
    return submit_pickled(ray.cloudpickle.dumps(train), job, where=where)


def submit_pickled(pickled: bytes, job: Job, *, where: Any = "DEFAULT") -> Any:
    """As `submit`, of a function that was pickled before."""
    if len(pickled) > TRAIN_MAX_BYTES:
        raise ConfigError(
            f"the training function weighs {len(pickled) / 2**20:.1f} MiB pickled, at most {TRAIN_MAX_BYTES >> 20} can be kept",
            key="train", remedy="build datasets and models inside it instead of capturing them",
        )  # fmt: skip
    pieces = [pickled[i : i + PIECE_BYTES] for i in range(0, len(pickled), PIECE_BYTES)]
    for _ in range(SUBMIT_TRIES):
        handle = _supervisor(job, pieces, where)
        if not _is_over(handle, job):
            return handle
        cluster.kill(handle)  # it lingers to tell how an earlier run ended; this run is a new one
        time.sleep(GONE_S)
    raise ClusterError(f"the supervisor of an earlier run of job {job.name} does not go away")


def _supervisor(job: Job, pieces: list[bytes], where: Any) -> Any:
    return ray.remote(Supervisor).options(
        name=cluster.supervisor_name(job.name), namespace=cluster.NAMESPACE, lifetime="detached", get_if_exists=True,
        max_restarts=-1, max_task_retries=-1, num_cpus=0, max_concurrency=CALLS_AT_ONCE, scheduling_strategy=where,
    ).remote(codec.to_json(job), secrets.token_bytes(32), *pieces)  # fmt: skip


def _is_over(handle: Any, job: Job) -> bool:
    """Whether a supervisor has ended its job. Raises ClusterError when it does not start."""
    try:
        return bool(ray.get(handle.snapshot.remote(), timeout=START_S)["over"])
    except ray.exceptions.ActorDiedError:
        return True  # an earlier run's, in the very moment of its end
    except ray.exceptions.RayError as error:
        cluster.kill(handle)
        raise ClusterError(f"the supervisor of job {job.name} did not start: {error}") from error


def _follow(supervisor: Any, job: Job, say: Callable[[str], None],
            watch: Callable[[dict[str, Any]], None] | None) -> Outcome | Failed:  # fmt: skip
    """Show what goes on until the job is over."""
    shown = ""
    while True:
        ended = ray.get(supervisor.wait.remote(POLL_S))
        now = ray.get(supervisor.snapshot.remote())
        if watch is not None:
            watch(now)
        line = f"job {job.name}: {now['phase']}, attempt {now['attempt']}, {now['world']} workers"
        if line != shown:
            say(f"{line}, step {now['step']}")
            shown = line
        if ended is not None:
            phase: Finished | Failed = codec.from_json(Finished | Failed, ended)
            return phase if isinstance(phase, Failed) else Outcome(job.name, phase.drained, now["step"])


def speech(quiet: bool) -> Callable[[str], None]:
    """What tells of a job's progress: on stderr, or not at all."""
    return _silent if quiet else _print


def _print(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    return None
