"""`ray-dr restore JOB --to FILE.safetensors`, or `--to FOLDER --as dcp`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

from ray_dr.checkpoint.export import export_safetensors
from ray_dr.checkpoint.reader import Kind, StoreSource
from ray_dr.cli.progress import Live
from ray_dr.cli.stored import find_job, job_argument
from ray_dr.cli.words import duration, print_json, size
from ray_dr.errors import CheckpointError, CorruptChunk


@click.command("restore")
@job_argument
@click.option("--step", type=click.IntRange(min=0), help="Which checkpoint; without it, the newest.")
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="File or folder to write.")
@click.option("--as", "form", type=click.Choice(["safetensors", "dcp"]), default="safetensors", show_default=True,
              help="One safetensors file, or a folder that torch.distributed.checkpoint loads.")  # fmt: skip
def command(job: str, store: str | None, as_json: bool, step: int | None, target: Path, form: str) -> None:
    """Write a committed checkpoint in another form, from the store alone. Every chunk is checked."""
    found = find_job(job, store)
    manifest = found.checkpoint(step)
    parts = found.parts(manifest)
    total = sum(part.size for part in parts)
    began = time.monotonic()
    with Live() as live:
        meter = Meter(live, total)
        sources = {part.rank: [Metered(found.source(part), meter)] for part in parts}
        try:
            _export(form)(target, parts, sources, on_corrupt=lambda error: _warn(live, error))
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
        live.clear()
    took_s = time.monotonic() - began
    version = manifest.version
    if as_json:
        print_json({"job": found.name, "step": version.step, "attempt": version.attempt, "to": str(target),
                    "bytes": total, "took_s": took_s})  # fmt: skip
        return
    click.echo(f"step {version.step} of attempt {version.attempt}: {size(total)} in {duration(took_s)} -> {target}")


def _export(form: str) -> Callable[..., dict[str, int]]:
    """What writes the form; torch is imported for its own alone."""
    if form == "safetensors":
        return export_safetensors
    from ray_dr.train.dcp import export_dcp

    return export_dcp


@dataclass(slots=True)
class Meter:
    """Bytes read so far, shown while they grow."""

    live: Live
    total: int
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """Count bytes, from any thread."""
        with self.lock:
            self.done += count
            share = self.done / self.total if self.total else 1.0
            self.live.show([f"restoring: {size(self.done)} of {size(self.total)} ({share:.0%})"])


@dataclass(frozen=True, slots=True)
class Metered:
    """A source whose bytes are counted."""

    source: StoreSource
    meter: Meter

    @property
    def name(self) -> str:
        """The store's URL."""
        return self.source.name

    @property
    def kind(self) -> Kind:
        """Always the store."""
        return self.source.kind

    def read(self, rank: int, start: int, into: memoryview) -> None:
        """Read on, and count."""
        self.source.read(rank, start, into)
        self.meter.add(into.nbytes)


def _warn(live: Live, error: CorruptChunk) -> None:
    live.say(f"ray-dr: {error}")
