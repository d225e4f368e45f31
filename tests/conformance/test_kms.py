"""Stores whose key is in KMS: against moto's KMS, and against one that answers as AWS does where moto does not."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import numpy as np
import pytest
from click.testing import CliRunner

import ray_dr
from ray_dr.cli.main import main
from ray_dr.errors import AccessDenied, StoreError, StoreUnavailable
from ray_dr.stores import kms
from ray_dr.stores.keys import WrongKey, find_key
from ray_dr.stores.open import open_store
from ray_dr.stores.sealed import HEADER

REGION = "eu-central-1"
WEIGHTS = {"w": np.arange(10_000, dtype=np.float32), "step": 7}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs this."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    use(monkeypatch, "any", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)


def use(monkeypatch: pytest.MonkeyPatch, key: str, secret: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)


@pytest.fixture
def endpoint(elsewhere: None, moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", moto_endpoint)
    return moto_endpoint


@pytest.fixture
def client(endpoint: str) -> Any:
    return boto3.client("kms")


@pytest.fixture
def key(client: Any) -> str:
    """The ARN of a new key."""
    return str(client.create_key()["KeyMetadata"]["Arn"])


def loaded(url: str) -> dict[str, Any]:
    """What is saved at `url`, read into zeros."""
    state = {"w": np.zeros_like(WEIGHTS["w"]), "step": 0}
    ray_dr.load(state, url)
    return state


def test_a_checkpoint_sealed_with_a_kms_key_opens_again_and_holds_nothing_in_clear(key: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store?key=kms:{key}"
    ray_dr.save(WEIGHTS, url)
    state = loaded(url)
    assert np.array_equal(state["w"], WEIGHTS["w"])
    assert state["step"] == 7
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(WEIGHTS["w"].tobytes()[4000:4064] in path.read_bytes() for path in files)


def test_a_bucket_and_its_key_have_a_region_each(key: str, endpoint: str) -> None:
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="sealed-bucket")
    url = f"s3://sealed-bucket/lab?endpoint={endpoint}&region=us-east-1&key=kms:{key}"
    open_store(url).put("jobs/a/log/1", b"{}")
    assert open_store(url).get("jobs/a/log/1") == b"{}"
    assert len(open_store(url.partition("&key")[0]).get("jobs/a/log/1")) > HEADER.size


@pytest.mark.parametrize("kind", ["id", "alias", "arn"])
def test_a_key_goes_by_id_alias_or_arn(client: Any, key: str, tmp_path: Path, kind: str) -> None:
    client.create_alias(AliasName=f"alias/{tmp_path.name}", TargetKeyId=key)
    name = {"id": key.rpartition("/")[2], "alias": f"alias/{tmp_path.name}", "arn": key}[kind]
    for _ in range(2):
        store = open_store(f"file://{tmp_path}/store?key=kms:{name}")
        store.put("jobs/a", b"x")
        assert store.get("jobs/a") == b"x"


def test_another_name_of_the_same_key_is_refused_and_the_reason_said(client: Any, key: str, tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}?key=kms:{key}")
    with pytest.raises(WrongKey, match="its id, its ARN and an alias count as different"):
        open_store(f"file://{tmp_path}?key=kms:{key.rpartition('/')[2]}")


def test_a_store_moves_from_one_kms_key_to_another_and_to_a_key_of_ones_own(
    client: Any, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = client.create_key()["KeyMetadata"]["Arn"]
    monkeypatch.setenv("OWN_KEY", "ab" * 32)
    url = f"file://{tmp_path}/store?key="
    ray_dr.save(WEIGHTS, f"{url}kms:{key}")
    for old, new in ((f"kms:{key}", f"kms:{second}"), (f"kms:{second}", "env:OWN_KEY"), ("env:OWN_KEY", f"kms:{key}")):
        done = CliRunner().invoke(main, ["keys", "rotate", "--store", url + old, "--to", new])
        assert done.exit_code == 0, done.output
        assert np.array_equal(loaded(url + new)["w"], WEIGHTS["w"])
        with pytest.raises(WrongKey, match="was encrypted with another key"):
            open_store(url + old)


def test_a_key_of_another_region_is_not_found_and_the_region_is_named(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = key.rpartition("/")[2]
    open_store(f"file://{tmp_path}/named?key=kms:{name}")
    open_store(f"file://{tmp_path}/store?key=kms:{key}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    with pytest.raises(WrongKey, match=rf"{name}.* in us-west-2: check name and region"):
        open_store(f"file://{tmp_path}/new?key=kms:{name}")
    with pytest.raises(StoreError, match=name):
        open_store(f"file://{tmp_path}/named?key=kms:{name}")
    open_store(f"file://{tmp_path}/store?key=kms:{key}")  # the ARN says where it is
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(WrongKey, match="AWS_DEFAULT_REGION"):
        open_store(f"file://{tmp_path}/named?key=kms:{name}")


def test_an_alias_moved_to_another_key_opens_nothing(client: Any, key: str, tmp_path: Path) -> None:
    alias = f"alias/{tmp_path.name}"
    client.create_alias(AliasName=alias, TargetKeyId=key)
    open_store(f"file://{tmp_path}?key=kms:{alias}").put("jobs/a", b"x")
    client.update_alias(AliasName=alias, TargetKeyId=client.create_key()["KeyMetadata"]["KeyId"])
    with pytest.raises(AccessDenied, match=f"{alias}.*see that it is the key"):
        open_store(f"file://{tmp_path}?key=kms:{alias}")


def test_a_wrapped_key_of_another_store_does_not_unwrap(key: str) -> None:
    wrapper = find_key(f"kms:{key}")
    wrapped = wrapper.wrap(b"s" * 32, "one store")
    assert wrapper.unwrap(wrapped, "one store") == b"s" * 32
    with pytest.raises(WrongKey, match="of another store"):
        wrapper.unwrap(wrapped, "another store")
    with pytest.raises(WrongKey, match="was changed"):
        wrapper.unwrap(wrapped[:-1] + bytes([wrapped[-1] ^ 1]), "one store")


@pytest.fixture
def policed(endpoint: str) -> Iterator[None]:
    """moto asks what the caller may do."""

    def after(count: str) -> None:
        reset = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", count.encode(), {"Content-Type": "text/plain"})
        urllib.request.urlopen(reset, timeout=5).close()

    after("0")
    try:
        yield
    finally:
        after("inf")


@pytest.fixture
def user(endpoint: str) -> tuple[str, str]:
    """Access key and secret of somebody who may do nothing."""
    iam = boto3.client("iam", endpoint_url=endpoint)
    iam.create_user(UserName="nobody")
    made = iam.create_access_key(UserName="nobody")["AccessKey"]
    return made["AccessKeyId"], made["SecretAccessKey"]


def test_whoever_may_not_use_the_key_is_told_which_right_is_missing(
    key: str, user: tuple[str, str], policed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, *user)
    with pytest.raises(AccessDenied, match=r"allow kms:Encrypt in the role's"):
        open_store(f"file://{tmp_path}?key=kms:{key}")
    assert list(open_store(f"file://{tmp_path}").list("")) == []


def test_missing_credentials_are_named(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
        open_store(f"file://{tmp_path}?key=kms:{key}")


class Refusing(BaseHTTPRequestHandler):
    """Answers each request with the status and code that its server was given."""

    server: Answering

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.headers["X-Amz-Target"])
        body = json.dumps({"__type": self.server.code, "message": "as AWS says it"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Answering(HTTPServer):
    status, code = 400, ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Refusing)
        self.asked: list[str] = []


@pytest.fixture
def aws(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    with Answering() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(kms, "TRIES", 1)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "code", "error", "said"),
    [
        (400, "DisabledException", WrongKey, "it is disabled: enable it"),
        (400, "KMSInvalidStateException", WrongKey, "cancel its deletion"),
        (400, "NotFoundException", WrongKey, f"none of that name in {REGION}"),
        (400, "IncorrectKeyException", WrongKey, "has the alias been moved"),
        (400, "InvalidCiphertextException", WrongKey, "restore it from a copy"),
        (400, "AccessDeniedException", AccessDenied, "allow kms:Decrypt"),
        (400, "ExpiredTokenException", AccessDenied, "their expiry"),
        (403, "InvalidSignatureException", AccessDenied, "this machine's clock"),
        (400, "ThrottlingException", StoreUnavailable, "busy"),
        (500, "KMSInternalException", StoreUnavailable, "busy or failing"),
        (400, "SomethingNew", WrongKey, "400 SomethingNew: as AWS says it"),
    ],
)
def test_each_refusal_names_the_key_and_the_remedy(
    aws: Answering, status: int, code: str, error: type[StoreError], said: str
) -> None:
    aws.status, aws.code = status, code
    with pytest.raises(error, match=f"decrypt with key alias/lab.*{said}") as caught:
        find_key("kms:alias/lab").unwrap(b"wrapped", "a store")
    assert type(caught.value) is error
    assert aws.asked == ["TrentService.Decrypt"]


def test_a_kms_that_is_gone_is_unavailable(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:1")
    monkeypatch.setattr(kms, "TRIES", 1)
    with pytest.raises(StoreUnavailable, match="the store's key alias/lab, does not answer"):
        find_key("kms:alias/lab").wrap(b"s" * 32, "a store")
