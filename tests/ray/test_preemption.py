"""A node that Ray is asked to drain is left in time: nothing is done again, and the weights are those of the undisturbed run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without stubs
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from ray_dr.actors.leaks import find_leaks
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.events import NodeLeaving
from ray_dr.model.journal import Decided, Stepped
from ray_dr.model.recovery import FailureKind, State
from ray_dr.telemetry.timeline import incidents
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = pytest.mark.ray
STEPS = 200
NOTICE_AT = 30
IN_TIME_S = 40.0


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The final state of the run in which nothing went wrong."""
    spec = jobs.at_once(jobs.job("undisturbed", f"file://{tmp_path_factory.mktemp('undisturbed')}", STEPS))
    assert jobs.start(replicated, spec).outcome().step == STEPS
    return jobs.final_state(spec)


def drain(cluster: LocalCluster, node: str, within_s: float) -> float:
    """Tell Ray, as a cloud's watcher does, that a node will be gone; the deadline, UTC seconds."""
    deadline = time.time() + within_s
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=cluster.address).drain_node(node, reason, "spot", int(deadline * 1000))
    assert accepted, why
    return deadline


def take_away(cluster: LocalCluster, node: str) -> None:
    """Cut a node's power. A raylet that is drained ends by itself as soon as nothing runs there."""
    if any(each.node_id == node for each in cluster.nodes()):
        cluster.kill_node(node)


def decided(running: jobs.Running) -> list[Decided]:
    return [record for record in running.records() if isinstance(record, Decided)]


def leaving(running: jobs.Running) -> Decided | None:
    """The decision on the notice."""
    return next((record for record in decided(running) if isinstance(record.event, NodeLeaving)), None)


def finish_and_compare(running: jobs.Running, cluster: LocalCluster, undisturbed: dict[str, bytes]) -> None:
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)
    assert jobs.final_state(running.spec) == undisturbed
    assert find_leaks(cluster).total == 0


def other_node(running: jobs.Running) -> str:
    """A node of the job, without its supervisor where that is possible."""
    now = running.wait_for_step(NOTICE_AT)
    return sorted(now["nodes"], key=lambda node: node == now["supervisor"]["node"])[0]


def test_a_drained_node_is_left_before_its_end_and_nothing_is_done_again(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    running = jobs.start(replicated, jobs.held("drained", f"file://{tmp_path}", STEPS))
    node = other_node(running)
    deadline = drain(cluster, node, IN_TIME_S)
    running.wait_for_world(1)
    jobs.until(lambda: time.time() >= deadline, "the deadline")
    take_away(cluster, node)
    assert node not in running.wait_for_world(2)["nodes"]
    finish_and_compare(running, cluster, undisturbed)
    choice = leaving(running)
    assert choice is not None
    assert "ray drain" in choice.reason
    assert "preemption: attempt 1 stops at its next common step" in choice.reason
    assert incidents(running.records()) == ()
    attempts = {}
    for record in running.records():
        if isinstance(record, Stepped):
            attempts.setdefault(record.record.step, set()).add(record.record.attempt)
    assert all(len(done) == 1 for done in attempts.values()), "no step was done twice"


def test_a_notice_that_comes_with_the_end_is_a_loss_that_is_charged_to_no_budget(
    cluster: LocalCluster, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    # On all the nodes the cluster may have: no other comes before this one is gone.
    running = jobs.start(replicated, jobs.held("at-once", f"file://{tmp_path}", STEPS, nodes=(3, 3, 1)))
    node = other_node(running)
    drain(cluster, node, 0.0)
    jobs.until(lambda: node in running.snapshot()["leaving"], "the decision on the notice")
    take_away(cluster, node)
    assert node not in running.wait_for_world(2)["nodes"]
    finish_and_compare(running, cluster, undisturbed)
    choice = leaving(running)
    assert choice is not None
    assert "preemption: too soon for a move" in choice.reason
    (report,) = incidents(running.records())
    assert report.incident.kind is FailureKind.PREEMPTED
    states: list[State] = [record.state for record in decided(running)]
    assert max(state.failures for state in states) == 0
