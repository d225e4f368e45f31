"""`ray-dr nodes` and `ray-dr nodes release NAME`."""

from __future__ import annotations

import time

import click

from ray_dr import config
from ray_dr.cli.words import duration, print_json, table
from ray_dr.errors import ConfigError, StoreError
from ray_dr.model.nodes import Entry, Pardon
from ray_dr.recovery.lemons import Score, score
from ray_dr.stores.base import Store
from ray_dr.telemetry.nodes import NodeBook


@click.group("nodes", invoke_without_command=True)
@click.option("--store", metavar="URL", help="The store whose jobs told of them; else the default store.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(ctx: click.Context, store: str | None, as_json: bool) -> None:
    """Machines that jobs of a store had trouble with, the worst first. Works from the store alone.

    Each incident that began with a machine gives it points, which halve in a week. A condemned machine is left out when a job
    looks for nodes, until its cool-off is over; a job spares condemned ones where it would leave out more than a tenth of the
    machines at hand (one may always go), or keep too few to run, and says so in its journal (node.spared).
    """
    if ctx.invoked_subcommand is not None:
        ctx.obj = store
        return
    place, entries = _read(store)
    now = time.time()
    scores = [one for one in score(entries, (), now) if one.charges]
    if as_json:
        print_json({"store": place.url, "nodes": [_as_dict(one) for one in scores]})
        return
    if not scores:
        click.echo(f"nothing is held against any machine in {place.url}")
        return
    rows = [
        (one.machine, one.standing, f"{one.points:.1f}", one.charges, duration(max(0.0, now - one.newest)),
         duration(one.until - now) if one.until else "", one.reason)
        for one in scores
    ]  # fmt: skip
    click.echo(table(("machine", "", "points", "incidents", "newest", "left out for", "because"), rows, right=(2, 3, 4, 5)))


@command.command("release")
@click.argument("name")
@click.option("--store", metavar="URL", help="As of `ray-dr nodes`.")
@click.pass_context
def release(ctx: click.Context, name: str, store: str | None) -> None:
    """Let a machine be used again: whatever is held against it up to now counts no more. Running jobs see it in a minute."""
    place, entries = _read(store or ctx.obj)
    known = sorted({entry.machine for entry in entries})
    if name not in known:
        remedy = f"known are {', '.join(known[:10])}" if known else "nothing is held against any machine there"
        raise ConfigError(f"{place.url} knows no machine {name!r}", remedy=remedy, key="NAME")
    NodeBook(place, time.time).add(Pardon(name, time.time()))
    click.echo(f"{name} is released")


def _read(url: str | None) -> tuple[Store, tuple[Entry, ...]]:
    from ray_dr.stores.open import open_store, refuse_locked

    try:
        store = open_store(url or config.default_store())
    except StoreError as error:
        raise ConfigError(str(error), remedy="check the store's URL", key="--store") from error
    refuse_locked(store)
    return store, NodeBook(store, time.time).entries()


def _as_dict(one: Score) -> dict[str, object]:
    """All of a score; times in UTC seconds, `rate` in points per day."""
    return {
        "machine": one.machine, "standing": one.standing, "points": one.points, "rate": one.rate, "excess": one.excess,
        "incidents": one.charges, "newest": one.newest, "until": one.until, "reason": one.reason,
    }  # fmt: skip
