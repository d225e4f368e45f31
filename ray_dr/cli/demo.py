"""`ray-dr demo`: a job that loses a node in the middle of a step, beside one that does not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_dr import config
from ray_dr.cli.compare import Comparison, compare, read_checkpoint
from ray_dr.cli.demo_display import Display
from ray_dr.cli.findings import (
    Comeback,
    Findings,
    Kill,
    RunFindings,
    find_comeback,
    find_incidents,
    find_reasons,
    find_run,
)
from ray_dr.cli.main import FAILED, INTERRUPTED
from ray_dr.cli.progress import Live
from ray_dr.cli.report import render, verdict
from ray_dr.cli.stored import StoredJob, find_job
from ray_dr.cli.words import duration, print_json, size, table
from ray_dr.errors import CheckpointError, ConfigError, RayDrError, StoreError
from ray_dr.model.journal import Record

if TYPE_CHECKING:
    from ray_dr.actors.local_cluster import LocalCluster

STEPS = 200
"""Enough for the replacement node to arrive while the disturbed run still runs, on two cores."""
NODES = 3
NAMES = ("undisturbed", "disturbed")
JOB_YAML = """\
# The {name} run of `ray-dr demo`: a small GPT on the sources of Python's standard library.
job: {name}
workers: {{nodes: 2..{nodes}, min_nodes_to_run: 1}}
checkpoint:
  tiers:
    - {{kind: memory, copies: 2}}
    - {{kind: file, path: {store}, every: 5s, keep: {{last: 3}}}}
