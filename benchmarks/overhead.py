"""How much longer does a step take with `ctx` than in the bare DDP loop, with checkpoints off, in memory, in all tiers?

`python -m benchmarks.overhead [--quick] [--json]`. All programs are alive together and take turns of some seconds on
the same two cores, round after round, so that what the machine does otherwise hits all of them. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import ray

from benchmarks import program
from benchmarks.figures import environment, median, p95, say, table
from benchmarks.kills import NODES, PYTHONPATH
from ray_dr.actors import cluster as names
from ray_dr.actors.launch import submit
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.job import Every, Job, MemoryTier, StoreTier, Workers

NEVER = Every(steps=10**9)
BARE = "bare"
TIERS = {"off": (NEVER, NEVER), "memory": (Every(), NEVER), "all": (Every(), Every(seconds=30.0))}
"""Variant -> how often to memory (with the copy on the other node) and to the store; the last two are the defaults."""
WARM_UP_ROUNDS = 2
PAUSE_S = 0.5
TIMEOUT_S = 300.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Size:
    """A model, gone through as often as makes a step take more than 100 ms here."""

    name: str
    width: int
    depth: int
    batch: int
    repeats: int = 1


SIZES = (Size("10 MB", 512, 3, 256, 16), Size("200 MB", program.WIDTH, 4, 8))


@contextlib.contextmanager
def contestants(size: Size, folder: Path) -> Iterator[None]:
    """The bare loop in two processes and a ray_dr job per variant on two nodes, all waiting for their turn."""
    settings = {"width": size.width, "depth": size.depth, "repeats": size.repeats, "batch": size.batch,
                "steps": 10**7, "gate": str(folder)}  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the bare loop's processes; Ray sets it for its workers of one CPU
    with LocalCluster(autoscaling=False, dashboard=False, env={"PYTHONPATH": PYTHONPATH}) as cluster:
        for _ in range(NODES):
            cluster.add_node(cpus=len(TIERS))
        ray.init(address=cluster.address, namespace=names.NAMESPACE, log_to_driver=False)
        for name, (memory, store) in TIERS.items():
            spec = Job(name, StoreTier(f"file://{folder}/store", store), Workers(NODES, NODES, 1), MemoryTier(memory),
                       settings={**settings, "variant": name})  # fmt: skip
            submit(program.train, spec)
        arguments = [(rank, NODES, {**settings, "variant": BARE}) for rank in range(NODES)]
        loops = [spawn.Process(target=program.train_bare, args=each, daemon=True) for each in arguments]
        try:
            for loop in loops:
                loop.start()
            yield
        finally:
            for loop in loops:
                loop.kill()
                loop.join()
            ray.shutdown()


def turn(folder: Path, name: str, number: int, steps: int) -> list[float]:
    """Let one program do so many steps; the times of rank 0's steps, in seconds."""
    program.write(folder / "turn", {"name": name, "round": number, "steps": steps})
    results = [folder / f"{name}.{number}.{rank}" for rank in range(NODES)]
    deadline = time.monotonic() + TIMEOUT_S
    while not all(path.exists() for path in results):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name} did not finish its turn of {steps} steps within {TIMEOUT_S:g} s")
        time.sleep(POLL_S)
    time.sleep(PAUSE_S)  # what a save left to do in the background is not the next one's
    times: list[float] = json.loads(results[0].read_text())
    return times


def measure(size: Size, rounds: int, steps: int) -> dict[str, list[list[float]]]:
    """Variant -> one list of step times per round. The order is turned round every other time."""
    taken: dict[str, list[list[float]]] = {name: [] for name in (BARE, *TIERS)}
    with tempfile.TemporaryDirectory(prefix="rdo-") as temporary, contestants(size, Path(temporary)):
        for number in range(-WARM_UP_ROUNDS, rounds):
            order = [BARE, *TIERS] if number % 2 else [*reversed(TIERS), BARE]
            for name in order:
                times = turn(Path(temporary), name, number + WARM_UP_ROUNDS, steps)
                if number >= 0:
                    taken[name].append(times)
            if number >= 0:
                say(f"  round {number}: " + ", ".join(f"{name} {mean(taken[name][-1]):.4f}" for name in taken))
    return taken


def compare(taken: dict[str, list[list[float]]], name: str) -> dict[str, Any]:
    """A variant against the bare loop.

    ratio          of all seconds of all rounds, so that rare saves count in full
    ratio_median   median of the rounds' ratios
    error          standard error of their mean
    """
    rounds = [mean(theirs) / mean(bare) for theirs, bare in zip(taken[name], taken[BARE], strict=True)]
    total = sum(map(sum, taken[name])) / sum(map(sum, taken[BARE]))
    error = stdev(rounds) / len(rounds) ** 0.5 if len(rounds) > 1 else float("nan")
    return {"ratio": total, "ratio_median": median(rounds), "ratio_p95": p95(rounds), "error": error, "rounds": rounds}


def row(size: Size, taken: dict[str, list[list[float]]], name: str) -> list[str]:
    """One line of the table."""
    steps = [step for times in taken[name] for step in times]
    line = [size.name, name, str(len(taken[name])), f"{median(steps) * 1e3:.1f} / {p95(steps) * 1e3:.1f}"]
    if name == BARE:
        return [*line, "1", "1"]
    found = compare(taken, name)
    return [*line, f"{found['ratio']:.4f} ± {found['error']:.4f}", f"{found['ratio_median']:.4f}"]


def result(taken: dict[str, dict[str, list[list[float]]]]) -> dict[str, Any]:
    """What the last line says; the ratios at the top are those of the largest state measured."""
    last = list(taken)[-1]
    found: dict[str, Any] = {f"{name}_ratio": compare(taken[last], name)["ratio"] for name in TIERS}
    found["step_s"] = median([step for times in taken[last][BARE] for step in times])
    found["state"] = last
    found["sizes"] = {size: {name: compare(each, name) for name in TIERS} for size, each in taken.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--rounds", type=int, default=0, help="rounds (default 10; 5 with --quick)")
    parser.add_argument("--steps", type=int, default=0, help="timed steps per turn (default 40; 20 with --quick)")
    asked = parser.parse_args()
    seen = environment()
    say(json.dumps(seen))
    rounds, steps = asked.rounds or (5 if asked.quick else 10), asked.steps or (20 if asked.quick else 40)
    taken = {}
    for size in SIZES:
        say(f"{size.name}: {rounds} rounds of {steps} steps")
        taken[size.name] = measure(size, rounds, steps)
    rows = [row(size, taken[size.name], name) for size in SIZES for name in (BARE, *TIERS)]
    print(table(["state", "variant", "rounds", "step ms (median / p95)", "ratio to bare (mean)", "median round"], rows))
    print("the floor is the bare loop itself")
    if asked.json:
        print(json.dumps({**result(taken), "environment": seen}))


if __name__ == "__main__":
    main()
