"""The whole of a failure on an encrypted S3 store: a real server, chunks by SigV4, one conditional put per commit."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.job import Every, StoreTier
from ray_dr.repository.commit import CommitLog
from ray_dr.stores.open import open_store
from ray_dr.stores.sealed import MAGIC
from tests.ray import jobs
from tests.ray.programs import replicated

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
    "LAB_KEY": "c0ffee" * 10 + "beef",
}  # fmt: skip


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """moto's S3 server on a free port, with a bucket "jobs"."""
    subprocess.run(["sh", str(ROOT / "tests/servers/install.sh")], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(ROOT / ".venv-moto/bin/moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        jobs.until(lambda: _answers(server, url), "moto's start")
        urllib.request.urlopen(urllib.request.Request(f"{url}/jobs", method="PUT"), timeout=10).close()
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A cluster whose processes have the credentials; ours has them for as long."""
    os.environ.update(CREDENTIALS)
    with LocalCluster(nodes_max=2, env=CREDENTIALS, dashboard=False) as local, jobs.connected(local):
        yield local
    for name in CREDENTIALS:
        del os.environ[name]


def test_a_job_on_s3_survives_a_kill_and_resumes_from_the_bucket_alone(cluster: LocalCluster, endpoint: str) -> None:
    url = f"s3://jobs/lab?endpoint={endpoint}&region=us-east-1&key=env:LAB_KEY"
    spec = jobs.held("on-s3", url, 80, store=StoreTier(url, Every(steps=20)))
    running = jobs.start(replicated, spec)
    running.wait_for_step(30)
    jobs.sigkill(running.workers()[-1]["pid"])
    assert running.outcome().step == 80
    jobs.assert_exact_data(running)
    log = CommitLog(open_store(url), "on-s3")
    assert log.checkpoints()[-1].version.step == 80
    before = jobs.final_state(spec)
    assert_nothing_in_clear(url)
    again = jobs.start(replicated, spec)  # nothing is left in memory: the state comes from the bucket
    assert again.outcome().step == 80
    assert jobs.final_state(spec) == before


def assert_nothing_in_clear(url: str) -> None:
    bucket = open_store(url.replace("&key=env:LAB_KEY", ""))
    objects = [entry.key for entry in bucket.list("jobs/")]
    assert len(objects) > 5
    assert all(bucket.get(key).startswith(MAGIC) for key in objects)


def _answers(server: subprocess.Popen[bytes], url: str) -> bool:
    assert server.poll() is None, "moto_server ended at once"
    try:
        urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
    except OSError:
        time.sleep(0.1)
        return False
    return True
