"""`ray-dr resume JOB`."""

from __future__ import annotations

import time
from dataclasses import replace

import click

from ray_dr import config
from ray_dr.cli.main import INTERRUPTED
from ray_dr.cli.run import load_program
from ray_dr.cli.stored import StoredJob, find_job, job_argument, read_spec
from ray_dr.cli.words import print_json
from ray_dr.errors import ConfigError, JobFailed
from ray_dr.model.codec import from_json
from ray_dr.model.job import Job
from ray_dr.model.lease import Lease, Program
from ray_dr.repository.lease import read_lease
from ray_dr.repository.program import read_program


@click.command("resume")
@job_argument
@click.option("--address", metavar="ADDRESS", help="The cluster to go on on: host:port. Else RAY_ADDRESS, else this machine.")
@click.option("--program", metavar="PROGRAM", help="Run this, as of `ray-dr run`, instead of what the store has.")
@click.option("--detach", is_flag=True, help="Return as soon as the supervisor has begun.")
@click.option("--force", is_flag=True, help="Also when its supervisor seems to live (it is fenced off) or it failed for good.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(job: str, store: str | None, as_json: bool, address: str | None, program: str | None, detach: bool,
            force: bool, quiet: bool) -> None:  # fmt: skip
    """Go on with a job whose cluster is gone, on another cluster, from its store alone.

    The store has the job's spec, its training function and its working directory, kept when it began; a job.yaml in JOB's
    place overrides the spec. Runs what lies in the store: whoever may write there decides what that is, unless it is
    encrypted or --program says what to run. Packages that the program imports must be installed there.

    Exit status, besides that of `run`: 1 its supervisor lives; 2 no such job, it has finished, or no program was kept.
    """
    found = find_job(job, store)
    lease, seen_at = read_lease(found.store, found.name), time.monotonic()
    _refuse(found.name, lease, force=force)
    kept = read_program(found.store, found.name)
    spec = _spec(found, job, store, kept)
    train = load_program(program) if program else None
    if train is None and kept is None:
        raise ConfigError(f"the store has no program of job {found.name}", remedy="say which: --program train.py", key="JOB")
    environment = _environment(kept) if kept else {}
    from ray_dr.actors import launch, resuming

    say = launch.speech(quiet)
    for what in resuming.strangeness(kept) if kept and train is None else ():
        say(f"job {found.name}: WARNING: {what}")
    supervisor = resuming.resume(
        resuming.Found(spec, found.store, kept, None if force else lease, seen_at, train),
        address=address, environment=environment, say=say,
    )  # fmt: skip
    if detach:
        _tell(as_json, found.name, "resumed", f"its supervisor has begun; `ray-dr status {found.name}` tells more")
        return
    outcome = launch.conduct(supervisor, spec, say)
    how = "drained" if outcome.drained else "finished"
    _tell(as_json, found.name, how, f"{how} after step {outcome.step}", step=outcome.step)
    if outcome.drained:
        raise SystemExit(INTERRUPTED)


def _refuse(job: str, lease: Lease | None, *, force: bool) -> None:
    """Raise where the job is over."""
    if lease is not None and lease.over == "finished":
        remedy = f"`ray-dr restore {job}` writes what it trained"
        raise ConfigError(f"job {job} has finished, after step {lease.step}", remedy=remedy, key="JOB")
    if lease is not None and lease.over == "failed" and not lease.resubmit and not force:
        raise JobFailed(job, lease.reason, resubmit=False)


def _spec(found: StoredJob, job: str, store: str | None, kept: Program | None) -> Job:
    """What JOB says, else what was kept, with the store that --store names."""
    spec = read_spec(job)
    if spec is None:
        if kept is None:
            remedy = "give the path of its job.yaml in JOB's place"
            raise ConfigError(f"the store has no program of job {found.name}", remedy=remedy, key="JOB")
        spec = from_json(Job, kept.spec)
    return replace(spec, store=replace(spec.store, url=config.store_url(store))) if store else spec


def _environment(kept: Program) -> dict[str, str]:
    """Values of the variables that were not kept. Raises ConfigError where one is not set here."""
    found = config.variables(kept.names)
    if missing := sorted(set(kept.names) - set(found)):
        what = f"the program wants {', '.join(missing)}, whose values are not kept in a store that is not encrypted"
        raise ConfigError(what, remedy="set them here", key="JOB")
    return found


def _tell(as_json: bool, job: str, outcome: str, text: str, **more: object) -> None:
    if as_json:
        print_json({"job": job, "outcome": outcome, **more})
    else:
        click.echo(f"job {job}: {text}")
