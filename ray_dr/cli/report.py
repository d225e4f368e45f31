"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources
from string import Template

from ray_dr.cli.charts import Line, Mark, gantt, line_chart, ribbon
from ray_dr.cli.findings import Done, Findings, RunFindings
from ray_dr.cli.timeline import spans
from ray_dr.cli.words import duration, short, size
from ray_dr.telemetry.timeline import IncidentReport

MEANINGS = {
    "detected": "from the kill until the supervisor knew",
    "decided": "until it was decided what to do, and written down",
    "unwound": "until every survivor had left the broken step",
    "found": "until the newest complete version was found",
    "provisioned": "until the next group of processes stood",
    "fetched": "until the state's bytes were read from the nearest copy",
    "loaded": "until they were in the model and the optimizer",
    "first_step": "until every worker had done a step",
    "caught_up": "until the job was past the last step it had done before",
}
STYLES = ("base", "accent")
REASONS_MOST = 80
TUNING = ("cadence.changed",)
"""Notes that come too often to be told in a report; `ray-dr timeline` has them."""


def render(findings: Findings) -> str:
    """The whole page."""
    template = Template(resources.files("ray_dr.cli").joinpath("report.html").read_text())
    sections = (_head(findings), _tiles(findings), _loss(findings), _incident(findings), _pace(findings),
                _runs(findings), _reasons(findings), _environment(findings))  # fmt: skip
    return template.substitute(title="A training job that lost a node", body="\n".join(filter(None, sections)))


def verdict(findings: Findings) -> str:
    """What came out, in one sentence."""
    if findings.trouble:
        return findings.trouble
    if not findings.survived:
        return "The job did not survive."
    if not findings.bit_identical:
        return "The job survived, but its final state differs from the undisturbed run's."
    if not findings.data_exact:
        return "The job survived, but its journal does not prove that every sample was used exactly once."
    if findings.leaks is None:
        return "The job survived, but what it left behind was not counted."
    if findings.leaks:
        return f"The job survived, but {findings.leaks} things were left behind."
    return "The job survived losing a node, and nobody could tell from its result."


def _head(findings: Findings) -> str:
    badge = '<span class="verdict">passed</span>' if findings.ok else '<span class="verdict bad">failed</span>'
    kill, back = findings.kill, findings.comeback
    told = ""
    if kill is not None:
        told = f"A whole node was killed with SIGKILL after step {kill.step}, in the middle of the next."
        if back.stepped_s is not None:
            told += f" {_workers(back.world_after)} went on {duration(back.stepped_s)} later"
            told += f", {_workers(back.world_before)} again after {duration(back.full_s)}." if back.full_s else "."
    return f"{badge}<h1>{escape(verdict(findings))}</h1><p class='soft'>{escape(told)}</p>"


def _tiles(findings: Findings) -> str:
    compared, back = findings.comparison, findings.comeback
    differ = "not compared" if compared is None else f"of {compared.tensors} tensors differ ({size(compared.size)})"
    stepped = "never" if back.stepped_s is None else duration(back.stepped_s)
    tiles = [
        (stepped, "from the kill to the next committed step", back.stepped_s is None),
        (_known(findings.steps_lost if findings.incidents else None), "steps had to be done again", False),
        (_known(findings.samples_lost), "samples lost", findings.samples_lost != 0),
        (_known(findings.samples_repeated), "samples repeated", findings.samples_repeated != 0),
        ("–" if compared is None else str(len(compared.differences)), differ, not findings.bit_identical),
        (_known(findings.leaks), "actors, groups, segments, processes leaked", findings.leaks != 0),
    ]  # fmt: skip
    shown = (f'<div class="tile{" bad" if bad else ""}"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
             for value, text, bad in tiles)  # fmt: skip
    return f'<div class="tiles">{"".join(shown)}</div>'


def _known(count: int | None) -> str:
    return "–" if count is None else str(count)


def _loss(findings: Findings) -> str:
    lines = [Line(f"{run.name} run", style, run.curve) for run, style in zip(findings.runs, STYLES, strict=False)]
    marks = [Mark(findings.kill.step, "node killed", "bad")] if findings.kill else []
    chart = line_chart(lines, marks, x_name="step", y_name="loss")
    disturbed = findings.runs[-1] if findings.runs else None
    strip = ""
    if disturbed is not None and disturbed.curve:
        first, last = disturbed.curve[0][0] - 1, disturbed.curve[-1][0]
        stretches = [(begin - first, end - first, world) for begin, end, world in worlds(disturbed.done)]
        strip = ribbon(stretches, last=last - first, noun="workers")
        strip = (
            f"{strip}<p class='axis' style='margin:.3rem 0 0 2.4rem'>workers of the {disturbed.name} run, by step</p>"
        )
    note = "The disturbed run's line lies on the other one when every step came out the same."
    return f"<section><h2>Loss</h2><p class='note'>{note}</p>{chart}{strip}</section>"


def worlds(done: Sequence[Done]) -> list[tuple[float, float, int]]:
    """(after step, to step, workers) of the surviving steps: a step that was done again counts as it was done last."""
    last = {each.step: each.world for each in done}
    found: list[tuple[float, float, int]] = []
    for step in sorted(last):
        if found and found[-1][2] == last[step]:
            found[-1] = (found[-1][0], step, last[step])
        else:
            found.append((step - 1, step, last[step]))
    return found


