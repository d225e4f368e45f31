"""Does sharing a cluster elastically pay, how long does a decision take, and what does a resize cost?

`python -m benchmarks.scheduler [--quick] [--json]`. Simulated traces (`trace` says how they are made) under ray_dr's policy,
first come first served with fixed sizes, equal shares, and Pollux's policy; one decision about 1 000 jobs on 10 000 machines;
and real resizes of a 200 MB job, beside Ray Train's.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from statistics import mean

from benchmarks import resizes, trace
from benchmarks.figures import environment, median, p95, say, table
from benchmarks.recovery import SMALL
from ray_dr.model.scheduling import Machine, Rules, StepTime, Wanting
from ray_dr.scheduling.allocate import allocate

NODES, JOBS, LOADS = 64, 300, (0.6, 1.0)
MACHINES_MANY, JOBS_MANY = 10_000, 1_000


def decision_s(seed: int = 0) -> tuple[float, float]:
    """Seconds of a round in which all jobs wait, and of the next, in which they run and one of ten is over."""
    chance = random.Random(seed)
    machines = [
        Machine(f"n{number}", chance.choice(("a100", "h100")), 96, 8, f"zone-{number % 3}", f"rack-{number // 32}",
                number % 4 == 0)
        for number in range(MACHINES_MANY)
    ]  # fmt: skip
    jobs = [
        Wanting(f"job-{number}", f"user-{number % 40}", number, chance.choice((1, 2, 4)), chance.choice((8, 16, 32, 64)),
                cpus=96, gpus=8, priority=chance.choice((0, 0, 1)), steps_left=10 ** chance.uniform(2, 6),
                times={"": StepTime(chance.uniform(1, 50), 0.02, 0.001 * chance.random())})
        for number in range(JOBS_MANY)
    ]  # fmt: skip
    begun = time.perf_counter()
    first = allocate(jobs, machines, Rules(), 1e4)
    between = time.perf_counter()
    held = {each.job: each.nodes for each in first.allocations}
    running = [replace(job, held=held[job.name]) for number, job in enumerate(jobs) if number % 10]
    after = time.perf_counter()
    allocate(running, machines, Rules(), 1.1e4)
    return between - begun, time.perf_counter() - after


def policies(made: trace.Trace) -> dict[str, tuple[trace.Policy, bool]]:
    """Name -> (policy, whether it is told how many steps are left)."""
    rigid = {each.wanting.name: each.rigid for each in made.arrivals}
    return {
        "ray_dr": (trace.ours, True), "ray_dr, lengths unknown": (trace.ours, False), "Pollux": (trace.pollux, True),
        "equal shares": (trace.equal, True), "first come, overtaking": (trace.fifo(rigid, overtaking=True), True),
        "first come first served": (trace.fifo(rigid, overtaking=False), True),
    }  # fmt: skip


def simulated(seeds: int, jobs: int) -> dict[str, dict[float, list[trace.Outcome]]]:
    """Policy -> load -> an outcome per seed."""
    found: dict[str, dict[float, list[trace.Outcome]]] = {}
    for load in LOADS:
        for seed in range(seeds):
            made = trace.make_trace(seed, jobs=jobs, nodes=NODES, load=load)
            for name, (policy, known) in policies(made).items():
                found.setdefault(name, {}).setdefault(load, []).append(trace.play(made, policy, known=known))
            say(f"  load {load:g}, seed {seed}")
    return found


def completion_s(outcomes: list[trace.Outcome]) -> float:
    """Mean over all jobs of all seeds."""
    return mean(seconds for each in outcomes for seconds in each.completion_s)


def rows(found: dict[str, dict[float, list[trace.Outcome]]]) -> list[list[str]]:
    """Lines of the table."""
    return [
        [name, f"{load:g}", f"{completion_s(each):.0f}", f"{mean(p95(one.completion_s) for one in each):.0f}",
         f"{mean(one.useful / one.given for one in each):.2f}", f"{mean(one.resizes for one in each):.0f}"]
        for name, by_load in found.items() for load, each in by_load.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short traces, three resizes")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--seeds", type=int, default=0, help="traces per load (default 10; 2 with --quick)")
    parser.add_argument("--resizes", type=int, default=-1, help="of each system (default 10; 3 with --quick; 0: none)")
    asked = parser.parse_args()
    first_s, next_s = decision_s()
    found = simulated(asked.seeds or (2 if asked.quick else 10), 100 if asked.quick else JOBS)
    times = asked.resizes if asked.resizes >= 0 else (3 if asked.quick else 10)
    ours, theirs = (resizes.ours(SMALL, times), resizes.theirs(SMALL, times)) if times else ([], [])
    print(table(["policy", "load", "mean completion s", "p95 s", "useful work", "resizes"], rows(found)))
    print(f"one decision: {first_s:.2f} s; the next: {next_s:.2f} s ({JOBS_MANY} jobs, {MACHINES_MANY} machines)")
    against = {
        name: mean(completion_s(found["ray_dr"][load]) / completion_s(found[name][load]) for load in LOADS) for name in found
    }
    told: dict[str, object] = {
        "allocate_s": max(first_s, next_s), "mean_jct_vs_fifo": against["first come first served"],
        "mean_jct_vs_fifo_overtaking": against["first come, overtaking"], "mean_jct_vs_pollux": against["Pollux"],
        "mean_jct_vs_equal": against["equal shares"],
    }  # fmt: skip
    if times:
        print(f"a resize: {median(ours):.2f} s without a step; Ray Train {median(theirs):.2f} s")
        told |= {"resize_s": median(ours), "ray_train_resize_s": median(theirs), "resizes_s": ours, "ray_train_resizes_s": theirs}
    if asked.json:
        print(json.dumps({**told, "environment": environment()}))


if __name__ == "__main__":
    main()