deterministic: true               # the same bits at any number of workers
seed: 7
settings: {{steps: {steps}}}
"""


@click.command("demo")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object.")
@click.option("--dir", "directory", type=click.Path(path_type=Path, file_okay=False), default=Path("ray-dr-demo"),
              show_default=True, help="Where the report goes.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=20), default=STEPS, show_default=True, help="Length of each run.")
@click.option("--keep", is_flag=True, help="Keep both runs' job.yaml, checkpoints and journal.")
def command(as_json: bool, directory: Path, steps: int, keep: bool) -> None:
    """Train a small GPT twice on a local cluster; the second time a node is killed in the middle of a step.

    Ends with a table and a report. Exit status 1 when the job did not survive, the two results differ in a single
    byte, a sample was lost or repeated, or anything was left behind.
    """
    began = time.monotonic()
    runs = directory / time.strftime("run-%Y%m%d-%H%M%S")
    _make(runs)
    # Ray prints warnings about the node we kill across the progress: they go to a file of their own.
    with (
        Live() as live,
        (runs / "driver.log").open("w") as log,
        contextlib.redirect_stderr(log),
        contextlib.redirect_stdout(log),
    ):
        findings = Rehearsal(runs, steps, live).play()
    findings = replace(findings, took_s=time.monotonic() - began, environment=_environment(time.monotonic() - began))
    report = directory / "report.html"
    report.write_text(render(findings))
    if not keep:
        shutil.rmtree(runs, ignore_errors=True)
    click.echo(summary(findings))
    click.echo(f"\nreport: {report.resolve()}")
    if keep:
        click.echo(f"look closer: ray-dr timeline {runs / f'{NAMES[1]}.yaml'}")
    if as_json:
        print_json(as_object(findings, report))
    if not findings.ok:
        raise SystemExit(INTERRUPTED if findings.trouble == STOPPED else FAILED)


STOPPED = "The demo was stopped by Ctrl-C."


class Stopped(Exception):
    """The run was drained by Ctrl-C."""


@dataclass(slots=True)
class Rehearsal:
    """Both runs, one after the other on one cluster. What it found out so far survives its failure."""

    runs: Path
    steps: int
    live: Live
    kill: Kill | None = None
    leaked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    trouble: str = ""

    def play(self) -> Findings:
        """Do both runs and look at what is left."""
        logging.getLogger("ray._private.worker").setLevel(logging.WARNING)
        try:
            self._on_a_cluster()
        except RayDrError as error:
            self.trouble = f"{error}"
        except (Stopped, KeyboardInterrupt):
            self.trouble = STOPPED
        self.live.clear()
        return self._findings()

    def _on_a_cluster(self) -> None:
        from ray_dr.actors.local_cluster import LocalCluster

        self.live.show(["starting a local Ray cluster: a head, and nodes that its autoscaler launches"], now=True)
        local = LocalCluster(NODES, dashboard=False)
        with local:
            os.environ.update(local.env)
            self._run(NAMES[0], self._ignore)
            self._run(NAMES[1], self._disturb(local))
            self._count_leaks(local)
        self.leaked["processes"] = (*self.leaked["processes"], *local.leaks())

    def _run(self, name: str, then: Callable[[dict[str, Any]], None]) -> None:
        from ray_dr.actors.launch import run
        from ray_dr.stores.open import open_store
        from ray_dr.train.gpt import train

        path = self._write_job(name)
        spec = config.load(path)
        display = Display(self.live, f"{name} run", open_store(spec.store.url), spec.name, self.steps)

        def watch(snapshot: dict[str, Any]) -> None:
            then(snapshot)
            display(snapshot)

        outcome = run(train, spec, quiet=True, watch=watch)
        self.live.clear()
        self.live.say(f"{name} run: {outcome.step} steps in {duration(time.monotonic() - display.began)}")
        if outcome.drained:
            raise Stopped

    def _write_job(self, name: str) -> Path:
        path = self.runs / f"{name}.yaml"
        path.write_text(JOB_YAML.format(name=name, store=f"./{name}", nodes=NODES, steps=self.steps))
        return path

    def _disturb(self, local: LocalCluster) -> Callable[[dict[str, Any]], None]:
        """Kills a node that has a worker once a quarter of the steps is done."""
        from ray_dr.actors.leaks import worker_node

        def watch(snapshot: dict[str, Any]) -> None:
            if self.kill is not None or snapshot["phase"] != "Running" or snapshot["step"] < self.steps // 4:
                return
            node = worker_node(local, snapshot["nodes"])
            if node is not None:
                self.kill = Kill(time.time(), node, snapshot["step"])
                local.kill_node(node)
                self.live.say(f"disturbed run: node {node[-5:]} killed after step {snapshot['step']}")

        return watch

    def _ignore(self, _: dict[str, Any]) -> None:
        """The undisturbed run is left alone."""

    def _count_leaks(self, local: LocalCluster) -> None:
        from ray_dr.actors.leaks import find_leaks

        self.live.show(["looking for what was left behind"], now=True)
        found = find_leaks(local)
        self.leaked = {
            "actors": found.actors, "placement_groups": found.placement_groups,
            "shared_memory": found.shared_memory, "processes": found.processes,
        }  # fmt: skip

    def _findings(self) -> Findings:
        stored = [job for name in NAMES if (job := self._stored(name)) is not None]
        records = [job.records() for job in stored]
        runs = tuple(find_run(job.name, found) for job, found in zip(stored, records, strict=True))
        disturbed: list[Record] = records[1] if len(records) == 2 else []
        comparison, trouble = self._compare(stored, runs)
        return Findings(
            runs=runs,
            kill=self._exact_kill(runs),
            comeback=find_comeback(disturbed, self.kill) if self.kill else Comeback(),
            incidents=find_incidents(disturbed, self.kill),
            comparison=comparison,
            leaked=self.leaked,
            reasons=find_reasons(disturbed, self.kill),
            trouble=self.trouble or trouble,
        )

    def _stored(self, name: str) -> StoredJob | None:
        try:
            return find_job(str(self.runs / f"{name}.yaml"), None)
        except ConfigError:
            return None

    def _exact_kill(self, runs: tuple[RunFindings, ...]) -> Kill | None:
        """The kill with the last step that really was done before it: the snapshot it followed was a moment older."""
        if self.kill is None or len(runs) < 2:
            return self.kill
        before = [each.step for each in runs[1].done if each.at <= self.kill.at]
        return replace(self.kill, step=max(before, default=self.kill.step))

    def _compare(self, stored: list[StoredJob], runs: tuple[RunFindings, ...]) -> tuple[Comparison | None, str]:
        """Both final checkpoints side by side, and in words why that was not possible."""
        if len(runs) < 2 or any(run.phase != "finished" for run in runs):
            return None, ""
        self.live.show(["comparing the final checkpoints byte by byte"], now=True)
        try:
            left, right = (read_checkpoint(job, job.checkpoint(self.steps)) for job in stored)
        except (CheckpointError, StoreError) as error:
            return None, f"The final checkpoints cannot be compared: {error}"
        finally:
            self.live.clear()
        return compare(left, right), ""


def summary(findings: Findings) -> str:
    """The table at the end."""
    back, compared = findings.comeback, findings.comparison
    bytes_compared = f"{compared.tensors} tensors, {size(compared.size)}, byte by byte" if compared else "not compared"
    leaked = ", ".join(f"{len(items)} {kind.replace('_', ' ')}" for kind, items in findings.leaked.items())
    rows = [
        ("survived", _yes(findings.survived), "finished after losing a node to SIGKILL"),
        ("bit-identical", _yes(findings.bit_identical), bytes_compared),
        (
            "recovery",
            _when(back.stepped_s),
            f"kill to first committed step, {back.world_after} of {back.world_before} left",
        ),
        ("full strength", _when(back.full_s), "kill to a step with as many workers as before"),
        ("steps lost", findings.steps_lost, "done again after the kill"),
        ("samples lost", _known(findings.samples_lost), _proof(findings)),
        ("samples repeated", _known(findings.samples_repeated), _proof(findings)),
        ("leaked", _known(findings.leaks), leaked or "not counted"),
        ("took", duration(findings.took_s), "everything, with starting and ending the cluster"),
    ]
    return f"\n{verdict(findings)}\n\n{table(('what', 'result', 'how'), rows)}"


def as_object(findings: Findings, report: Path) -> dict[str, Any]:
    """The findings for programs. Times in seconds; null is what is not known."""
    back = findings.comeback
    return {
        "survived": findings.survived,
        "bit_identical": findings.bit_identical,
        "recovery_s": back.stepped_s,
        "steps_lost": findings.steps_lost,
        "samples_lost": findings.samples_lost,
        "samples_repeated": findings.samples_repeated,
        "data_proven": findings.data_exact,
        "leaked": findings.leaks,
        "leaked_by_kind": {kind: len(items) for kind, items in findings.leaked.items()},
        "full_strength_s": back.full_s,
        "workers": [back.world_before, back.world_after],
        "took_s": findings.took_s,
        "ok": findings.ok,
        "verdict": verdict(findings),
        "report": str(report.resolve()),
    }


def _make(runs: Path) -> None:
    try:
        runs.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{runs} cannot be made: {error.strerror}", remedy="choose another --dir", key="--dir"
        ) from error


def _environment(took_s: float) -> dict[str, str]:
    packages = ("ray-dr", "ray", "torch", "numpy")
    cores = len(os.sched_getaffinity(0))
    return {
        "machine": f"{platform.system()} {platform.release()}, {platform.machine()}, {cores} cores",
        "Python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "cluster": f"a head and up to {NODES} nodes of 1 CPU each, launched by Ray's autoscaler on this machine",
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "took": duration(took_s),
    }


def _proof(findings: Findings) -> str:
    return "proven from both journals" if findings.data_exact else "NOT proven by the journals"


def _known(count: int | None) -> str:
    return "unknown" if count is None else str(count)


def _yes(held: bool) -> str:
    return "yes" if held else "NO"


def _when(seconds: float | None) -> str:
    return "never" if seconds is None else duration(seconds)
