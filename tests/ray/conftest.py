"""One local cluster for all tests of this folder that can share it: its nodes come and go by Ray's own autoscaler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_dr.actors.local_cluster import LocalCluster
from tests.ray.jobs import connected, decisions


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """An autoscaling cluster of up to three worker nodes with one CPU each; this process is connected to it."""
    with LocalCluster(nodes_max=3) as local, connected(local):
        yield local


@pytest.fixture(autouse=True)
def _journals(tmp_path: Path) -> Iterator[None]:
    """Print the decisions of a failed test's jobs: the journal says why."""
    yield
    for decided in decisions(tmp_path):
        print(decided)
