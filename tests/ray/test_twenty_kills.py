"""Twenty real kills in a row: no sample lost or used twice, no byte different, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_dr.actors.leaks import find_leaks
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.actions import FormGroup
from ray_dr.model.journal import Decided
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KILLS = 20
STEPS = 1200


def test_twenty_kills_in_a_row_change_nothing_and_leave_nothing(cluster: LocalCluster, tmp_path: Path) -> None:
    """Every fifth kill takes a whole node, every seventh the supervisor, the others a worker process: each time right after
    the job is back at two workers and has done a few steps."""
    calm = jobs.at_once(jobs.job("calm", f"file://{tmp_path / 'calm'}", STEPS))
    assert jobs.start(replicated, calm).outcome().step == STEPS
    running = jobs.start(replicated, jobs.held("kills", f"file://{tmp_path / 'kills'}", STEPS))
    step = 5
    for kill in range(1, KILLS + 1):
        now = running.wait_for_world(2, step)
        kill_something(cluster, running, now, kill)
        step = now["step"] + 5
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)
    assert jobs.final_state(running.spec) == jobs.final_state(calm)
    groups = [r for r in running.records() if isinstance(r, Decided) and any(isinstance(a, FormGroup) for a in r.actions)]
    assert len(groups) > KILLS, "every kill of a worker or node broke a group and grew it back"
    assert find_leaks(cluster).total == 0


def kill_something(cluster: LocalCluster, running: jobs.Running, now: dict[str, object], kill: int) -> None:
    nodes: list[str] = list(now["nodes"])  # type: ignore[call-overload]
    supervisor: dict[str, int] = now["supervisor"]  # type: ignore[assignment]
    if kill % 5 == 0:
        cluster.kill_node(nodes[kill % len(nodes)])
    elif kill % 7 == 0:
        jobs.sigkill(supervisor["pid"])
        jobs.until(lambda: running.snapshot()["supervisor"]["pid"] != supervisor["pid"], "a restart")
    else:
        workers = running.workers()
        jobs.sigkill(workers[kill % len(workers)]["pid"])
