"""Nodes nobody gets: those other jobs had trouble with, and the one that was just lost, while another fits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray

from ray_dr.actors import cluster as ray_side
from ray_dr.actors.leaks import find_leaks
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.journal import Noted
from ray_dr.model.nodes import Charge
from ray_dr.model.signal import FaultKind
from ray_dr.stores.open import open_store
from ray_dr.telemetry.nodes import NodeBook, machine_name
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = pytest.mark.ray
STEPS = 120


def test_a_replacement_lands_neither_on_the_lost_node_nor_on_one_that_others_had_trouble_with(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}"
    for _ in range(3):
        cluster.add_node(1)
    fitting = [node for node in ray_side.nodes() if node.cpus >= 1]
    assert len(fitting) == 3
    book = NodeBook(open_store(url), time.time)
    bad = fitting[0]
    bad_name = machine_name(machine_name(bad.host), bad.id)
    for number in range(3):
        book.add(Charge(bad_name, FaultKind.NODE_GONE, time.time(), "another", f"1.{number}", "silent"))

    running = jobs.start(replicated, jobs.held("picky", url, STEPS, nodes=(1, 1, 1)))
    first = running.wait_for_step(30)
    (lost,) = first["nodes"]
    examined = lambda: [r for r in running.records() if isinstance(r, Noted) and r.name == "node.examined"]  # noqa: E731
    jobs.until(lambda: lost in [note.fields["node"] for note in examined()], "its examination")
    assert {"compute", "memory", "disk", "store"} <= set(examined()[0].fields["costs"])
    assert not examined()[0].fields["troubles"]
    (agent,) = [name for name in ray_side.actors_of("picky") if name.startswith("agent:")]
    handle = ray_side.actor(agent)
    assert handle is not None
    jobs.sigkill(ray.get(handle.describe.remote(), timeout=jobs.WAIT_S)["pid"])
    jobs.until(lambda: running.snapshot()["incidents"] == 1, "the loss")
    (second,) = running.wait_for_world(1, first["step"])["nodes"]
    assert running.outcome().step == STEPS

    assert {lost, second} == {node.id for node in fitting[1:]}
    notes = [r for r in running.records() if isinstance(r, Noted) and r.name == "node.quarantined"]
    assert [note.fields["machine"] for note in notes] == [bad_name]
    charges = [entry for entry in book.entries() if isinstance(entry, Charge) and entry.job == "picky"]
    assert [entry.machine for entry in charges] == [machine_name(machine_name(bad.host), lost)]
    jobs.assert_exact_data(running)
    assert find_leaks(cluster).total == 0
