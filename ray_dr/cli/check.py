"""`ray-dr check JOB`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import click

from ray_dr.checkpoint.trial import trial_units
from ray_dr.cli.main import FAILED
from ray_dr.cli.progress import Live
from ray_dr.cli.stored import StoredJob, find_job, job_argument
from ray_dr.cli.words import print_json, size, table
from ray_dr.errors import ConfigError
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.codec import from_json, to_json
from ray_dr.repository.check import (
    Damage,
    Inventory,
    Progress,
    Unit,
    begin,
    chunk_units,
    look,
    merge,
    still_there,
    stretch,
    take_inventory,
)
from ray_dr.repository.layout import parts_prefix

LEVELS = ("listing", "hashes", "restore")
SAVE_S = 2.0
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)%")


def _share(_: click.Context, __: click.Parameter, value: str) -> float:
    """`5%` -> 0.05."""
    found = _SHARE.fullmatch(value.strip())
    if found is None or not 0 < float(found[1]) <= 100:
        raise click.BadParameter(f"{value!r} is no percentage above 0% and up to 100%; write 5%")
    return float(found[1]) / 100


@click.command("check")
@job_argument
@click.option("--level", type=click.Choice(LEVELS), default="hashes", show_default=True, help="How thoroughly.")
@click.option("--sample", callback=_share, default="100%", help="Read this share only, the next one each time: 5%.")
@click.option(
    "--progress", "path", type=click.Path(path_type=Path, dir_okay=False), help="Where to note how far it came."
)
@click.option("--anew", is_flag=True, help="Begin anew, also when a check was stopped half way.")
def command(
    job: str, store: str | None, as_json: bool, level: str, sample: float, path: Path | None, anew: bool
) -> None:
    """Prove that what a restore would need is there, and is what was saved. Only reads from the store.

    \b
    listing   the log and all part lists are read and hashed; every object they name exists with its size
    hashes    besides, every chunk is read and hashed
    restore   besides, every tensor of every checkpoint is assembled in memory, as a restore does

    A check that was stopped goes on where it was when it is called again. How far it came is in a file below ~/.ray_dr/checks,
    not in the store: whoever checks need not be allowed to write there. Exit status 1 when anything is damaged.
    """
    found = find_job(job, store)
    began = time.monotonic()
    file = path or progress_file(found, level)
    view = found.log()
    fresh = Progress(1, found.name, found.store.url, level, sample, tuple(each.version for each in view.checkpoints))
    before = None if anew else read_progress(file)
    progress = begin(fresh, before)
    inventory = take_inventory(found.store, found.name, view, progress.versions)
    units = _units(found, level, inventory)
    progress = replace(progress, again=tuple({*progress.again} & {unit.name for unit in units}))
    due = stretch(units, progress)
    resumed = progress.reached > 0
    with Live() as live:
        progress = _look(found, due, progress, file, live, threads=1 if level == "restore" else 8)
        live.clear()
    damaged = still_there(_with_users((*inventory.damaged, *progress.damaged), inventory), found.log())
    missed = len(set(fresh.versions) - set(progress.versions))
    read = sum(unit.size for unit in due)
    if as_json:
        print_json({
            "job": found.name, "store": found.store.url, "level": level, "whole": not damaged,
            "versions": [{**to_json(version), "whole": not _of(damaged, version)} for version in progress.versions],
            "objects": inventory.objects, "bytes": inventory.size, "bytes_read": read, "share": sample,
            "resumed": resumed, "newer_versions": missed, "damaged": to_json(damaged),
            "took_s": time.monotonic() - began,
        })  # fmt: skip
    else:
        _tell(progress, inventory, damaged, read, missed)
    if damaged:
        click.get_current_context().exit(FAILED)


def progress_file(job: StoredJob, level: str) -> Path:
    """Where a check of this job at this level notes how far it came."""
    where = hashlib.sha256(job.store.url.encode()).hexdigest()[:12]
    return Path.home() / ".ray_dr" / "checks" / f"{job.name}-{where}-{level}.json"


def read_progress(file: Path) -> Progress | None:
    """What a check noted last; None when there is nothing that this version understands."""
    try:
        progress: Progress = from_json(Progress, json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return progress if progress.format == 1 else None


def known_damage(job: StoredJob) -> tuple[Damage, ...]:
    """What the last checks of this job from here have found."""
    noted = [read_progress(progress_file(job, level)) for level in LEVELS]
    return merge(each for progress in noted if progress is not None for each in progress.damaged)


def _units(found: StoredJob, level: str, inventory: Inventory) -> list[Unit]:
    """What is to be read. A checkpoint whose part lists are not all readable can't be put together: its chunks are read."""
    if level == "listing":
        return []
    if level == "hashes":
        return chunk_units(found.store, found.name, inventory)
    lists = parts_prefix(found.name)
    broken = {version for damage in inventory.damaged if damage.key.startswith(lists) for version in damage.versions}
    chunks = {key: needed for key, needed in inventory.chunks.items() if broken & set(needed[1])}
    return chunk_units(found.store, found.name, replace(inventory, chunks=chunks)) + [
        unit
        for version, parts in inventory.parts.items()
        if version not in broken
        for unit in trial_units(found.store, found.name, version, parts)
    ]


