"""Failures that close no connection: found by what beacons and reports say, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ray_dr.actors.leaks import find_leaks
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.events import Hung, NodeLost
from ray_dr.model.journal import Decided, Noted
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = pytest.mark.ray
STEPS = 120


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The final state of the run in which nothing went wrong, and in which nothing was found."""
    spec = jobs.at_once(jobs.job("calm", f"file://{tmp_path_factory.mktemp('calm')}", STEPS))
    running = jobs.start(replicated, spec)
    assert running.outcome().step == STEPS
    assert not findings(running)
    return jobs.final_state(spec)


def findings(running: jobs.Running) -> list[Noted]:
    return [r for r in running.records() if isinstance(r, Noted) and r.name == "finding"]


def test_a_rank_that_does_not_get_on_is_ended_and_those_that_wait_for_it_are_not(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    marker = tmp_path / "hang"
    marker.touch()
    spec = jobs.held("hung", f"file://{tmp_path}", STEPS)
    spec = replace(spec, settings={**spec.settings, "hang": str(marker)}, recovery=replace(spec.recovery, hang_s=0.0))
    running = jobs.start(replicated, spec)
    running.wait_for_step(30)
    doomed, waiting = sorted(running.workers(), key=lambda said: -said["rank"])
    running.wait_for_step(45)
    assert running.outcome().step == STEPS
    (hung,) = (r.event for r in running.records() if isinstance(r, Decided) and isinstance(r.event, Hung))
    assert hung.workers == (doomed["worker"],)
    found = [note.fields for note in findings(running) if note.fields["kind"] == "hang"]
    assert {subject["worker"] for fields in found for subject in fields["subjects"]} == {doomed["worker"]}
    assert waiting["worker"] in {worker for r in running.records() if isinstance(r, Decided) for worker in r.state.order}
    jobs.assert_exact_data(running)
    assert jobs.final_state(spec) == undisturbed
    assert find_leaks(cluster).total == 0


def test_a_frozen_node_is_taken_for_lost_long_before_its_connection_is(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    spec = jobs.held("frozen", f"file://{tmp_path}", STEPS)
    running = jobs.start(replicated, replace(spec, recovery=replace(spec.recovery, silent_s=jobs.WAIT_S)))
    now = running.wait_for_step(30)
    frozen = next(node for node in now["nodes"] if node != now["supervisor"]["node"])
    cluster.freeze_node(frozen)
    running.wait_for_world(1, now["step"])
    lost = [r.event for r in running.records() if isinstance(r, Decided) and isinstance(r.event, NodeLost)]
    assert [event.node for event in lost] == [frozen]
    assert "has said nothing for" in lost[0].how
    cluster.kill_node(frozen)
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)
    assert jobs.final_state(spec) == undisturbed
    assert find_leaks(cluster).total == 0