def _incident(findings: Findings) -> str:
    if not findings.incidents or findings.kill is None:
        return ""
    shown = [_recovery(report, findings.kill.at) for report in findings.incidents]
    back = findings.comeback
    grown = ""
    if back.full_s is not None and back.node_s is not None:
        grown = (
            f"<p class='note'>The autoscaler's replacement was up {duration(back.node_s)} after the kill, and "
            f"{_workers(back.world_before)} worked again from {duration(back.full_s)} on, without losing a step.</p>"
        )
    return f"<section><h2>Getting over it, phase by phase</h2>{''.join(shown)}{grown}</section>"


def _recovery(report: IncidentReport, killed_at: float) -> str:
    ahead = report.incident.at - killed_at
    rows = [
        (name.replace("_", " "), MEANINGS.get(name, ""), end - took, end, f"{duration(took)} → {duration(end)}")
        for name, end, took in spans({name: at + ahead for name, at in report.phases.items()})
    ]
    read = ", ".join(f"{size(count)} from {_place(kind)}" for kind, count in sorted(report.bytes.items()))
    lost = f"{report.steps_lost} step{'' if report.steps_lost == 1 else 's'} lost"
    return (
        f"<p class='note'>{escape(short(report.reason))}. {escape(short(report.expectation))}.</p>{gantt(rows)}"
        f"<p class='note' style='margin-top:.6rem'>{lost}; read {escape(read or 'nothing')}.</p>"
    )


def _pace(findings: Findings) -> str:
    lines, marks = [], []
    for run, style in zip(findings.runs, STYLES, strict=False):
        points = [(each.at - run.first_step_at, float(each.step)) for each in run.done]
        lines.append(Line(f"{run.name} run", style, points))
    kill, back = findings.kill, findings.comeback
    if kill is not None and findings.runs:
        zero = kill.at - findings.runs[-1].first_step_at
        marks.append(Mark(zero, "node killed", "bad"))
        if back.full_s is not None and back.full_s != back.stepped_s:
            marks.append(Mark(zero + back.full_s, f"{_workers(back.world_before)} again", "low"))
    chart = line_chart(lines, marks, x_name="seconds since the run's first step", y_name="step")
    note = (
        "A flat stretch is time without progress. Runs share this machine's cores, so fewer workers need not be slower."
    )
    return f"<section><h2>Progress</h2><p class='note'>{note}</p>{chart}</section>"


def _runs(findings: Findings) -> str:
    rows: list[tuple[str, list[str]]] = [
        ("steps", [f"{run.data.steps:,}" for run in findings.runs]),
        ("steps done, with those done again", [f"{len(run.done):,}" for run in findings.runs]),
        ("final loss", [f"{run.curve[-1][1]:.4f}" if run.curve else "–" for run in findings.runs]),
        ("from the first step to the end", [duration(run.ended_at - run.first_step_at) for run in findings.runs]),
        ("samples used", [f"{run.data.used:,}" for run in findings.runs]),
        ("lost / repeated", [f"{run.data.lost} / {run.data.repeated}" for run in findings.runs]),
        *_places(findings.runs),
    ]
    heads = "".join(f"<th class='n'>{escape(run.name)}</th>" for run in findings.runs)
    body = "".join(f"<tr><th>{escape(name)}</th>{_cells(values)}</tr>" for name, values in rows)
    return (
        "<section><h2>Both runs</h2><div class='scroll'><table>"
        f"<tr><th></th>{heads}</tr>{body}</table></div>{_differences(findings)}</section>"
    )


def _places(runs: Sequence[RunFindings]) -> Iterator[tuple[str, list[str]]]:
    for place in ("memory", "peer", "store"):
        yield f"checkpoints in {_place(place)}", [f"{run.saved.get(place, 0):,}" for run in runs]
        if place != "memory":  # there it is copied, not sent
            yield f"sent to {_place(place)}", [size(run.moved.get(place, 0)) for run in runs]


def _place(kind: str) -> str:
    return {"memory": "the node's memory", "peer": "a peer's memory", "store": "the store"}.get(kind, kind)


def _cells(values: Iterable[str]) -> str:
    return "".join(f"<td class='n'>{escape(value)}</td>" for value in values)


def _differences(findings: Findings) -> str:
    texts = [*(findings.comparison.differences if findings.comparison else ())]
    texts += [f"{run.name}: {text}" for run in findings.runs for text in run.data.differences]
    texts += [f"left behind ({kind}): {text}" for kind, items in findings.leaked.items() for text in items]
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def _reasons(findings: Findings) -> str:
    told = [reason for reason in findings.reasons if reason[1] not in TUNING]
    if not told:
        return ""
    rows = "".join(
        f"<tr><td class='at n'>{at:+.2f} s</td><td class='state'>{escape(what)}</td><td>{escape(text)}</td></tr>"
        for at, what, text in told[:REASONS_MOST]
    )
    more = len(told) - REASONS_MOST
    rest = f"<p class='note'>and {more} more in the journal</p>" if more > 0 else ""
    return (
        "<section><h2>What was decided, and why</h2>"
        "<p class='note'>From the disturbed run's journal; 0 is the moment of the kill.</p>"
        f"<div class='scroll'><table>{rows}</table></div>{rest}</section>"
    )


def _environment(findings: Findings) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in findings.environment.items()
    )
    return f"<section><h2>Where this ran</h2><table>{rows}</table></section>" if rows else ""


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"
