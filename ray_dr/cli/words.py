"""Numbers and tables for people."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

_NODE_ID = re.compile(r"\b[0-9a-f]{56}\b")


def duration(seconds: float) -> str:
    """`340 ms`, `2.41 s`, `1 min 5 s`, `3 h 12 min`, `2 d 4 h`."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def short(text: str) -> str:
    """The text with Ray's 56-digit node ids cut to their first 8 and last 5, as in the names of workers."""
    return _NODE_ID.sub(lambda found: found[0][:8] + found[0][-5:], text)


def value(of: object) -> str:
    """A field of a note: numbers with three digits that count."""
    return f"{of:.3g}" if isinstance(of, float) else short(str(of))


def size(count: float) -> str:
    """Bytes with a decimal unit: `512 B`, `1.3 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def clock(at: float) -> str:
    """Local time of day of UTC seconds, with milliseconds."""
    return f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at % 1 * 1000):03d}"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> str:
    """Aligned columns under their heads; the columns numbered in `right` are right-aligned."""
    lines = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    aligned = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in aligned else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """`name  value` lines, the names padded to the same width."""
    shown = [(name, str(value)) for name, value in pairs]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in shown)


def print_json(value: Any) -> None:
    """One object on one line."""
    click.echo(json.dumps(value, default=str))
