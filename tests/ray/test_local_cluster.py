"""The local cluster: Ray's own autoscaler replaces what is killed, and nothing is left behind. Real kills."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.autoscaler.sdk import request_resources
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_dr.actors import local_processes
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.errors import ClusterError

pytestmark = pytest.mark.ray


def await_true(condition: Callable[[], bool], *, limit_s: float) -> float:
    """Seconds until the condition held; fails the test when it doesn't within limit_s."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s, f"not within {limit_s} s"
        time.sleep(0.05)
    return time.monotonic() - started


def connect(cluster: LocalCluster) -> None:
    ray.init(address=cluster.address, namespace="ray_dr", log_to_driver=False)


def alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def is_running(pid: int) -> bool:
    process = local_processes.read_processes().get(pid)
    return process is not None and not process.dead


@ray.remote(num_cpus=1)
class Probe:
    def where(self) -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def stand(self) -> str:
        return str(Path("here.txt").resolve(strict=True))

    def block(self) -> None:
        signal.pause()


@pytest.fixture(scope="module")
def autoscaled() -> Iterator[LocalCluster]:
    """Two worker nodes of the autoscaler's, asked for and kept asked for."""
    with LocalCluster(nodes_max=3) as running:
        connect(running)
        request_resources(bundles=[{"CPU": 1}] * 2)
        yield running
    assert running.leaks() == []


@pytest.fixture
def cluster(autoscaled: LocalCluster) -> LocalCluster:
    """The same, whole again and with this process as its driver."""
    if not ray.is_initialized():
        connect(autoscaled)
    await_true(lambda: len(alive()) == 3, limit_s=60)
    return autoscaled


def test_nodes_do_not_share_the_directory_of_a_runtime_environment(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "here.txt").write_text("here")
    ray.shutdown()
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"working_dir": str(tmp_path)})
    spread = Probe.options(scheduling_strategy="SPREAD")
    first = spread.remote()
    before = ray.get(first.stand.remote())
    second = spread.remote()
    assert ray.get(second.stand.remote()) != before
    assert ray.get(first.stand.remote()) == before, "unpacking it for the second took it from under the first"
    ray.shutdown()


def test_knows_the_processes_of_each_node(cluster: LocalCluster) -> None:
    probe = Probe.remote()
    pid, node_id = ray.get(probe.where.remote())
    nodes = {node.node_id: node for node in cluster.nodes()}
    assert set(nodes) == alive()
    assert cluster.nodes()[0].node_id == cluster.head_id
    assert [node.node_id for node in nodes.values() if pid in node.pids] == [node_id]
    ray.kill(probe)


def test_the_token_is_readable_by_its_owner_only_and_demanded(cluster: LocalCluster) -> None:
    assert stat.S_IMODE(cluster.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.temp_dir.stat().st_mode) == 0o700
    stranger = {**os.environ, **cluster.env, "RAY_AUTH_TOKEN": "0" * 64}
    del stranger["RAY_AUTH_TOKEN_PATH"]
    knock = "from ray.job_submission import JobSubmissionClient as C; C().list_jobs()"
    refused = subprocess.run([sys.executable, "-c", knock], env=stranger, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "auth" in refused.stderr.lower()


def test_runs_a_submitted_job(cluster: LocalCluster) -> None:
    client = JobSubmissionClient(cluster.dashboard_url)
    job = client.submit_job(
        entrypoint=f"{sys.executable} -c \"import ray; ray.init(); print('nodes', len(ray.nodes()))\""
    )
    await_true(lambda: client.get_job_status(job).is_terminal(), limit_s=60)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)


@pytest.mark.parametrize("kill", ["kill_raylet", "kill_node"])
def test_the_autoscaler_replaces_a_killed_node(cluster: LocalCluster, kill: str) -> None:
    probe = Probe.remote()
    _, node_id = ray.get(probe.where.remote())
    blocked, before = probe.block.remote(), alive()
    lost = next(node for node in cluster.nodes() if node.node_id == node_id)
    getattr(cluster, kill)(node_id)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(blocked, timeout=20)
    await_true(lambda: node_id not in alive() and len(alive()) == 3, limit_s=30)
    assert len(alive() - before) == 1
    await_true(lambda: not any(is_running(each) for each in lost.pids), limit_s=30)


def test_a_cut_of_power_leaves_no_process_of_the_node(cluster: LocalCluster) -> None:
    probe = Probe.remote()
    pid, node_id = ray.get(probe.where.remote())
    lost = next(node for node in cluster.nodes() if node.node_id == node_id)
    cluster.kill_node(node_id)
    assert pid in lost.pids
    # SIGKILL is delivered when kill_node returns; the kernel needs a moment to tear the processes down.
    await_true(lambda: not any(is_running(each) for each in lost.pids), limit_s=0.5)
    await_true(lambda: node_id not in alive(), limit_s=30)  # so that the next test's cluster is whole, not about to be


def test_killing_a_node_that_does_not_run_is_an_error(cluster: LocalCluster) -> None:
    with pytest.raises(ClusterError, match="no node 00"):
        cluster.kill_node("00")


STEADY_S = 15
"""Several rounds of the autoscaler and of every health check; two minutes were tried by hand."""


@pytest.mark.slow
def test_healthy_nodes_are_neither_ended_nor_joined_by_others(cluster: LocalCluster) -> None:
    steady, deadline = alive(), time.monotonic() + STEADY_S
    while time.monotonic() < deadline:
        assert alive() == steady
        time.sleep(0.5)


def test_two_run_side_by_side_without_an_autoscaler_and_leave_nothing() -> None:
    ray.shutdown()  # of the cluster that other tests share: a process drives one at a time
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    with (
        LocalCluster(autoscaling=False, dashboard=False) as one,
        LocalCluster(autoscaling=False, dashboard=False) as two,
    ):
        added = one.add_node(2, labels={"rack": "a"})
        connect(one)
        assert alive() == {one.head_id, added.node_id}
        assert [node["Labels"]["rack"] for node in ray.nodes() if node["NodeID"] == added.node_id] == ["a"]
        assert ray.cluster_resources()["CPU"] == 2
        ray.shutdown()
        connect(two)
        assert alive() == {two.head_id}
        two.stop()
        assert not ray.is_initialized()
        one.kill_node(added.node_id)
        connect(one)
        await_true(lambda: alive() == {one.head_id}, limit_s=20)
        directories = [one.temp_dir]
    assert one.leaks() == two.leaks() == []
    assert not any(directory.exists() for directory in directories)
    assert {name: os.environ.get(name) for name in before} == before


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_nothing_survives_an_owner_that_is_interrupted_or_killed(ending: signal.Signals) -> None:
    program = (
        "import signal; from ray_dr.actors.local_cluster import LocalCluster\n"
        "cluster = LocalCluster(dashboard=False).start(); print(cluster.temp_dir, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        sessions = local_processes.read_sessions(directory)

        def members() -> int:
            return len(local_processes.members(local_processes.read_processes(), directory, sessions))

        assert members() > 3
        owner.send_signal(ending)
        owner.wait(60)
    await_true(lambda: members() == 0 and not directory.exists(), limit_s=10)


def test_an_output_that_explains_comes_with_a_head_that_cannot_start() -> None:
    cluster = LocalCluster(object_store_bytes=1)
    with pytest.raises(ClusterError, match=r"(?s)exit status 1.*memory"):
        cluster.start()
    assert cluster.leaks() == []
