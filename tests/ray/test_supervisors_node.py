"""The supervisor's node is lost, and no member of the group was there: training goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.journal import JobOpened
from tests.ray import jobs
from tests.ray.programs import replicated
from tests.ray.test_control_plane import STEPS, finish, nothing_was_done_again, tell_steps

pytestmark = pytest.mark.ray


@pytest.fixture
def roomy() -> Iterator[LocalCluster]:
    """Three nodes that no job would take: those for the job come when the supervisor has found its place."""
    with LocalCluster(autoscaling=False, dashboard=False) as local:
        for _ in range(3):
            local.add_node(cpus=0)
        with jobs.connected(local):
            yield local


def test_no_step_is_done_again_when_the_supervisors_node_is_lost_and_no_member_was_there(
    roomy: LocalCluster, tmp_path: Path
) -> None:
    running = jobs.start(replicated, jobs.job("home-away", f"file://{tmp_path}", STEPS))
    home = running.snapshot()["supervisor"]
    while home["node"] == roomy.head_id:  # Ray chooses where it restarts
        jobs.sigkill(home["pid"])
        jobs.until(lambda pid=home["pid"]: running.snapshot()["supervisor"]["pid"] != pid, "a restart")
        home = running.snapshot()["supervisor"]
    for _ in range(2):
        roomy.add_node()
    now = running.wait_for_step(30)
    assert now["supervisor"] == home
    roomy.kill_node(home["node"])
    finish(running)
    assert max(r.term for r in running.records() if isinstance(r, JobOpened)) == now["term"] + 1
    nothing_was_done_again(running)
    tell_steps("supervisor's node killed", running)
