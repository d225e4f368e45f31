"""Does a job get over each kind of fault, to the very same weights; how is the fault found, and what does it cost?

`python -m benchmarks.campaign [--quick] [--only KIND] [--list] [--json]`. Every kind (see `faults`) is brought about once,
really, in a job of its own on one local cluster; the final weights are compared bit for bit with those of a run in which
nothing happens. A fault that was not seen to take effect counts as failed: its verdict is "invalid".
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import faults, machine_faults
from benchmarks.campaign_program import train
from benchmarks.faults import Kind
from benchmarks.figures import environment, say, table
from benchmarks.kills import PYTHONPATH
from benchmarks.scene import STRIKE_AT, Scene, Unseen
from ray_dr.actors import cluster as names
from ray_dr.actors.leaks import find_leaks
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.cli.main import DO_NOT_RESUBMIT, exit_status
from ray_dr.errors import JobFailed
from ray_dr.model.events import Hung, NodeLost, WorkerLost, WorkerRaised
from ray_dr.model.job import DiskTier, Every, Job, Recovery, StoreTier, Workers
from ray_dr.model.journal import Decided, JobOpened, Noted, Record
from ray_dr.telemetry.timeline import IncidentReport, incidents, verify_data
from tests.ray import jobs
from tests.s3_server import S3Server

KINDS = faults.KINDS + machine_faults.KINDS
NODES = 2
STEPS, PACE_S = 100, 0.05
PASSED, FAILED, INVALID = "passed", "failed", "invalid"
SETTLE_S = 20.0
Weights = dict[str, bytes]


@dataclass(slots=True)
class Result:
    """What came of one kind. Times are seconds since the fault; those of `phases` that did not happen are absent."""

    kind: str
    verdict: str = PASSED
    why: str = ""
    detected_by: str = "-"
    incidents: list[str] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    steps_lost: int = 0
    proof: str = ""
    took_s: float = 0.0

    def must(self, holds: bool, why: str) -> None:
        """One thing the kind promises."""
        if not holds and self.verdict == PASSED:
            self.verdict, self.why = FAILED, why


class Campaign:
    """One cluster, one S3 server, and the undisturbed run's weights."""

    def __init__(self, cluster: LocalCluster, server: S3Server, folder: Path, seed: int) -> None:
        self._cluster, self._server, self._folder, self._seed = cluster, server, folder, seed
        self._top_up()
        self.undisturbed = self._run_undisturbed()

    def run(self, kind: Kind) -> Result:
        """Bring one kind about, and judge."""
        begun, result = time.monotonic(), Result(kind.name)
        self._top_up()
        folder = self._folder / kind.name
        folder.mkdir()
        chance = random.Random(f"{self._seed} {kind.name}")
        scene = Scene(self._cluster, self._server, folder, self._spec(kind, folder), chance)
        try:
            kind.inject(scene)
            self._judge(kind, scene, result)
        except Unseen as unseen:
            result.verdict, result.why = INVALID, str(unseen)
        except Exception as error:
            result.verdict, result.why = FAILED, f"{type(error).__name__}: {error}"
            say("".join(traceback.format_exception(error)))
        finally:
            scene.clean()
        result.proof = "; ".join(scene.proof)
        _measure(result, scene.records(), scene.struck_at)
        result.must(bool(result.proof), "nothing was seen of the fault")
        if result.verdict != PASSED:
            _tell_story(scene.records())
        result.took_s = time.monotonic() - begun
        return result

    def _judge(self, kind: Kind, scene: Scene, result: Result) -> None:
        if kind.ends == "do not resubmit":
            result.must(_ends_for_good(scene), "it did not end with the advice not to resubmit it")
        else:
            result.must(scene.running.outcome().step == STEPS, "it did not do all its steps")
            report = verify_data(scene.records())
            result.must(report.ok and report.steps == STEPS, f"samples are missing or were used twice: {report}")
            different = _differences(jobs.final_state(scene.spec), self.undisturbed)
            result.must(not different, f"other weights than undisturbed: {different}")
        found = {report.incident.kind for report in _since(scene.records(), scene.struck_at)}
        expected = bool(found) == bool(kind.incidents) or (kind.untold and not found)
        result.must(expected, f"incidents {sorted(found)}, expected {sorted(kind.incidents)}")
        result.must(found <= kind.incidents, f"incidents {sorted(found)}, expected {sorted(kind.incidents)}")
        scene.clean_stopped()
        leaks = find_leaks(self._cluster)
        result.must(leaks.total == 0, f"left behind: {leaks}")

    def _run_undisturbed(self) -> Weights:
        folder = self._folder / "undisturbed"
        folder.mkdir()
        spec = self._spec(None, folder)
        running = jobs.start(train, replace(spec, settings={**spec.settings, "pace": 0.0}))
        if running.outcome().step != STEPS:
            raise RuntimeError("the undisturbed run did not do all its steps")
        return jobs.final_state(spec)

    def _spec(self, kind: Kind | None, folder: Path) -> Job:
        name = kind.name if kind else "undisturbed"
        url = self._server.url(f"case-{name}") if kind and kind.s3 else f"file://{folder / 'store'}"
        settings = {
            "steps": STEPS, "pace": PACE_S, "hold_from": STRIKE_AT + 5, "gate": str(folder / "gate"),
            "armed": str(folder / "armed"), **(kind.settings if kind else {}),
        }  # fmt: skip
        return Job(name, StoreTier(url, Every(seconds=1.0)), Workers(NODES, NODES, 1), deterministic=True, settings=settings,
                   recovery=replace(Recovery(), **(kind.recovery if kind else {})),
                   disk=DiskTier(f"file://{folder / 'disk'}", Every(steps=5)) if kind and kind.disk else None)  # fmt: skip

    def _top_up(self) -> None:
        """Two worker nodes, and Ray knows of them and of no other."""
        head = self._cluster.head_id
        while len(self._cluster.nodes()) < NODES + 1:
            self._cluster.add_node()
        deadline = time.monotonic() + SETTLE_S
        while {node.id for node in names.nodes()} | {head} != {node.node_id for node in self._cluster.nodes()}:
            if time.monotonic() > deadline:
                raise RuntimeError("Ray does not come to know its nodes")
            time.sleep(0.05)


