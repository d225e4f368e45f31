"""What does a rank pay for saying where it is: `Beacon.enter`, at each change of phase, several times a step?

`python -m benchmarks.beacon [--quick] [--json]`. One process enters phases in turn, as a step does: alone, and while another
process reads the beacon all the time, as an agent does ten times a second. Processor time, as others' work on the same
cores is not its cost. The floor is what the clock and the writing of the same bytes take. Limit: one microsecond.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial

from benchmarks.figures import environment, median, p95, table
from ray_dr.checkpoint.memory import attach
from ray_dr.model import beacon as bytes_of
from ray_dr.model.signal import WorkerPhase
from ray_dr.train.beacon import Beacon

LIMIT_US = 1.0
CALLS, ROUNDS, QUICK_ROUNDS = 20_000, 40, 5


def microseconds(call: Callable[[int], object], rounds: int) -> list[float]:
    """Of one call, in each of so many rounds, of this thread's processor time; the first round warms up."""
    found = []
    for _ in range(rounds + 1):
        begun = time.thread_time()
        for number in range(CALLS):
            call(number)
        found.append((time.thread_time() - begun) / CALLS * 1e6)
    return found[1:]


def read_on(path: str, until: float) -> None:
    """What an agent does with a beacon, without a pause."""
    view = attach(path, bytes_of.SIZE, name=bytes_of.MEMFD_NAME)
    while time.time() < until:
        bytes_of.read(view)


def measure(rounds: int) -> dict[str, list[float]]:
    """Microseconds of each way, by its name."""
    beacon = Beacon()
    beacon.begin(1, 0)
    phases = (WorkerPhase.LOAD, WorkerPhase.COMPUTE)
    enter: Callable[[int], object] = lambda number: beacon.enter(phases[number & 1], number)  # noqa: E731
    room = memoryview(bytearray(bytes_of.SIZE))
    write: Callable[[int], object] = lambda number: bytes_of.pack_into(  # noqa: E731
        room, 2, 1, 0, number, 2, 0, time.monotonic_ns()
    )
    found = {
        "an empty call": microseconds(lambda number: None, rounds), "floor: clock and bytes": microseconds(write, rounds),
        "enter": microseconds(enter, rounds),
    }  # fmt: skip
    readers = multiprocessing.get_context("spawn")
    reader = readers.Process(target=partial(read_on, beacon.path, time.time() + 600))
    reader.start()
    try:
        time.sleep(2.0)  # until it reads
        found["enter, while it is read"] = microseconds(enter, rounds)
    finally:
        reader.kill()
        reader.join()
        beacon.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object with everything")
    asked = parser.parse_args()
    where = environment()
    found = measure(QUICK_ROUNDS if asked.quick else ROUNDS)
    floor = median(found["floor: clock and bytes"])
    rows = [
        (name, f"{median(values):.3f}", f"{p95(values):.3f}", f"{median(values) / floor:.2f}")
        for name, values in found.items()
    ]  # fmt: skip
    print(table(("", "median us", "p95 us", "of the floor"), rows))
    enter_us = median(found["enter"])
    print(f"limit {LIMIT_US:g} us: {'kept' if enter_us <= LIMIT_US else 'not kept'}")
    if asked.json:
        print(json.dumps({
            "benchmark": "beacon", "environment": where, "enter_us": enter_us, "enter_p95_us": p95(found["enter"]),
            "limit_us": LIMIT_US, "kept": enter_us <= LIMIT_US, "medians_us": {name: median(v) for name, v in found.items()},
            "values_us": found,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
