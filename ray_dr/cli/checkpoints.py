"""`ray-dr checkpoints JOB`."""

from __future__ import annotations

import time

import click

from ray_dr.cli.stored import StoredJob, find_job, job_argument
from ray_dr.cli.words import duration, print_json, size, table
from ray_dr.errors import CheckpointError, NotFound
from ray_dr.model.checkpoint import Manifest
from ray_dr.model.codec import to_json
from ray_dr.telemetry.timeline import status


@click.command("checkpoints")
@job_argument
def command(job: str, store: str | None, as_json: bool) -> None:
    """The committed checkpoints, oldest first, and the newest version each place was last known to hold."""
    found = find_job(job, store)
    rows = [(manifest, stream_bytes(found, manifest)) for manifest in found.checkpoints()]
    newest = status(found.records()).newest
    if as_json:
        listed = [_as_json(manifest, count) for manifest, count in rows]
        print_json({"job": found.name, "checkpoints": listed, "newest": to_json(newest)})
        return
    click.echo(_table(rows, time.time()) if rows else "no checkpoint is committed")
    for place, version in newest.items():
        click.echo(f"newest in {place}: step {version.step} of attempt {version.attempt}")


def stream_bytes(job: StoredJob, manifest: Manifest) -> int | None:
    """Bytes of state in a checkpoint; None when a part list is missing or damaged."""
    try:
        return sum(part.size for part in job.parts(manifest))
    except (CheckpointError, NotFound):
        return None


def _table(rows: list[tuple[Manifest, int | None]], now: float) -> str:
    return table(
        ("step", "attempt", "term", "age", "bytes", "parts"),
        [
            (
                manifest.version.step, manifest.version.attempt, manifest.term,
                duration(max(0.0, now - manifest.created_at)), "damaged" if count is None else size(count),
                len(manifest.parts),
            )
            for manifest, count in rows
        ],
        right=range(6),
    )  # fmt: skip


def _as_json(manifest: Manifest, count: int | None) -> dict[str, object]:
    version = manifest.version
    return {
        "step": version.step, "attempt": version.attempt, "term": manifest.term, "created_at": manifest.created_at,
        "bytes": count, "parts": len(manifest.parts), "position": manifest.position,
    }  # fmt: skip
