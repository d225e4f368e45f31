"""`ray-dr run SCRIPT_OR_MODULE:function job.yaml`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ray_dr import config
from ray_dr.cli.main import INTERRUPTED
from ray_dr.cli.words import print_json
from ray_dr.errors import ConfigError, JobFailed

DEFAULT = "train"


@click.command("run")
@click.argument("program", metavar="PROGRAM")
@click.argument("job", metavar="JOB_YAML")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object.")
def command(program: str, job: str, quiet: bool, as_json: bool) -> None:
    """Run a training function on the cluster of RAY_ADDRESS, or on this machine, until it is done.

    PROGRAM is `package.module:function` or `path/to/file.py[:function]` (default: train). A job that was stopped or
    whose cluster was lost goes on from where it was. Ctrl-C stops it at a step boundary, saves, leaves nothing behind.
    """
    spec = config.load(job)
    train = load_program(program)
    from ray_dr.actors.launch import run

    try:
        outcome = run(train, spec, quiet=quiet)
    except JobFailed as error:
        if as_json:
            print_json({"job": spec.name, "outcome": "failed", "reason": error.reason, "resubmit": error.resubmit})
        raise
    how = "drained" if outcome.drained else "finished"
    if as_json:
        print_json({"job": outcome.job, "outcome": how, "step": outcome.step})
    else:
        more = "; run it again to go on" if outcome.drained else ""
        click.echo(f"job {outcome.job}: {how} after step {outcome.step}{more}")
    if outcome.drained:
        raise SystemExit(INTERRUPTED)


def load_program(program: str) -> Callable[[Any], None]:
    """The function that PROGRAM names. Raises ConfigError when there is none; errors of the program itself pass."""
    place, _, name = program.rpartition(":")
    if not place:
        place, name = program, DEFAULT
    module = _load_file(Path(place)) if place.endswith(".py") else _import(place)
    train = getattr(module, name, None)
    if not callable(train):
        raise ConfigError(f"{place} has no function {name!r}", remedy="write file.py:function", key="PROGRAM")
    function: Callable[[Any], None] = train
    return function


def _import(name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: modules of the current directory can be named
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        remedy = "write package.module:function or path/to/file.py"
        raise ConfigError(f"there is no module {name!r}", remedy=remedy, key="PROGRAM") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name!r} is no module's name", remedy="write module:function", key="PROGRAM") from error


def _load_file(path: Path) -> Any:
    """The file's module, not left among the imported ones, so that its functions travel to the workers by value."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", remedy="check the path", key="PROGRAM")
    name = f"ray_dr_program_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