def _ends_for_good(scene: Scene) -> bool:
    try:
        scene.running.outcome()
    except JobFailed as error:
        return not error.resubmit and exit_status(error) == DO_NOT_RESUBMIT and "do not resubmit" in str(error)
    return False


def _differences(found: Weights, wanted: Weights) -> list[str]:
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def _since(records: Sequence[Record], struck_at: float) -> list[IncidentReport]:
    return [report for report in incidents(records) if report.incident.at >= struck_at > 0]


def _measure(result: Result, records: Sequence[Record], struck_at: float) -> None:
    """What the journal says of the fault."""
    reports = _since(records, struck_at)
    result.detected_by = _detected_by(records, struck_at, reports)
    result.incidents = [str(report.incident.kind) for report in reports]
    result.steps_lost = sum(report.steps_lost for report in reports)
    if not reports:
        return
    first, offset = reports[0], reports[0].incident.at - struck_at
    result.phases = {name: offset + first.phases[name] for name in ("detected", "decided") if name in first.phases}
    last = next((report for report in reversed(reports) if "first_step" in report.phases), None)
    if last is not None:
        offset = last.incident.at - struck_at
        wanted = {"loaded": "restored", "first_step": "first_step"}
        result.phases |= {told: offset + last.phases[name] for name, told in wanted.items() if name in last.phases}


def _detected_by(records: Sequence[Record], struck_at: float, reports: Sequence[IncidentReport]) -> str:
    """How the supervisor came to know; what it noted, when it was no incident; "-" when it was nothing to note."""
    after = [record for record in records if record.at >= struck_at > 0]
    found = [record.fields for record in after if isinstance(record, Noted) and record.name == "finding"]
    findings = {str(fields["evidence"]): str(fields["detector"]) for fields in found}
    if reports:
        at = reports[0].incident.at
        event = next((r.event for r in after if isinstance(r, Decided) and r.event.at == at), None)
        match event:
            case NodeLost(how=how) | Hung(how=how) if how in findings:
                return f"detector {findings[how]}"
            case NodeLost() | WorkerLost():
                return event.how.removeprefix("its ")
            case WorkerRaised():
                return "a broken collective" if event.collateral else "raised"
            case _:
                return type(event).__name__
    if any(isinstance(r, JobOpened) and r.term > 1 for r in after):
        return "Ray, or who ran it again"
    noted = [r.name for r in after if isinstance(r, Noted) and (r.name.startswith("store.") or r.name == "journal.lagging")]
    return noted[0] if noted else next((f"detector {name}" for name in findings.values()), "-")


