"""`ray-dr status JOB`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click

from ray_dr.cli.stored import find_job, job_argument
from ray_dr.cli.words import duration, facts, print_json, short, size
from ray_dr.model.checkpoint import Manifest, VersionId
from ray_dr.model.codec import to_json
from ray_dr.model.upload import Saving
from ray_dr.telemetry.live import LiveView, read_live
from ray_dr.telemetry.timeline import JobStatus
from ray_dr.telemetry.timeline import status as fold

OVER = ("finished", "failed")
VERSIONS_SHOWN = 3
SILENT_S = 10.0
"""A save whose last word is older is said to be silent."""


@click.command("status")
@job_argument
def command(job: str, store: str | None, as_json: bool) -> None:
    """Where a job stands: what it does, how far it is, what it could go on from."""
    found = find_job(job, store)
    told = fold(found.records())
    newest = (found.checkpoints() or (None,))[-1]
    live = read_live(found.store, found.name)
    now = time.time()
    if as_json:
        print_json({**to_json(told), "job": found.name, "store": found.store.url, "committed": to_json(newest),
                    "live": to_json(live), "heard_s_ago": now - told.updated_at if told.updated_at else None})  # fmt: skip
        return
    click.echo(describe(found.name, found.store.url, told, newest, live, now=now))


def describe(
    name: str, url: str, told: JobStatus, newest: Manifest | None, live: LiveView | None = None, *, now: float
) -> str:
    """The facts as text; `now` in UTC seconds."""
    return facts(
        [
            ("job", name),
            ("store", url),
            ("state", _phase(told)),
            ("step", f"{told.step}" if told.loss is None else f"{told.step}, loss {told.loss:.4f}"),
            ("samples", f"{told.samples:,}"),
            ("alive", "nothing, it is over" if told.phase in OVER else f"{told.nodes} nodes, {told.workers} workers"),
            *([("standing by", ", ".join(told.standbys))] if told.standbys else []),
            ("attempt", f"{told.attempt}, term {told.term}, {told.incidents} incidents"),
            ("checkpoint", _committed(newest, now)),
            ("armed", _armed(told)),
            *_tiers(told),
            *((f"  in {place}", f"step {version.step} of attempt {version.attempt}, {told.saved.get(place, 0)} so far")
              for place, version in told.newest.items()),
            *saves(live, told, now=now),
            *(("leaving", short(text)) for text in told.leaving if told.phase not in OVER),
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


def saves(live: LiveView | None, told: JobStatus, *, now: float) -> Iterator[tuple[str, str]]:
    """The save on its way to the store, and the last that got there, with how fast."""
    if live is None:
        return
    if live.saving is not None and told.phase not in OVER and live.term == told.term:
        yield "  on its way", _on_its_way(live.saving, now)
    if live.saved is not None:
        saved = live.saved
        took = duration(saved.at - saved.begun_at)
        yield "  last save", f"step {saved.version.step}: {size(saved.size)} in {took}, {_speed(saved)}"


def _on_its_way(saving: Saving, now: float) -> str:
    share = f"{saving.done / saving.size:.0%}" if saving.size else "all"
    parts = "" if saving.parts == saving.world else f" of {saving.parts} of {saving.world} parts"
    silent_s = now - saving.at
    silent = f", nothing new for {duration(silent_s)}" if silent_s > SILENT_S else ""
    return (
        f"step {saving.version.step}: {size(saving.done)} of {size(saving.size)}{parts} ({share}), "
        f"for {duration(max(0.0, now - saving.begun_at))}, {_speed(saving)}{silent}"
    )


def _speed(saving: Saving) -> str:
    again = saving.done - saving.sent
    return f"{size(saving.bytes_per_s)}/s" + (f", {size(again)} were there already" if again else "")
