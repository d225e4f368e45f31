"""`ray-dr simulate`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import click

from ray_dr.cli.main import FAILED
from ray_dr.cli.words import duration, print_json
from ray_dr.simulator.swarm import DAY_S
from ray_dr.simulator.sweep import Life, sweep


@click.command("simulate")
@click.option("--nodes", type=click.IntRange(min=1), default=None, help="How many the job wants.  [default: 1 to 8, by the seed]")
@click.option("--workers", type=click.IntRange(min=1), default=None,
              help="On each node.  [default: 1 with --nodes, else by the seed]")  # fmt: skip
@click.option("--days", type=click.FloatRange(min=0, min_open=True), default=None,
              help="Virtual time with faults.  [default: 10 min to 1 h, by the seed]")  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), default=100, show_default=True, help="How many lives.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True, help="The seed of the first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(nodes: int | None, workers: int | None, days: float | None, seeds: int, first_seed: int, as_json: bool) -> None:
    """Live jobs' whole lives in virtual time, with the machine that decides in a cluster, against faults by chance.

    After every event the invariants are checked; when the faults stop, the job must run again, or be over, within a bound of
    virtual time. A seed in which something does not hold is printed with its last events and the command that repeats it;
    then the exit status is 1.
    """
    per_node = workers if workers is not None or nodes is None else 1
    lives: list[Life] = []
    began = time.process_time()
    for life in sweep(range(first_seed, first_seed + seeds), nodes=nodes, per_node=per_node,
                      duration_s=days * DAY_S if days is not None else None):  # fmt: skip
        lives.append(life)
        if life.broken:
            click.echo(_told(life, _repeat(life.seed, nodes, workers, days)), err=True)
    took_s = time.process_time() - began
    virtual_s = sum(life.virtual_s for life in lives)
    broken = [life.seed for life in lives if life.broken]
    totals = {name: sum(getattr(life, name) for life in lives)
              for name in ("events", "attempts", "breaks", "killed", "lost_steps", "false_alarms")}  # fmt: skip
    found, faults = (_sum(getattr(life, name) for life in lives) for name in ("found", "faults"))
    speed = virtual_s / max(took_s, 1e-9)
    if as_json:
        print_json({"seeds": seeds, "first_seed": first_seed, "nodes": nodes, "workers": per_node, "days": days,
                    "virtual_s": virtual_s, "cpu_s": took_s, "speed_ratio": speed, "broken_seeds": broken, **totals,
                    "found": found, "faults": faults,
                    "broken": [asdict(life) for life in lives if life.broken]})  # fmt: skip
    else:
        click.echo(f"{seeds} lives, {duration(virtual_s)} of virtual time in {duration(took_s)} of one core: {speed:,.0f} times "
                   f"real time; {totals['events']} events, {totals['attempts']} attempts, {totals['breaks']} broken ones; "
                   f"{len(broken)} seeds in which something did not hold")  # fmt: skip
    if broken:
        raise SystemExit(FAILED)


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _told(life: Life, again: str) -> str:
    return "\n".join([*life.last, f"seed {life.seed}: {life.broken}", f"again: {again}"])


def _repeat(seed: int, nodes: int | None, workers: int | None, days: float | None) -> str:
    given = {"--nodes": nodes, "--workers": workers, "--days": days}
    options = [f"{name} {value}" for name, value in given.items() if value is not None]
    return " ".join(["ray-dr simulate", *options, f"--seeds 1 --first-seed {seed}"])
