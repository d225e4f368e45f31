"""`ray-dr status JOB`."""

from __future__ import annotations

import time

import click

from ray_dr.cli.stored import find_job, job_argument
from ray_dr.cli.words import duration, facts, print_json
from ray_dr.model.checkpoint import Manifest, VersionId
from ray_dr.model.codec import to_json
from ray_dr.telemetry.timeline import JobStatus
from ray_dr.telemetry.timeline import status as fold

OVER = ("finished", "failed")
VERSIONS_SHOWN = 3


@click.command("status")
@job_argument
def command(job: str, store: str | None, as_json: bool) -> None:
    """Where a job stands: what it does, how far it is, what it could go on from."""
    found = find_job(job, store)
    told = fold(found.records())
    newest = (found.checkpoints() or (None,))[-1]
    now = time.time()
    if as_json:
        print_json({**to_json(told), "job": found.name, "store": found.store.url, "committed": to_json(newest),
                    "heard_s_ago": now - told.updated_at if told.updated_at else None})  # fmt: skip
        return
    click.echo(describe(found.name, found.store.url, told, newest, now=now))


def describe(name: str, url: str, told: JobStatus, newest: Manifest | None, *, now: float) -> str:
    """The facts as text; `now` in UTC seconds."""
    return facts(
        [
            ("job", name),
            ("store", url),
            ("state", _phase(told)),
            ("step", f"{told.step}" if told.loss is None else f"{told.step}, loss {told.loss:.4f}"),
            ("samples", f"{told.samples:,}"),
            ("alive", "nothing, it is over" if told.phase in OVER else f"{told.nodes} nodes, {told.workers} workers"),
            ("attempt", f"{told.attempt}, term {told.term}, {told.incidents} incidents"),
            ("checkpoint", _committed(newest, now)),
            ("armed", _armed(told)),
            *_tiers(told),
            *((f"  in {place}", f"step {version.step} of attempt {version.attempt}, {told.saved.get(place, 0)} so far")
              for place, version in told.newest.items()),
            *((name, text) for name, text in (("cadence", told.cadence), ("objective", told.unmet)) if text),
            ("last word", f"{duration(max(0.0, now - told.updated_at))} ago" if told.updated_at else "never"),
            ("reason", told.reason or "no decision yet"),
        ]
    )  # fmt: skip


def _armed(told: JobStatus) -> str:
    if told.armed is None:
        return "nothing yet: no version has all its copies in memory"
    return f"step {told.armed.step}: a loss now costs the {told.at_risk} steps since"


def _tiers(told: JobStatus) -> list[tuple[str, str]]:
    """A line per version, the newest first: how many of its parts have all their copies in each place."""
    found: dict[VersionId, list[str]] = {}
    for row in told.tiers:
        found.setdefault(row.version, []).append(f"{row.where} {row.parts}/{row.world}")
    return [(f"  step {version.step}", ", ".join(found[version])) for version in sorted(found, reverse=True)[:VERSIONS_SHOWN]]


def _phase(told: JobStatus) -> str:
    if told.drained:
        return "drained: saved and stopped on request, run it again to go on"
    if told.phase == "failed":
        return f"failed: {'run it again to go on' if told.resubmit else 'do not resubmit, it would fail the same way'}"
    return told.phase


def _committed(newest: Manifest | None, now: float) -> str:
    if newest is None:
        return "none committed yet"
    age = duration(max(0.0, now - newest.created_at))
    return f"step {newest.version.step} of attempt {newest.version.attempt}, committed {age} ago"
