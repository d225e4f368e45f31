"""Which function `ray-dr run` finds, how it travels, and what its end makes of the exit status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ray import cloudpickle

from ray_dr.cli.main import DO_NOT_RESUBMIT, FAILED, exit_status, main
from ray_dr.cli.run import load_program
from ray_dr.errors import ConfigError, JobFailed, StoreUnavailable

PROGRAM = """\
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Size:
    width: int = 3

def train(ctx):
    return Size().width + ctx

def other(ctx):
    return -ctx

if __name__ == "__main__":
    raise AssertionError("a program that is loaded is not run")
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_a_file_gives_train_or_the_function_that_is_named(program: Path) -> None:
    assert load_program(str(program))(4) == 7
    assert load_program(f"{program}:other")(4) == -4


def test_a_function_from_a_file_travels_by_value(program: Path) -> None:
    pickled = cloudpickle.dumps(load_program(str(program)))
    program.unlink()
    assert cloudpickle.loads(pickled)(4) == 7


def test_a_module_gives_the_function_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_program("json:dumps")([1]) == "[1]"


def test_an_error_inside_the_program_is_not_taken_for_a_wrong_name(program: Path) -> None:
    program.write_text("import no_such_thing\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        load_program(str(program))


def test_exit_status_says_whether_running_it_again_can_help() -> None:
    assert exit_status(JobFailed("j", "broke", resubmit=True)) == FAILED
    assert exit_status(JobFailed("j", "broke", resubmit=False)) == DO_NOT_RESUBMIT
    assert exit_status(StoreUnavailable("away")) == FAILED
    assert exit_status(ConfigError("wrong", remedy="right")) == 2


def test_version_and_help_need_no_verb() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout.startswith("ray-dr 0.")
    shown = CliRunner().invoke(main, ["--help"]).stdout
    assert all(
        verb in shown for verb in ("run", "status", "timeline", "checkpoints", "restore", "replay", "data", "demo")
    )
