"""`ray-dr timeline JOB`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import click

from ray_dr.checkpoint.failures import COUNTED
from ray_dr.cli.stored import find_job, job_argument
from ray_dr.cli.words import clock, duration, print_json, short, size, table, value
from ray_dr.model.codec import to_json
from ray_dr.model.events import NodeLeaving
from ray_dr.model.journal import Decided, JobOpened, Noted, Record
from ray_dr.model.ladder import Plan
from ray_dr.telemetry.phases import MEASURED
from ray_dr.telemetry.preemptions import WORD
from ray_dr.telemetry.timeline import IncidentReport, incidents


@click.command("timeline")
@job_argument
def command(job: str, store: str | None, as_json: bool) -> None:
    """What went wrong, how long each part of getting over it took, and the reason of every decision."""
    found = find_job(job, store)
    records = found.records()
    reports, lines = incidents(records), tuple(moments(records))
    if as_json:
        shown = [{"at": at, "what": what, "text": text} for at, what, text in lines]
        print_json({"job": found.name, "incidents": to_json(reports), "moments": shown})
        return
    for report in reports:
        click.echo(describe(report) + "\n")
    if not reports:
        click.echo("no incidents\n")
    click.echo(table(("at", "what", "why"), [(clock(at), what, text) for at, what, text in lines]))


def moments(records: Iterable[Record]) -> Iterator[tuple[float, str, str]]:
    """(UTC seconds, what, in words) of everything that changed what the job does."""
    phase = ""
    for record in records:
        match record:
            case JobOpened():
                yield record.at, "opened", f"term {record.term}, Python {record.python}, Ray {record.ray}"
            case Noted(name=name) if name in (COUNTED, MEASURED):
                pass
            case Noted():
                yield (
                    record.at,
                    record.name,
                    ", ".join(f"{name} {value(field)}" for name, field in record.fields.items()),
                )
            case Decided():
                now = type(record.state.phase).__name__.lower()
                announced = isinstance(record.event, NodeLeaving) and WORD in record.reason
                if now != phase or record.actions or announced:
                    yield record.at, "preemption" if announced else now, short(record.reason)
                phase = now
            case _:
                pass


def describe(report: IncidentReport) -> str:
    """One incident as text: what broke, why what was done, and each phase's end with what it took."""
    incident = report.incident
    kind = str(incident.kind).replace("_", " ")
    head = f"incident {incident.number} at {clock(incident.at)}, step {incident.step}: {kind} ({incident.detail})"
    lines = [head, f"  subject   {incident.subject}", f"  decision  {short(report.reason)}"]
    if report.expectation:
        lines.append(f"  then      {short(report.expectation)}")
    if report.plan is not None:
        lines.append(f"  expected  {expected(report.plan, report.took_s)}")
    rows = [(name, duration(at), duration(took)) for name, at, took in spans(report.phases)]
    lines += [f"  {line}" for line in table(("phase", "after", "took"), rows, right=(1, 2)).splitlines()]
    read = ", ".join(f"{size(count)} from {kind}" for kind, count in report.bytes.items()) or "nothing"
    outcome = f"attempt {report.attempt}" if report.attempt else "not over yet"
    return "\n".join([*lines, f"  {outcome}: {report.steps_lost} steps lost, read {read}"])


def expected(plan: Plan, took_s: float | None) -> str:
    """What was expected of the way that was taken, and what became of it."""
    what = f"{plan.way.rung}, the next step after {duration(plan.way.next_step_s)}"
    return f"{what}: it took {duration(took_s)}" if took_s is not None else what


def spans(phases: dict[str, float]) -> Sequence[tuple[str, float, float]]:
    """(name, ends at, took) in order of time; the first begins at 0."""
    ordered = sorted(phases.items(), key=lambda item: item[1])
    begins = [0.0, *(at for _, at in ordered)]
    return [(name, at, at - begun) for (name, at), begun in zip(ordered, begins, strict=False)]
