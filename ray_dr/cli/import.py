"""`ray-dr import SOURCE --store URL --job NAME`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ray_dr.checkpoint.direct import DEFAULT_JOB, DirectJob
from ray_dr.checkpoint.foreign import import_foreign, open_foreign
from ray_dr.cli.words import duration, print_json, size
from ray_dr.stores.open import open_store


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--store", metavar="URL", required=True, help="Where to put it.")
@click.option("--job", default=DEFAULT_JOB, show_default=True, help="The job whose newest checkpoint it becomes.")
@click.option("--step", type=click.IntRange(min=0), help="Its step; without it, one after the newest, from 0.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(source: Path, store: str, job: str, step: int | None, as_json: bool) -> None:
    """Bring a checkpoint of another format into a store, to the bit.

    SOURCE is a .safetensors file or a folder of them, a file that torch.save wrote, or a folder of
    torch.distributed.checkpoint. Nothing in it is run: a pickle that names anything but tensors and plain values is
    refused.
    """
    began = time.monotonic()
    found = open_foreign(source)
    manifest = import_foreign(found, DirectJob(open_store(store), job), step)
    total, took_s = sum(box.size for box in found.tensors), time.monotonic() - began
    if as_json:
        print_json({"job": job, "step": manifest.version.step, "attempt": manifest.version.attempt,
                    "tensors": len(found.tensors), "bytes": total, "took_s": took_s})  # fmt: skip
        return
    click.echo(f"{source} -> step {manifest.version.step} of {job}: {len(found.tensors)} tensors, {size(total)} in "
               f"{duration(took_s)}")  # fmt: skip
