"""How fast a job is on how many nodes, learned from what was seen; and what a larger batch is worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from ray_dr.model.scheduling import StepTime

LEAST_S = 1e-6


def fit(seen: Iterable[tuple[int, float]]) -> StepTime:
    """The model of a step's time that is nearest to what was seen, in relative error, with no negative part.

    seen   (nodes, seconds of a step), any number of each; where only one number of nodes was seen, all of it is taken for
           computation that more nodes would share: a job that was never larger deserves the try
    Raises ValueError when nothing was seen. Source of the form: Qiao et al., Pollux, OSDI 2021, eq. 9-11, with gamma = 1.
    """
    points = [(nodes, max(step_s, LEAST_S)) for nodes, step_s in seen]
    if not points:
        raise ValueError("no step was seen")
    sizes = {nodes for nodes, _ in points}
    if len(sizes) == 1:
        nodes = sizes.pop()
        return StepTime(divided_s=nodes * sum(step_s for _, step_s in points) / len(points))
    rows = [((1 / nodes / s, 1 / s, (nodes - 1) / s), 1.0) for nodes, s in points]
    width = 3 if len(sizes) > 2 else 2  # two sizes can't tell what is fixed from what grows
    candidates = [
        _solve(rows, chosen) for count in range(1, width + 1) for chosen in itertools.combinations(range(width), count)
    ]
    best = min((each for each in candidates if each is not None), key=lambda each: _error(rows, each))
    return StepTime(*best)


def speed(time: StepTime, nodes: float) -> float:
    """Steps per second; of a number of nodes that is not whole, in between."""
    return 1.0 / max(time.on(nodes), LEAST_S)


def efficiency(scale: float, *, variance: float, squared: float) -> float:
    """How much a sample is worth in a batch `scale` times the base batch, against one in the base batch (0..1].

    variance   of the gradient over samples of the base batch, its trace
    squared    norm of the true gradient
    Source: Qiao et al., Pollux, OSDI 2021, eq. 6, from the gradient noise scale (McCandlish et al., 2018).
    """
    if squared + variance <= 0:
        return 1.0
    return (variance + squared) / (variance / scale + squared) / scale


def _error(rows: Sequence[tuple[tuple[float, float, float], float]], parts: Sequence[float]) -> float:
    return sum((sum(a * x for a, x in zip(row, parts, strict=True)) - wanted) ** 2 for row, wanted in rows)


def _solve(rows: Sequence[tuple[tuple[float, float, float], float]], chosen: Sequence[int]) -> tuple[float, ...] | None:
    """Least squares over the chosen parts, the others zero; None when that has no answer without negative parts."""
    size = len(chosen)
    normal = [
        [sum(row[i] * row[j] for row, _ in rows) for j in chosen] + [sum(row[i] * wanted for row, wanted in rows)]
        for i in chosen
    ]
    for at in range(size):
        pivot = max(range(at, size), key=lambda row: abs(normal[row][at]))
        if abs(normal[pivot][at]) < 1e-12:
            return None
        normal[at], normal[pivot] = normal[pivot], normal[at]
        for other in range(size):
            if other != at:
                factor = normal[other][at] / normal[at][at]
                normal[other] = [a - factor * b for a, b in zip(normal[other], normal[at], strict=True)]
    parts = [0.0, 0.0, 0.0]
    for at, part in enumerate(chosen):
        parts[part] = normal[at][size] / normal[at][at]
    return tuple(parts) if min(parts) >= 0 else None
