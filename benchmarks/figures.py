"""How the benchmarks sum up and say what they measured."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median

import numpy as np

__all__ = ["environment", "median", "memcpy_s", "p95", "say", "table"]


def p95(values: Sequence[float]) -> float:
    """The 95th percentile, interpolated between neighbours; of few values nearly their maximum."""
    return float(np.percentile(values, 95))


def environment() -> dict[str, str | int | float]:
    """The machine, its load now, and the versions that matter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {name: version(name) for name in ("ray", "torch", "ray-dr")}
    return {
        "cores": os.cpu_count() or 0, "memory_gib": round(memory, 1), "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(), "kernel": platform.release(), **versions,
    }  # fmt: skip


def memcpy_s(size: int) -> float:
    """Seconds one core takes to copy `size` bytes in memory, the median of five: the floor of taking a state back."""
    import time

    source = np.ones(size, np.uint8)
    target = np.zeros(size, np.uint8)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begun)
    return median(times)


def say(line: str) -> None:
    """Progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
