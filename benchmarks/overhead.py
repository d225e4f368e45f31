"""How much longer does a step take with `ctx` than in the bare DDP loop, with checkpoints off, in memory, in all tiers?

`python -m benchmarks.overhead [--quick] [--json]`. All programs are alive together and take turns of some seconds on
the same two cores, round after round, so that what the machine does otherwise hits all of them. Beside the time of a step
stands the processor time that the whole machine spent for it, which wanders less where the cores are shared. See README.md.
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


@dataclass(frozen=True, slots=True)
class Turn:
    """step_s: times of rank 0's steps. cpu_s: what all processes of the machine computed meanwhile, per step. Seconds."""

    step_s: list[float]
    cpu_s: float


def busy_s() -> float:
    """Seconds that the machine's processors have computed, all together, since it started."""
    user, nice, system, _, _, interrupts, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def turn(folder: Path, name: str, number: int, steps: int) -> Turn:
    """Let one program do so many steps (and one before, that is not timed)."""
    before = busy_s()
    program.write(folder / "turn", {"name": name, "round": number, "steps": steps})
    results = [folder / f"{name}.{number}.{rank}" for rank in range(NODES)]
    deadline = time.monotonic() + TIMEOUT_S
    while not all(path.exists() for path in results):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name} did not finish its turn of {steps} steps within {TIMEOUT_S:g} s")
        time.sleep(POLL_S)
    time.sleep(PAUSE_S)  # what a save left to do in the background is not the next one's
    return Turn(json.loads(results[0].read_text()), (busy_s() - before) / (steps + 1))


def measure(size: Size, rounds: int, steps: int) -> dict[str, list[Turn]]:
    """Variant -> one turn per round. The order is turned round every other time."""
    taken: dict[str, list[Turn]] = {name: [] for name in (BARE, *TIERS)}
    with tempfile.TemporaryDirectory(prefix="rdo-") as temporary, contestants(size, Path(temporary)):
        for number in range(-WARM_UP_ROUNDS, rounds):
            order = [BARE, *TIERS] if number % 2 else [*reversed(TIERS), BARE]
            for name in order:
                done = turn(Path(temporary), name, number + WARM_UP_ROUNDS, steps)
                if number >= 0:
                    taken[name].append(done)
            if number >= 0:
                last = {name: taken[name][-1] for name in taken}
                say(f"  round {number}: " + ", ".join(f"{n} {mean(t.step_s):.4f} ({t.cpu_s:.3f})" for n, t in last.items()))
    return taken


def compare(taken: dict[str, list[Turn]], name: str) -> dict[str, Any]:
    """A variant against the bare loop.

    ratio          of all seconds of all rounds, so that rare saves count in full
    ratio_median   median of the rounds' ratios
    error          standard error of their mean
    cpu_ratio      of all processor seconds, what the background does between two turns included; cpu_error as above
    """
    pairs = list(zip(taken[name], taken[BARE], strict=True))
    rounds = [mean(theirs.step_s) / mean(bare.step_s) for theirs, bare in pairs]
    cpu = [theirs.cpu_s / bare.cpu_s for theirs, bare in pairs]
    return {
        "ratio": sum(sum(theirs.step_s) for theirs, _ in pairs) / sum(sum(bare.step_s) for _, bare in pairs),
        "ratio_median": median(rounds), "ratio_p95": p95(rounds), "error": standard_error(rounds), "rounds": rounds,
        "cpu_ratio": sum(theirs.cpu_s for theirs, _ in pairs) / sum(bare.cpu_s for _, bare in pairs),
        "cpu_error": standard_error(cpu),
    }  # fmt: skip


def standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def row(size: Size, taken: dict[str, list[Turn]], name: str) -> list[str]:
    """One line of the table."""
    steps = [step for each in taken[name] for step in each.step_s]
    cpu = median([each.cpu_s for each in taken[name]])
    line = [size.name, name, str(len(taken[name])), f"{median(steps) * 1e3:.1f} / {p95(steps) * 1e3:.1f}", f"{cpu * 1e3:.0f}"]
    if name == BARE:
        return [*line, "1", "1", "1"]
    found = compare(taken, name)
    wall, processor = (f"{found[r]:.3f} ± {found[e]:.3f}" for r, e in (("ratio", "error"), ("cpu_ratio", "cpu_error")))
    return [*line, wall, f"{found['ratio_median']:.3f}", processor]


def result(taken: dict[str, dict[str, list[Turn]]]) -> dict[str, Any]:
    """What the last line says; the ratios at the top are those of the largest state measured."""
    last = list(taken)[-1]
    found: dict[str, Any] = {f"{name}_ratio": compare(taken[last], name)["ratio"] for name in TIERS}
    found["step_s"] = median([step for each in taken[last][BARE] for step in each.step_s])
    found["state"] = last
    found["sizes"] = {size: {name: compare(each, name) for name in TIERS} for size, each in taken.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--size", choices=[size.name for size in SIZES], help="only this one")
    parser.add_argument("--rounds", type=int, default=0, help="rounds (default 10; 5 with --quick)")
    parser.add_argument("--steps", type=int, default=0, help="timed steps per turn (default 40; 30 with --quick)")
    asked = parser.parse_args()
    seen = environment()
    say(json.dumps(seen))
    rounds, steps = asked.rounds or (5 if asked.quick else 10), asked.steps or (30 if asked.quick else 40)
    taken = {}
    sizes = [size for size in SIZES if asked.size in (None, size.name)]
    for size in sizes:
        say(f"{size.name}: {rounds} rounds of {steps} steps")
        taken[size.name] = measure(size, rounds, steps)
    rows = [row(size, taken[size.name], name) for size in sizes for name in (BARE, *TIERS)]
    head = ["state", "variant", "rounds", "step ms (median / p95)", "CPU ms", "ratio to bare", "median round", "CPU ratio"]
    print(table(head, rows))
    print("the floor is the bare loop itself")
    if asked.json:
        print(json.dumps({**result(taken), "environment": seen}))


if __name__ == "__main__":
    main()