def _look(
    found: StoredJob, due: Sequence[Unit], progress: Progress, file: Path, live: Live, *, threads: int
) -> Progress:
    """Look at what is due; note how far it came now and then, and when it is stopped."""
    total, read, done, first = sum(unit.size for unit in due), 0, 0, len(progress.again)
    said: set[str] = set()
    saved = time.monotonic()
    try:
        for unit, reached in look(due, progress, threads=threads):
            read, done, progress = read + unit.size, done + 1, reached
            for damage in progress.damaged:
                if damage.key not in said:
                    live.say(f"ray-dr: {damage.key} {damage.what}")
                    said.add(damage.key)
            live.show([f"checking {found.name}: {size(read)} of {size(total)} ({read / total if total else 1:.0%})"])
            # Until all that was damaged before has been looked at again, the older note knows more.
            if done >= first and time.monotonic() - saved > SAVE_S:
                _write(file, progress)
                saved = time.monotonic()
    except BaseException:
        if done >= max(1, first):
            _write(file, progress)
        raise
    progress = replace(progress, finished=True)
    _write(file, progress)
    return progress


def _write(file: Path, progress: Progress) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(to_json(progress)))
        unfinished.replace(file)
    except OSError as error:
        what = f"{file} cannot be written: {error.strerror or error}"
        raise ConfigError(what, remedy="name another file", key="--progress") from error


def _with_users(damaged: Iterable[Damage], inventory: Inventory) -> tuple[Damage, ...]:
    """Each damaged object once, with all checkpoints that need it."""
    return merge(
        replace(each, versions=inventory.chunks[each.key][1]) if each.key in inventory.chunks else each
        for each in damaged
    )


def _of(damaged: Iterable[Damage], version: VersionId) -> list[Damage]:
    return [damage for damage in damaged if version in damage.versions]


def _tell(progress: Progress, inventory: Inventory, damaged: Sequence[Damage], read: int, missed: int) -> None:
    if not progress.versions:
        click.echo("no checkpoint is committed")
    rows = [
        (version.step, version.attempt, f"damaged ({len(bad)})" if (bad := _of(damaged, version)) else "whole")
        for version in progress.versions
    ]
    click.echo(table(("step", "attempt", progress.level), rows, right=(0, 1)))
    for damage in damaged:
        steps = ", ".join(f"step {version.step} of attempt {version.attempt}" for version in damage.versions)
        click.echo(f"damaged: {damage.key} {damage.what}; needed by {steps or 'the log'}")
    click.echo(f"{inventory.objects} objects, {size(inventory.size)}; read and hashed now: {size(read)}")
    if progress.share < 1:
        click.echo(f"a sample of {progress.share:.3%}; the next check takes the next")
    if missed:
        click.echo(f"{missed} newer checkpoints were committed since this check began: check again for them")
