"""`ray-dr guard JOB...`."""

from __future__ import annotations

import click

from ray_dr import config
from ray_dr.cli.main import DO_NOT_RESUBMIT, FAILED
from ray_dr.cli.stored import StoredJob, find_job
from ray_dr.cli.words import print_json
from ray_dr.errors import ConfigError
from ray_dr.recovery.guarding import GuardPolicy
from ray_dr.repository.program import read_program


@click.command("guard")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option("--store", metavar="URL", help="Where the jobs lie, for this process and the cluster; else the default store.")
@click.option("--address", metavar="URL", required=True, help="The Jobs API of the cluster to go on on: http://head:8265.")
@click.option("--on-loss", metavar="CMD", default="", help="What brings that cluster up when it can't be reached: a command, or "
              "a cluster's YAML for `ray up`.")  # fmt: skip
@click.option("--stale", metavar="SPAN", default="60s", show_default=True, help="A lease unchanged for so long is lost.")
@click.option("--start", metavar="SPAN", default="5m", show_default=True, help="How long a submitted job may take to begin.")
@click.option("--backoff", metavar="SPAN", default="1m", show_default=True, help="Between two tries; doubles up to an hour.")
@click.option("--tries", type=click.IntRange(1, 1000), default=5, show_default=True, help="Tries without a new step.")
@click.option("--python", metavar="CMD", default="python", show_default=True, help="Python with ray_dr, on the head.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object.")
def command(jobs: tuple[str, ...], store: str | None, address: str, on_loss: str, stale: str, start: str, backoff: str,
            tries: int, python: str, as_json: bool) -> None:  # fmt: skip
    """Watch the jobs' leases in their store; submit `ray-dr resume` through the Jobs API when one goes stale.

    Run it outside of the cluster it guards. A false alarm costs a restart and nothing else: the older supervisor is fenced
    off. A job that finished, was stopped by somebody, or would fail again is never submitted. What the guard does is kept in
    the store, so it can be restarted, or run twice. The cluster's token comes from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as
    for `ray job`.

    Ends when every job is over: 0 all well; 1 one was given up, or was lost while it was being stopped; 3 one failed for good.
    """
    url = config.store_url(store) if store else config.default_store()
    found = {name: find_job(name, url) for name in jobs}
    policy = GuardPolicy(
        stale_s=config.parse_span(stale, "--stale"), start_s=config.parse_span(start, "--start"),
        backoff_s=config.parse_span(backoff, "--backoff"), tries_most=tries,
    )  # fmt: skip
    for one in found.values():
        _variables(one)
    from ray_dr.actors.guard import Guard, Orders
    from ray_dr.actors.launch import speech
    from ray_dr.actors.submitting import Submitter

    orders = Orders(url, policy, on_loss, config.environment())
    ended = Guard({name: one.store for name, one in found.items()}, Submitter(address, python), orders,
                  lambda name: _variables(found[name]), speech(False)).run()  # fmt: skip
    if as_json:
        print_json({"jobs": {name: {"well": end.well, "reason": end.reason} for name, end in ended.items()}})
    for name, end in ended.items() if not as_json else ():
        click.echo(f"job {name}: {end.reason}")
    if any(end.for_good for end in ended.values()):
        raise SystemExit(DO_NOT_RESUBMIT)
    if not all(end.well for end in ended.values()):
        raise SystemExit(FAILED)


def _variables(found: StoredJob) -> dict[str, str]:
    """Values of the program's variables that the store does not have. Raises ConfigError where one is not set here."""
    kept = read_program(found.store, found.name)
    if kept is None:
        return {}
    values = config.variables(kept.names)
    if missing := sorted(set(kept.names) - set(values)):
        what = f"the program of job {found.name} wants {', '.join(missing)}, whose values are not in the store"
        raise ConfigError(what, remedy="set them where the guard runs", key="JOB")
    return values
