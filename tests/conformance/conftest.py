"""The stores that the conformance suite runs over, each fresh for each test."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_dr.stores.base import Store
from ray_dr.stores.disk import FileStore
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.open import open_store
from ray_dr.stores.retrying import Retry, Retrying
from tests.s3_server import S3Server
from tests.servers.bound import bound
from tests.servers.ceph import NotAvailable, RadosGateway

ROOT = Path(__file__).resolve().parents[2]
PART_BYTES = 5 * 2**20
KINDS = ("memory", "file", "sealed", "faulty", "s3", "moto", pytest.param("ceph", marks=pytest.mark.slow))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with S3Server(page=7) as server:
        yield server


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """moto's S3 server from its own environment (made when missing), on a free loopback port."""
    subprocess.run(
        ["sh", str(ROOT / "tests/servers/install.sh")], check=True, env={**os.environ, "PYTHON": sys.executable}
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(ROOT / ".venv-moto/bin/moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(bound(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(endpoint, server)
        yield endpoint
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RadosGateway]:
    """Ceph's S3 gateway: the real thing, where Debian's packages are."""
    server = RadosGateway(tmp_path_factory.mktemp("ceph"))
    try:
        server.__enter__()
    except NotAvailable as error:
        pytest.skip(str(error))
    try:
        yield server
    finally:
        server.__exit__()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    match request.param:
        case "memory":
            return MemoryStore()
        case "file":
            return FileStore(tmp_path / "store")
        case "sealed":
            monkeypatch.setenv("STORE_KEY", "5a" * 32)
            return open_store(f"file://{tmp_path}/store?key=env:STORE_KEY")
        case "faulty":
            return _retried_over_faults()
        case "s3":
            server = request.getfixturevalue("s3_server")
            _use(server.environment, monkeypatch)
            return open_store(server.url(f"b-{uuid.uuid4().hex}"), part_bytes=PART_BYTES)
        case "ceph":
            gateway = request.getfixturevalue("gateway")
            _use(gateway.environment, monkeypatch)
            return open_store(gateway.url(gateway.make_bucket(), "below/a-prefix"), part_bytes=PART_BYTES)
        case _:
            _use({"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}, monkeypatch)
            return _moto_store(request.getfixturevalue("moto_endpoint"))


def _retried_over_faults() -> Store:
    """Every operation's first call fails, every put's second takes effect and fails: all of it must stay unseen."""
    faulty = FaultyStore(MemoryStore())
    for operation in ("put", "get", "readinto", "list", "delete"):
        faulty.fail(operation)
    faulty.apply_then_fail("put")
    faulty.truncate("list", 1)
    return Retrying(faulty, Retry(attempts=4), rng=random.Random(1), sleep=lambda _: None)


def _moto_store(endpoint: str) -> Store:
    import boto3

    bucket = f"b-{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=bucket)
    return open_store(f"s3://{bucket}/below/a-prefix?endpoint={endpoint}&region=us-east-1", part_bytes=PART_BYTES)


def _use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def _wait_until_up(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 30
    while True:
        assert server.poll() is None, "moto_server ended at once"
        try:
            urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < until, "moto_server did not come up within 30 s"
            time.sleep(0.05)
