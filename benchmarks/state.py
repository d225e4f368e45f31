"""The state that `save` and `restore` move, and what the ways to move it are told of it."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ray_dr.checkpoint.memory import available_bytes

THREADS = 2
SMALLEST, LARGEST = 2**10, 100 * 2**20
UNITS = {"MB": 2**20, "GB": 2**30}
SPARE_BYTES = 2**30
"""What is left to the interpreters and the machine."""


def make_state(size: int, count: int = 0) -> dict[str, torch.Tensor]:
    """Float32 tensors of 1 KB to 100 MB, as many small as large ones, `size` bytes in all; the same everywhere. `count`: so
    many of equal size instead."""
    numbers = np.random.default_rng(0)
    state: dict[str, torch.Tensor] = {}
    left = size
    while left > 0:
        each = -(-size // count) if count else int(SMALLEST * (LARGEST / SMALLEST) ** numbers.random())
        each = min(left, each)
        state[f"t{len(state):04d}"] = torch.from_numpy(numbers.random(-(-each // 4), np.float32))
        left -= each
    return state


def size_in_bytes(text: str) -> int:
    """Of "4 GB" or "256 MB"; a MB has 2**20 bytes here, a GB 2**30."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB)", text.strip())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; as in '4 GB' or '256 MB'")
    return int(float(found[1]) * UNITS[found[2]])


def installed(names: Iterable[str], modules: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The ways whose module is there, and a line on each module that is not. `modules`: of the ways that need one."""
    here, lacking = [], dict[str, list[str]]()
    for name in names:
        module = modules.get(name, "torch")
        if importlib.util.find_spec(module):
            here.append(name)
        else:
            lacking.setdefault(module, []).append(name)
    lines = [f"left out, as {module} is not installed (pip install -e '.[bench]'): {'; '.join(several)}"
             for module, several in lacking.items()]  # fmt: skip
    return here, lines


def fits(size: int, times: float) -> bool:
    """Is there memory for so many times the state?"""
    return size * times + SPARE_BYTES <= available_bytes()


def no_room(name: str, size: int, times: float) -> str:
    """The line that says so."""
    return (f"left out, as it takes about {times:g} times {size / 2**30:.3g} GB in memory and "
            f"{available_bytes() / 2**30:.1f} GB are free: {name}")  # fmt: skip
