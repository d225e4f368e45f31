"""Real kills on a real cluster: the job goes on, to the same bytes, with the same samples, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_dr.actors.leaks import find_leaks
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.journal import JobOpened
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = pytest.mark.ray
STEPS = 200
KILL_AT = 30


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The final state of the run in which nothing went wrong."""
    spec = jobs.at_once(jobs.job("undisturbed", f"file://{tmp_path_factory.mktemp('undisturbed')}", STEPS))
    running = jobs.start(replicated, spec)
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)
    return jobs.final_state(spec)


def finish_and_compare(running: jobs.Running, cluster: LocalCluster, undisturbed: dict[str, bytes]) -> None:
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)
    assert jobs.final_state(running.spec) == undisturbed
    assert find_leaks(cluster).total == 0


def other_node(now: dict[str, Any]) -> str:
    """A node of the job without its supervisor."""
    found: str = next(node for node in now["nodes"] if node != now["supervisor"]["node"])
    return found


def test_a_killed_worker_process_costs_no_committed_step_and_no_bit(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    running = jobs.start(replicated, jobs.held("worker-killed", f"file://{tmp_path}", STEPS))
    running.wait_for_step(KILL_AT)
    jobs.sigkill(running.workers()[-1]["pid"])
    running.wait_for_world(1)
    running.wait_for_world(2)
    finish_and_compare(running, cluster, undisturbed)


def test_a_killed_node_is_survived_smaller_and_replaced_by_the_autoscaler(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    running = jobs.start(replicated, jobs.held("node-killed", f"file://{tmp_path}", STEPS))
    now = running.wait_for_step(KILL_AT)
    lost = other_node(now)
    cluster.kill_node(lost)
    running.wait_for_world(1)
    assert lost not in running.wait_for_world(2)["nodes"]
    finish_and_compare(running, cluster, undisturbed)


def test_a_killed_raylet_ends_its_node_at_once(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    running = jobs.start(replicated, jobs.held("raylet-killed", f"file://{tmp_path}", STEPS))
    cluster.kill_raylet(other_node(running.wait_for_step(KILL_AT)))
    running.wait_for_world(1)
    finish_and_compare(running, cluster, undisturbed)


def test_a_killed_supervisor_is_restarted_while_training_goes_on(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    running = jobs.start(replicated, jobs.held("supervisor-killed", f"file://{tmp_path}", STEPS))
    running.wait_for_step(KILL_AT)
    attempts = {said["attempt"] for said in running.workers()}
    jobs.sigkill(running.snapshot()["supervisor"]["pid"])
    running.wait_for_step(KILL_AT + 40)
    assert {said["attempt"] for said in running.workers()} == attempts, "the group was not disturbed"
    assert [r.term for r in running.records() if isinstance(r, JobOpened)] == [1, 2]
    finish_and_compare(running, cluster, undisturbed)


def test_the_supervisor_survives_the_loss_of_its_own_node(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    running = jobs.start(replicated, jobs.held("home-lost", f"file://{tmp_path}", STEPS))
    now = running.wait_for_step(KILL_AT // 3)
    while now["supervisor"]["node"] not in now["nodes"]:  # Ray chooses where it restarts
        jobs.sigkill(now["supervisor"]["pid"])
        jobs.until(lambda pid=now["supervisor"]["pid"]: running.snapshot()["supervisor"]["pid"] != pid, "a restart")
        now = running.wait_for_step(KILL_AT // 3)
    cluster.kill_node(now["supervisor"]["node"])
    finish_and_compare(running, cluster, undisturbed)