def _tell_story(records: Sequence[Record]) -> None:
    """The decisions and notes of a job that did not come through."""
    for record in records:
        if isinstance(record, Decided):
            phase, event = type(record.state.phase).__name__, type(record.event).__name__
            say(f"  {record.at:.2f} term {record.term} {event} -> {phase}: {record.reason}")
        elif isinstance(record, Noted):
            say(f"  {record.at:.2f} {record.name} {record.fields}")


HEAD = ("kind", "fault", "in", "found by", "detected s", "decided s", "restored s", "first step s", "steps lost", "verdict")


def row(kind: Kind, result: Result) -> list[str]:
    """One line of the table."""
    phases = [f"{result.phases[name]:.2f}" if name in result.phases else "-"
              for name in ("detected", "decided", "restored", "first_step")]  # fmt: skip
    verdict = result.verdict + (f": {result.why[:120]}" if result.why else "")
    return [kind.name, kind.does, kind.when, result.detected_by, *phases, str(result.steps_lost), verdict.replace("|", "/")]


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """What the last line says: what did not take effect has failed too."""
    bad = [result for result in results if result.verdict != PASSED]
    return {
        "kinds": len(results), "failed": len(bad), "invalid": sum(result.verdict == INVALID for result in bad),
        "not_passed": [result.kind for result in bad],
        "results": [{name: getattr(result, name) for name in Result.__dataclass_fields__} for result in results],
    }  # fmt: skip


@contextmanager
def campaign(seed: int) -> Iterator[Campaign]:
    """A cluster of a head and two nodes of one CPU each, and an S3 server."""
    with S3Server() as server, tempfile.TemporaryDirectory(prefix="rdc-") as folder:
        os.environ.update(server.environment)
        environment_of_nodes = {"PYTHONPATH": PYTHONPATH, **server.environment}
        with LocalCluster(autoscaling=False, dashboard=False, env=environment_of_nodes) as cluster, jobs.connected(cluster):
            yield Campaign(cluster, server, Path(folder), seed)


def chosen(quick: bool, only: Sequence[str]) -> list[Kind]:
    """The kinds asked for. Raises SystemExit for one there is not."""
    known = {kind.name: kind for kind in KINDS}
    if unknown := sorted(set(only) - set(known)):
        raise SystemExit(f"no kind {unknown[0]!r}; --list tells them")
    return [known[name] for name in only] if only else [kind for kind in KINDS if kind.quick or not quick]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"the {sum(kind.quick for kind in KINDS)} kinds of a quick look")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="this kind; may be repeated")
    parser.add_argument("--list", action="store_true", help="what kinds there are")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--seed", type=int, default=0, help="whom a fault meets follows from it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    asked = arguments(argv)
    kinds = chosen(asked.quick, asked.only)
    if asked.list:
        told = [[k.name, k.does, k.when, " or ".join(sorted(k.incidents)) or "none", k.ends, "yes" * k.quick] for k in kinds]
        print(table(("kind", "fault", "in", "incident", "ends", "quick"), told))
        return 0
    begun, seen = time.monotonic(), environment()
    say(json.dumps(seen))
    results = []
    with campaign(asked.seed) as one:
        for kind in kinds:
            results.append(one.run(kind))
            say(f"{' | '.join(row(kind, results[-1]))} | {results[-1].proof} | {results[-1].took_s:.1f} s")
    print(table(HEAD, [row(kind, result) for kind, result in zip(kinds, results, strict=True)]))
    found = summary(results)
    if asked.json:
        print(json.dumps({**found, "took_s": time.monotonic() - begun, "seed": asked.seed, "environment": seen}))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
