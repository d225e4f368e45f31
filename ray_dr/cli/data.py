"""`ray-dr data verify JOB`."""

from __future__ import annotations

import click

from ray_dr.cli.main import FAILED
from ray_dr.cli.stored import find_job, job_argument
from ray_dr.cli.words import facts, print_json
from ray_dr.model.codec import to_json
from ray_dr.telemetry.lineage import DataReport
from ray_dr.telemetry.timeline import verify_data


@click.group("data")
def command() -> None:
    """What a job's journal proves about its data."""


@command.command("verify")
@job_argument
def verify(job: str, store: str | None, as_json: bool) -> None:
    """Prove that every sample was used exactly once per epoch, in the job's one order, over kills and resizes.

    Exit status 1 when the journal does not prove it.
    """
    found = find_job(job, store)
    report = verify_data(found.records())
    if as_json:
        print_json({"job": found.name, "ok": report.ok, **to_json(report)})
    else:
        click.echo(describe(report))
    if not report.ok:
        raise SystemExit(FAILED)


def describe(report: DataReport) -> str:
    """The proof, or what is wrong with it, as text."""
    epochs = ", ".join(f"epoch {epoch}: {used:,}" for epoch, used in report.epochs.items()) or "none"
    lines = facts(
        [
            ("steps", f"{report.steps:,} of {report.global_batch} samples each"),
            ("samples used", f"{report.used:,} ({epochs})"),
            *([("skipped", report.skipped)] if report.skipped else []),
            *([("quarantined", report.quarantined)] if report.quarantined else []),
            ("lost", report.lost),
            ("repeated", report.repeated),
            ("unwitnessed", report.unwitnessed),
            ("in another order", report.mismatched),
        ]
    )
    verdict = "proven: every sample exactly once, in order" if report.ok else "NOT proven"
    return "\n".join([lines, *(f"  {line}" for line in report.differences), verdict])
