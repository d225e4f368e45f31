"""`ray-dr replay JOB`."""

from __future__ import annotations

from dataclasses import replace

import click

from ray_dr.cli.main import FAILED
from ray_dr.cli.stored import find_job, job_argument
from ray_dr.cli.words import print_json
from ray_dr.errors import StoreError
from ray_dr.model.actions import Decision
from ray_dr.model.codec import from_json
from ray_dr.model.events import Event
from ray_dr.model.job import Job
from ray_dr.model.journal import Decided, JobOpened
from ray_dr.model.ladder import Measured
from ray_dr.model.recovery import Policy, State
from ray_dr.recovery.machine import initial, step
from ray_dr.recovery.policy import policy_of
from ray_dr.telemetry.timeline import replay as fold


@click.command("replay")
@job_argument
def command(job: str, store: str | None, as_json: bool) -> None:
    """Decide a job's past anew with this version's code. Exit status 1 when anything comes out differently."""
    found = find_job(job, store)
    records = found.records()
    differences = fold(records, _decide, initial())
    decisions = sum(isinstance(record, Decided) for record in records)
    if as_json:
        print_json({"job": found.name, "decisions": decisions, "differences": list(differences)})
    else:
        for difference in differences:
            click.echo(difference)
        click.echo(f"{decisions} decisions replayed, {len(differences)} differences")
    if differences:
        raise SystemExit(FAILED)


def _decide(state: State, event: Event, opened: JobOpened | None, measured: Measured) -> Decision:
    if opened is None:
        raise StoreError("the journal does not say what the job ran with: its first segment is missing")
    return step(state, event, replace(_policy(opened), measured=measured))


def _policy(opened: JobOpened) -> Policy:
    """Raises StoreError for a spec that this version does not understand."""
    try:
        spec: Job = from_json(Job, opened.spec)
    except ValueError as error:
        raise StoreError(f"the spec of term {opened.term} is of another version: {error}") from error
    return policy_of(spec)
