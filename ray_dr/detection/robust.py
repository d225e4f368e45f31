"""Statistics that a few wild values do not move."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import median

TO_SIGMA = 1.4826
"""A normal law's standard deviation is so many times its median absolute deviation."""


def quantile(values: Collection[float], share: float) -> float:
    """The value that `share` of the values do not exceed (the nearest one that is there). Needs at least one value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def scale(values: Collection[float], center: float) -> float:
    """Standard deviation around `center`, estimated from the median absolute deviation."""
    return TO_SIGMA * median(abs(value - center) for value in values)


def median_of_others(ordered: Sequence[float], at: int) -> float:
    """Median of sorted values (two at least) without the one at index `at`, in constant time."""
    rest = len(ordered) - 1

    def other(index: int) -> float:
        return ordered[index if index < at else index + 1]

    return other(rest // 2) if rest % 2 else (other(rest // 2 - 1) + other(rest // 2)) / 2
