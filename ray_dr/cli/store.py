"""`ray-dr store check URL`."""

from __future__ import annotations

from typing import Any

import click

from ray_dr.cli.main import FAILED
from ray_dr.cli.progress import Live
from ray_dr.cli.words import duration, print_json, size, table
from ray_dr.errors import ConfigError, StoreError
from ray_dr.stores.base import Store
from ray_dr.stores.examine import DEFAULT_BYTES, SMALL_REQUESTS, Examined, examine
from ray_dr.stores.open import open_store

PART_BYTES = 5 * 2**20
"""The smallest part S3 takes: so multipart uploads are tried without sending much."""


@click.group("store")
def command() -> None:
    """What a store keeps of what it promises."""


@command.command("check")
@click.argument("url")
@click.option(
    "--bytes", "count", type=click.IntRange(min=1), default=DEFAULT_BYTES, show_default=True,
    help="How much to move for each of the four throughputs.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(url: str, count: int, as_json: bool) -> None:
    """Try out a bucket or a directory: conditional writes, consistency, ranges, parts, checksums, latency, throughput.

    Works in a folder of its own below probe/, which is removed afterwards, also after an error or Ctrl-C (a versioned
    bucket keeps the old versions). Sends about 50 MB besides --bytes. Exit status 1 when something does not hold that
    commits or data rest on.
    """
    try:
        store = open_store(url, part_bytes=PART_BYTES)
    except StoreError as error:
        raise ConfigError(str(error), remedy="check the store's URL", key="URL") from error
    with Live() as live:
        try:
            found = examine(
                store, count, show=lambda line: live.show([f"checking {store.url}: {line}"]),
                left=lambda key: live.say(f"ray-dr: the store does not let this be removed: {key}"),
            )  # fmt: skip
        finally:
            live.clear()
    if as_json:
        print_json(as_dict(store, found, count))
    else:
        click.echo(describe(store, found))
    if not found.sound:
        raise SystemExit(FAILED)


def describe(store: Store, found: Examined) -> str:
    """The tables, and the verdict in words."""
    checks = table(
        ("check", "rests on it", "holds", "what was seen", "took"),
        [
            (each.check.name, each.check.rests, "yes" if each.holds else "NO", each.said, duration(each.took_s))
            for each in found.outcomes
        ],
        right=(4,),
    )
    latencies = table(
        (f"latency of {SMALL_REQUESTS}", "bytes", "median", "p95"),
        [(each.operation, each.size, _ms(each.median_s), _ms(each.p95_s)) for each in found.latencies],
        right=(1, 2, 3),
    )
    throughputs = table(
        ("throughput", "threads", "bytes", "in pieces of", "took", "MB/s"),
        [
            (each.operation, each.threads, size(each.size), size(each.piece), duration(each.took_s),
             f"{each.mb_per_s:.0f}")
            for each in found.throughputs
        ],
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    return "\n\n".join([f"store {store.url}", checks, latencies, throughputs, verdict(found)])


def verdict(found: Examined) -> str:
    """What can be relied on here."""
    weaker = "\n".join(f"weaker here: {words}" for words in found.weaker)
    if not found.sound:
        return f"NOT SOUND\n{weaker}"
    return f"sound, but\n{weaker}" if weaker else "sound: commits and data are safe here, also with several writers"


def as_dict(store: Store, found: Examined, count: int) -> dict[str, Any]:
    """All of it, times in seconds, throughputs in 10**6 bytes per second."""
    return {
        "store": store.url,
        "sound": found.sound,
        "weaker": list(found.weaker),
        "bytes": count,
        "checks": [
            {"name": each.check.name, "rests": each.check.rests, "holds": each.holds, "said": each.said,
             "took_s": each.took_s}
            for each in found.outcomes
        ],
        "latency": [
            {"operation": each.operation, "bytes": each.size, "median_s": each.median_s, "p95_s": each.p95_s}
            for each in found.latencies
        ],
        "throughput": [
            {"operation": each.operation, "threads": each.threads, "bytes": each.size, "piece_bytes": each.piece,
             "took_s": each.took_s, "mb_per_s": each.mb_per_s}
            for each in found.throughputs
        ],
    }  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
