"""Standbys on a real cluster: who waits takes the place of who is lost, at full size, from memory, and is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.actions import FormGroup, StopGroup
from ray_dr.model.journal import Decided, PartSaved, Record, Restored, Where
from ray_dr.model.recovery import Group
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = pytest.mark.ray
STEPS = 300


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    """Three worker nodes of one CPU each; a lost one is not replaced by itself."""
    with LocalCluster(autoscaling=False, dashboard=False) as local:
        for _ in range(3):
            local.add_node()
        with jobs.connected(local):
            yield local


def groups(records: list[Record]) -> list[Group]:
    decided = [record for record in records if isinstance(record, Decided)]
    return [action.group for record in decided for action in record.actions if isinstance(action, FormGroup)]


def wait_for_standbys(running: jobs.Running, count: int) -> list[str]:
    def stand_by() -> list[str] | None:
        now = running.snapshot()
        return list(now["standbys"]) if now["phase"] == "Running" and len(now["standbys"]) == count else None

    found: list[str] = jobs.until(stand_by, f"{count} standing by")
    return found


def keeps_copies(records: list[Record], node: str) -> bool:
    """Whether a version of the second attempt has a copy on that node."""
    peers = [r for r in records if isinstance(r, PartSaved) and r.where is Where.PEER]
    return any(r.node == node and r.version.attempt == 2 for r in peers)


def check_taken(running: jobs.Running, lost: str, standby: str) -> None:
    """The second group is as large as the first, the standby has the lost one's rank, and nobody stopped for anything else."""
    first, second = groups(running.records())[:2]
    assert second.members == tuple(standby if member == lost else member for member in first.members)
    assert second.restore is not None
    assert second.restore.attempt == first.attempt

    def all_restored() -> list[Restored] | None:
        found = [r for r in running.records() if isinstance(r, Restored) and r.attempt == second.attempt]
        return found if {r.rank for r in found} == set(range(len(first.members))) else None

    restored: list[Restored] = jobs.until(all_restored, "all to have restored")
    for record in restored:
        assert set(record.sources) <= {"memory", "peer"}, "no store was needed"
    decided = [record for record in running.records() if isinstance(record, Decided)]
    assert any(f"{standby} takes the place of {lost}" in record.reason for record in decided)
    assert not any(isinstance(a, StopGroup) and not a.everywhere for record in decided for a in record.actions)


def test_a_standby_node_takes_a_lost_nodes_place_with_the_state_it_keeps(nodes: LocalCluster, tmp_path: Path) -> None:
    spec = jobs.held("node", f"file://{tmp_path}", STEPS)
    spec = replace(spec, workers=replace(spec.workers, standby_nodes=1))
    running = jobs.start(replicated, spec)
    running.wait_for_world(2, 25)  # by then a version has its copies
    (standby,) = wait_for_standbys(running, 1)
    where = {said["worker"]: said["node"] for said in running.workers()}
    members = groups(running.records())[0].members
    host = running.snapshot()["supervisor"]["node"]
    lost = next(member for member in members if where[member] != host)
    nodes.kill_node(where[lost])
    running.wait_for_world(2, running.snapshot()["step"] + 3)
    check_taken(running, lost, standby)
    rank = members.index(lost)
    sources = [set(r.sources) for r in running.records() if isinstance(r, Restored) and (r.attempt, r.rank) == (2, rank)]
    assert sources == [{"memory"}], "all that it needed lay on its own node"
    nodes.add_node()
    (newcomer,) = wait_for_standbys(running, 1)
    new_home = next(said["node"] for said in running.workers() if said["worker"] == newcomer)
    jobs.until(lambda: keeps_copies(running.records(), new_home), "a copy on the node that stands by now")
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)


def test_a_standby_process_takes_a_killed_workers_place(nodes: LocalCluster, tmp_path: Path) -> None:
    spec = jobs.held("process", f"file://{tmp_path}", STEPS)
    spec = replace(spec, workers=replace(spec.workers, standby_processes=1))
    running = jobs.start(replicated, spec)
    for kill in range(2):  # the second time it is a process that was started in place of the first standby
        running.wait_for_world(2, running.snapshot()["step"] + 20)
        standbys = wait_for_standbys(running, 2)
        said = {one["worker"]: one for one in running.workers()}
        lost = groups(running.records())[-1].members[0]
        standby = next(worker for worker in standbys if said[worker]["node"] == said[lost]["node"])
        jobs.sigkill(said[lost]["pid"])
        running.wait_for_world(2, running.snapshot()["step"] + 3)
        if not kill:
            check_taken(running, lost, standby)
        assert groups(running.records())[-1].members[0] == standby
        on_nodes = [one["node"] for one in running.workers() if one["reserves"]]
        assert len(on_nodes) == len(set(on_nodes)), "no node's processes hold more than a worker's share"
    check_kept_by_a_new_supervisor(running)
    assert running.outcome().step == STEPS
    jobs.assert_exact_data(running)


def check_kept_by_a_new_supervisor(running: jobs.Running) -> None:
    """Who stands by when a supervisor ends does so under the next, and the group goes on as it is."""
    standbys, group = wait_for_standbys(running, 2), groups(running.records())[-1]
    pid = running.snapshot()["supervisor"]["pid"]
    jobs.sigkill(pid)
    jobs.until(lambda: running.snapshot()["supervisor"]["pid"] != pid, "a restart")
    assert sorted(wait_for_standbys(running, 2)) == sorted(standbys)
    assert groups(running.records())[-1] == group
