"""A job as its store knows it: JOB on the command line -> the store, the name, the journal, the checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from ray_dr import config
from ray_dr.checkpoint.direct import find_version
from ray_dr.checkpoint.reader import StoreSource
from ray_dr.errors import ConfigError, StoreError
from ray_dr.model.checkpoint import Manifest, Part
from ray_dr.model.job import Job
from ray_dr.model.journal import Record
from ray_dr.repository.commit import CommitLog, LogView
from ray_dr.repository.layout import JOBS_PREFIX
from ray_dr.repository.parts import read_part
from ray_dr.stores.base import Store
from ray_dr.telemetry.journal import read_journal

Command = TypeVar("Command", bound=Callable[..., Any])
READ_TRIES = 3
LISTED_MOST = 5000


@dataclass(frozen=True, slots=True)
class StoredJob:
    """What is known of a job without its cluster."""

    name: str
    store: Store

    def records(self) -> list[Record]:
        """The whole journal; it may be written meanwhile. Raises StoreError for one that is damaged."""
        for attempt in range(READ_TRIES):
            try:
                return list(read_journal(self.store, self.name))
            except ValueError as error:
                if attempt == READ_TRIES - 1:
                    raise StoreError(f"the journal of job {self.name} cannot be read: {error}") from error
                time.sleep(0.2)  # a segment listed before the one ahead of it became visible
        raise AssertionError("unreachable")

    def log(self) -> LogView:
        """The commit log as it is now."""
        return CommitLog(self.store, self.name).refresh()

    def checkpoints(self) -> tuple[Manifest, ...]:
        """Committed checkpoints, oldest first."""
        return self.log().checkpoints

    def checkpoint(self, step: int | None = None) -> Manifest:
        """As `direct.find_version`."""
        return find_version(self.store, self.name, step)

    def parts(self, manifest: Manifest) -> tuple[Part, ...]:
        """A checkpoint's part lists, verified, in rank order."""
        return tuple(read_part(self.store, ref) for ref in manifest.parts)

    def source(self, part: Part) -> StoreSource:
        """Where a part's bytes are read from."""
        return StoreSource(self.store, self.name, part)


def find_job(job: str, store_url: str | None) -> StoredJob:
    """The job that JOB and --store name. Raises ConfigError for a bad job.yaml or a job nobody ever ran."""
    from ray_dr.stores.open import open_store, refuse_locked

    spec = read_spec(job)
    if spec is not None:
        name, url = spec.name, store_url or spec.store.url
    else:
        name, url = job, store_url or config.default_store()
    try:
        store = open_store(url)
    except StoreError as error:
        raise ConfigError(str(error), remedy="check the store's URL", key="--store") from error
    refuse_locked(store)
    if next(iter(store.list(f"{JOBS_PREFIX}{name}/")), None) is None:
        raise ConfigError(f"{store.url} knows no job {name!r}", remedy=_others(store), key="JOB")
    return StoredJob(name, store)


def read_spec(job: str) -> Job | None:
    """What JOB says when it is the path of a job.yaml; None for a name. Raises ConfigError for a bad one."""
    return config.load(job) if job.endswith((".yaml", ".yml")) or Path(job).is_file() else None


def job_argument(command: Command) -> Command:
    """JOB, --store and --json, as all verbs have them that read from the store."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)
    command = click.option("--store", metavar="URL", help="Where the job lies, when JOB is a name.")(command)
    return click.argument("job")(command)


def _others(store: Store) -> str:
    keys = itertools.islice(store.list(JOBS_PREFIX), LISTED_MOST)
    names = sorted({entry.key.split("/")[1] for entry in keys})
    if not names:
        return "there are no jobs at all: write --store URL or the path of its job.yaml"
    return f"it knows {', '.join(names[:10])}{' and more' if len(names) > 10 else ''}"
