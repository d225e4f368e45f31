"""Progress on stderr: a terminal gets a line (or a block) that is repainted, a pipe a line now and then."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

PAINT_S = 0.1
LINE_S = 5.0
"""A pipe gets a line at most this often."""


class Live:
    """Repaints lines in place, on what stderr was when it was made. On leaving it, what was painted last stays."""

    def __init__(self) -> None:
        self._out = sys.stderr
        self._terminal = self._out.isatty()
        self._painted = 0
        self._at = float("-inf")
        self._said = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._painted = 0

    def show(self, lines: Sequence[str], *, brief: str = "", now: bool = False) -> None:
        """Paint `lines` over the last; without a terminal say `brief` (default: the first line) now and then."""
        interval_s = PAINT_S if self._terminal else LINE_S
        if time.monotonic() - self._at < interval_s and not now:
            return
        self._at = time.monotonic()
        if self._terminal:
            self._paint(lines)
        else:
            self._print(brief or (lines[0] if lines else ""))

    def say(self, line: str) -> None:
        """A line that stays, above what is repainted."""
        self._erase()
        print(line, file=self._out, flush=True)

    def clear(self) -> None:
        """Take away what is painted."""
        self._erase()
        self._out.flush()

    def _paint(self, lines: Sequence[str]) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._erase()
        print("\n".join(line[:width] for line in lines), file=self._out, flush=True)
        self._painted = len(lines)

    def _print(self, line: str) -> None:
        if line and line != self._said:
            print(line, file=self._out, flush=True)
            self._said = line

    def _erase(self) -> None:
        if self._painted:
            print(f"\x1b[{self._painted}F\x1b[J", end="", file=self._out)
            self._painted = 0
