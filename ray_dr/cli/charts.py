"""Charts as HTML with inline SVG, which stretch to any width: lines scale, text and strokes keep their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

POINTS_MOST = 600
"""A line is thinned to about this many points: more than the pixels it gets on a phone."""
BAR_LEAST = 0.004
"""A bar is at least this share of the width: something that took no time still happened."""
UNITS = 1000
"""The SVG's own width and height."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """A named series; `kind` is its CSS class."""

    name: str
    kind: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at `x` with a word beside it."""

    x: float
    text: str
    kind: str = "event"


@dataclass(frozen=True, slots=True)
class Axes:
    """The ranges shown, left to right and bottom to top."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        """Share of the width, 0..1."""
        return (value - self.left) / (self.right - self.left or 1.0)

    def y(self, value: float) -> float:
        """Share of the height from the top, 0..1."""
        return 1 - (value - self.bottom) / (self.top - self.bottom or 1.0)


def line_chart(lines: Sequence[Line], marks: Sequence[Mark] = (), *, x_name: str, y_name: str) -> str:
    """Lines over each other, the first at the bottom. Empty series make an empty chart."""
    axes = fit([point for line in lines for point in line.points])
    x_ticks, y_ticks = ticks(axes.left, axes.right, 6), ticks(axes.bottom, axes.top, 5)
    drawn = [f'<line class="grid" x1="0" x2="{UNITS}" y1="{_u(axes.y(y))}" y2="{_u(axes.y(y))}"/>' for y in y_ticks]
    drawn += [_vertical(axes, mark) for mark in marks]
    drawn += [_path(axes, line) for line in lines if line.points]
    labels = [f'<span class="tick y" style="top:{axes.y(y):.2%}">{number(y)}</span>' for y in y_ticks]
    labels += [f'<span class="tick x" style="left:{axes.x(x):.2%}">{number(x)}</span>' for x in x_ticks]
    labels += [_mark_label(axes, mark) for mark in marks]
    title = f"{y_name} over {x_name}"
    return (
        f'<div class="legend">{"".join(_key(line) for line in lines)}</div>'
        f'<p class="axis">{escape(y_name)}</p>'
        f'<div class="chart"><svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{"".join(drawn)}</svg>{"".join(labels)}</div>'
        f'<p class="axis right">{escape(x_name)}</p>'
    )


def ribbon(runs: Sequence[tuple[float, float, int]], *, last: float, noun: str) -> str:
    """Stretches (begins, ends, count) side by side, each as wide as its share of `last`."""
    cells = [
        f'<span class="count n{min(count, 6)}" style="flex-grow:{max(end - begin, 0.001):.4g}" '
        f'title="{count} {noun}, {number(begin)} to {number(end)}">{count}</span>'
        for begin, end, count in runs
    ]
    rest = last - max((end for _, end, _ in runs), default=0.0)
    pad = f'<span style="flex-grow:{rest:.4g}"></span>' if rest > 0 else ""
    return f'<div class="ribbon">{"".join(cells)}{pad}</div>'


def gantt(rows: Sequence[tuple[str, str, float, float, str]]) -> str:
    """Rows (name, what it means, begins, ends, label): a bar each, on one scale in seconds from 0."""
    whole = max((end for _, _, _, end, _ in rows), default=0.0) or 1.0
    lines = [
        f'<div class="row" title="{escape(meaning)}"><span class="name">{escape(name)}</span>'
        f'<span class="track">{_bar(begin / whole, end / whole)}</span>'
        f'<span class="value">{escape(label)}</span><span class="what">{escape(meaning)}</span></div>'
        for name, meaning, begin, end, label in rows
    ]
    return f'<div class="gantt">{"".join(lines)}</div>'


def _bar(begin: float, end: float) -> str:
    return f'<i style="left:{begin:.2%};width:{max(end - begin, BAR_LEAST):.2%}"></i>'


def fit(points: Sequence[Point]) -> Axes:
    """Ranges that hold all points, with a little air above and below."""
    if not points:
        return Axes(0.0, 1.0, 0.0, 1.0)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    air = (max(ys) - min(ys)) * 0.05 or 0.5
    low = min(ys) - air
    return Axes(min(xs), max(xs), 0.0 if min(ys) >= 0 > low else low, max(ys) + air)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """At most about POINTS_MOST of the points, the first and the last among them."""
    stride = -(-len(points) // POINTS_MOST)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def number(value: float) -> str:
    """As short as it can be: `3`, `2.5`, `1,200`."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def _path(axes: Axes, line: Line) -> str:
    places = " ".join(f"{_u(axes.x(x))},{_u(axes.y(y))}" for x, y in thin(line.points))
    return f'<polyline class="{line.kind}" points="{places}"><title>{escape(line.name)}</title></polyline>'


def _vertical(axes: Axes, mark: Mark) -> str:
    x = _u(axes.x(mark.x))
    return f'<line class="mark {mark.kind}" x1="{x}" x2="{x}" y1="0" y2="{UNITS}"/>'


def _mark_label(axes: Axes, mark: Mark) -> str:
    share = axes.x(mark.x)
    side = "left" if share > 0.6 else ""
    return f'<span class="mark {mark.kind} {side}" style="left:{share:.2%}">{escape(mark.text)}</span>'


def _key(line: Line) -> str:
    return f'<span><i class="{line.kind}"></i>{escape(line.name)}</span>'


def _u(share: float) -> str:
    return f"{share * UNITS:.1f}"
