"""The demo's findings and report, from two hand-made lives of one job."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ray_dr.cli.charts import Line, line_chart, ticks
from ray_dr.cli.compare import Comparison, compare, read_checkpoint
from ray_dr.cli.demo import as_object, summary
from ray_dr.cli.findings import Comeback, Findings, Kill, find_comeback, find_incidents, find_reasons, find_run
from ray_dr.cli.report import render, verdict, worlds
from ray_dr.cli.stored import StoredJob
from ray_dr.stores.memory import MemoryStore
from tests.unit import stored_life
from tests.unit.stored_life import KILLED_AT, NAME

KILL = Kill(KILLED_AT, "b", 5)


def findings() -> Findings:
    disturbed = stored_life.disturbed()
    return Findings(
        runs=(find_run("undisturbed", stored_life.undisturbed()), find_run("disturbed", disturbed)),
        kill=KILL,
        comeback=find_comeback(disturbed, KILL),
        incidents=find_incidents(disturbed, KILL),
        comparison=Comparison(3, 1, 868),
        leaked={"actors": (), "placement_groups": (), "shared_memory": (), "processes": ()},
        reasons=find_reasons(disturbed, KILL),
        environment={"Python": "3.11 <&>"},
        took_s=12.0,
    )


class Checker(HTMLParser):
    """Every element that is opened is closed, and nothing is fetched from anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_job_that_came_back_passes() -> None:
    found = findings()
    assert found.survived
    assert found.data_exact
    assert found.ok
    assert (found.steps_lost, found.leaks) == (2, 0)
    assert found.comeback == Comeback(pytest.approx(1.5), None, None, world_before=2, world_after=1)
    assert found.kill == KILL


def test_a_step_that_was_done_again_counts_as_it_was_done_last() -> None:
    assert worlds(findings().runs[1].done) == [(0, 3, 2), (3, 8, 1)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"comparison": Comparison(3, 1, 868, ("a: 1 of 60 bytes differ",))}, "differs from the undisturbed"),
        ({"comparison": None}, "differs from the undisturbed"),
        ({"leaked": {"actors": ("worker:x",)}}, "1 things were left behind"),
        ({"kill": None}, "did not survive"),
        ({"runs": ()}, "did not survive"),
        ({"trouble": "The demo was stopped by Ctrl-C.", "runs": ()}, "stopped by Ctrl-C"),
    ],
)
def test_whatever_is_not_as_promised_fails_and_is_said(change: dict, told: str) -> None:
    found = replace(findings(), **change)
    assert not found.ok
    assert told in verdict(found)
    assert told in render(found)
    assert '<span class="verdict bad">' in render(found)


def test_a_sample_used_twice_fails() -> None:
    found = findings()
    run = found.runs[1]
    found = replace(found, runs=(found.runs[0], replace(run, data=replace(run.data, repeated=1))))
    assert not found.ok
    assert "does not prove" in verdict(found)


def test_the_report_is_whole_and_needs_nothing_else() -> None:
    page = render(findings())
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert "@import" not in page
    assert not re.search(r"url\(|https?://", page)
    assert not re.search(r"\$\{?[a-z]", page)
    assert "3.11 &lt;&amp;&gt;" in page


def test_the_report_tells_the_incident_phase_by_phase() -> None:
    page = render(findings())
    names = re.findall(r'class="name">([a-z ]+)<', page)
    assert names == [
        "detected",
        "decided",
        "unwound",
        "found",
        "provisioned",
        "fetched",
        "loaded",
        "first step",
        "caught up",
    ]
    assert "2 steps lost; read 10 B from the node&#x27;s memory, 7 B from a peer&#x27;s memory." in page
    assert page.count("<polyline") == 4


def test_the_last_line_of_json_has_what_was_promised() -> None:
    told = as_object(findings(), Path("report.html"))
    expected = {
        "survived": True,
        "bit_identical": True,
        "steps_lost": 2,
        "samples_lost": 0,
        "samples_repeated": 0,
        "leaked": 0,
    }
    assert expected.items() <= told.items()
    assert told["recovery_s"] == pytest.approx(1.5)
    assert "bit-identical     yes" in summary(findings())


def test_checkpoints_are_compared_byte_by_byte() -> None:
    stores = [MemoryStore(name) for name in ("report-left", "report-same", "report-other")]
    other = bytearray(stored_life.contents(8))
    other[3] ^= 1
    for store, data in zip(stores, (b"", b"", bytes(other)), strict=True):
        stored_life.save_checkpoint(store, 8, data=data)
    left, same, changed = (read_checkpoint(job, job.checkpoint()) for job in (StoredJob(NAME, s) for s in stores))
    assert compare(left, same).identical
    assert compare(left, same).tensors == 3
    assert compare(left, changed).differences == ("model/a: 1 of 60 bytes differ",)
    assert not compare(left, replace(changed, tensors={})).identical
    assert compare(left, replace(same, scalars={"lr": 0.1})).differences == ("lr: the values differ",)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 240, 6) == [0, 50, 100, 150, 200]
    assert ticks(2.3, 5.8, 5) == [3, 4, 5]
    assert ticks(1, 1, 5) == [1]


def test_an_empty_chart_is_a_chart() -> None:
    assert "<svg" in line_chart([Line("none", "base", ())], x_name="step", y_name="loss")
