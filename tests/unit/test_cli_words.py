"""Numbers and tables as people read them, and what progress does where nobody watches."""

from __future__ import annotations

import io
import sys

import pytest

from ray_dr.cli.progress import Live
from ray_dr.cli.words import duration, short, size, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.34, "340 ms"), (2.414, "2.41 s"), (59.9, "59.9 s"), (59.97, "1 min 0 s"), (65, "1 min 5 s"),
     (3600 * 3 + 720, "3 h 12 min"), (3600 * 52, "2 d 4 h"), (-2, "-2.00 s")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1300, "1.3 kB"), (4.8e6, "4.8 MB"), (297e6, "297 MB"), (5e15, "5000 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_tables_are_aligned() -> None:
    assert table(("a", "long"), [("xyz", 1), ("x", 20)], right=(1,)) == "a    long\nxyz     1\nx      20"


def test_node_ids_are_short() -> None:
    assert short(f"node {'f' * 51}00001 lost") == "node ffffffff00001 lost"


def test_a_pipe_gets_no_control_characters_and_no_line_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with Live() as live:
        live.show(["one", "two"], now=True)
        live.show(["one", "two"], now=True)
        live.show(["three"])
        live.show(["four"], brief="4", now=True)
        live.clear()
    assert pipe.getvalue() == "one\n4\n"


def test_a_terminal_is_painted_over(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Live() as live:
        live.show(["one", "two"], now=True)
        live.show(["three"], now=True)
        live.say("stays")
    assert terminal.getvalue() == "one\ntwo\n\x1b[2F\x1b[Jthree\n\x1b[1F\x1b[Jstays\n"
