"""The S3 store against a server that misbehaves."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from ray_dr.errors import (
    AccessDenied,
    AlreadyExists,
    NotFound,
    ObjectTooShort,
    StoreBusy,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from ray_dr.stores.checks import CHECKS, reads_back_in_parts
from ray_dr.stores.examine import try_out
from ray_dr.stores.open import open_store, probe
from ray_dr.stores.retrying import Retry, Retrying
from ray_dr.stores.s3 import Bucket, S3Store
from tests.s3_server import Answer, Request, S3Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def bare(server: S3Server, **options: object) -> S3Store:
    endpoint = f"http://127.0.0.1:{server.port}"
    return S3Store(Bucket("b", "p", endpoint, "us-east-1"), **options)  # type: ignore[arg-type]


def retried(server: S3Server) -> Retrying:
    return Retrying(bare(server), Retry(), rng=random.Random(0), sleep=lambda _: None)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("503 SlowDown", StoreBusy),
        ("503 ServiceUnavailable", StoreBusy),
        ("500 InternalError", StoreUnavailable),
        ("429 TooManyRequests", StoreBusy),
        ("409 ConditionalRequestConflict", StoreUnavailable),
        ("400 RequestTimeout", StoreUnavailable),
        ("403 AccessDenied", AccessDenied),
        ("403 RequestTimeTooSkewed", AccessDenied),
        ("400 ExpiredToken", AccessDenied),
        ("507 InsufficientStorage", StoreFull),
        ("403 QuotaExceeded", StoreFull),
        ("404 NoSuchBucket", StoreError),
        ("501 NotImplemented", StoreError),
        ("400 Odd", StoreError),
        ("412 PreconditionFailed", AlreadyExists),
    ],
)
def test_each_refusal_becomes_its_error_after_one_request(
    server: S3Server, answer: str, error: type[StoreError]
) -> None:
    store = bare(server)
    server.plan(answer, method="PUT")
    with pytest.raises(error) as caught:
        store.put("k", b"x")
    assert type(caught.value) is error
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["503 SlowDown", "drop", "apply_then_drop"])
def test_a_retried_conditional_put_knows_its_own_work(server: S3Server, fault: str) -> None:
    store = retried(server)
    server.plan(fault, method="PUT", times=2)
    store.put("k", b"mine", if_absent=True)
    assert store.get("k") == b"mine"
    with pytest.raises(AlreadyExists):
        store.put("k", b"other", if_absent=True)


def test_an_answer_that_breaks_off_is_read_again(server: S3Server) -> None:
    data = random.Random(1).randbytes(3_000_000)
    retried(server).put("k", data)
    server.plan("cut", method="GET", amount=1_234_567, times=2)
    with pytest.raises(StoreUnavailable):
        bare(server).get("k")
    room = bytearray(len(data))
    retried(server).readinto("k", memoryview(room))
    assert room == data


def test_a_server_that_hangs_is_given_up_in_bounded_time(server: S3Server) -> None:
    store = bare(server, io_timeout_s=0.3)
    server.plan("delay", method="GET", amount=5.0)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.get("k")
    assert time.monotonic() - began < 3.0


def test_a_server_that_is_gone_is_unavailable(server: S3Server) -> None:
    store = S3Store(Bucket("b", "", "http://127.0.0.1:1", "us-east-1"))
    with pytest.raises(StoreUnavailable):
        store.put("k", b"x")


def test_wrong_credentials_are_refused_with_a_remedy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDenied, match="check key"):
        probe(open_store(server.url("b")))
    assert server.objects == {}


def test_missing_credentials_are_named(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in server.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
        bare(server).get("k")


def test_a_signed_payload_is_accepted_too(server: S3Server) -> None:
    store = open_store(server.url("b") + "&payload=signed")
    store.put("k", b"x" * 3_000_000)
    assert store.get("k", start=2_999_990) == b"x" * 10


def test_a_failed_part_aborts_the_whole_upload(server: S3Server) -> None:
    endpoint = f"http://127.0.0.1:{server.port}"
    store = S3Store(Bucket("b", "p", endpoint, "us-east-1", part_bytes=3, parts_from_bytes=8))
    server.plan("503 SlowDown", method="PUT")
    with pytest.raises(StoreUnavailable):
        store.put("k", b"0123456789")
    assert (server.objects, server.uploads) == ({}, {})
    Retrying(store, Retry(), rng=random.Random(0), sleep=lambda _: None).put("k", b"0123456789")
    assert [method for method, _ in server.requests].count("POST") == 3, "two uploads begun, one completed"
    assert store.get("k") == b"0123456789"


def test_many_keys_come_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(page=3) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = bare(server)
        for number in range(10):
            store.put(f"k/{number}", b"")
        server.requests.clear()
        assert [entry.key for entry in store.list("k/")] == [f"k/{number}" for number in range(10)]
        assert len(server.requests) == 4


def test_the_probe_finds_out_a_server_that_ignores_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(conditional=False) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = open_store(server.url(f"b-{uuid.uuid4().hex}"))
        assert store.traits.conditional_put, "what it claims"
        assert not probe(store).conditional_put
        assert server.objects == {}


def test_the_probe_finds_out_a_server_that_refuses_conditions(server: S3Server) -> None:
    server.plan("501 NotImplemented", method="PUT", times=1000, contains="refuses_a_second")
    server.plan("501 NotImplemented", method="PUT", times=1000, contains="one_wins_a_race")
    assert not probe(open_store(server.url("b"))).conditional_put


class Swapping(S3Server):
    """Puts the parts of an upload together in the wrong order."""

    def _apply(self, request: Request) -> Answer:
        if request.method == "POST" and "uploadId" in request.query:
            parts = self.uploads[request.query["uploadId"]]
            parts[1], parts[2] = parts[2], parts[1]
        return super()._apply(request)


def test_parts_that_a_server_mixes_up_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = [check for check in CHECKS if check.run is reads_back_in_parts]
    with Swapping() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        found = try_out(check, open_store(server.url("b"), part_bytes=1000), "at")
        assert (found.holds, found.said) == (False, "2000 bytes came back different")


def test_the_url_holds_no_secret(server: S3Server) -> None:
    assert bare(server).url == "s3://b/p"


def test_a_connection_is_used_again(server: S3Server) -> None:
    store = bare(server)
    store.put("k", b"x" * 100_000)
    room = bytearray(100_000)
    pool = store._client._endpoint.http_session._manager
    for _ in range(5):
        store.readinto("k", memoryview(room))
    made = [connections.num_connections for connections in pool.pools._container.values()]
    assert made == [1]


def test_what_the_client_knows_of_s3_is_held_once_for_all_stores(server: S3Server) -> None:
    first, second = bare(server), bare(server)
    assert first._client is not second._client
    assert first._client._loader is second._client._loader


@pytest.fixture
def warm(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store that has got "k" (1000 bytes) once, and may not ask through boto3's own get again."""
    store = S3Store(Bucket("b", "p é+(~&x)", f"http://127.0.0.1:{server.port}", "us-east-1"))
    store.put("k", bytes(range(250)) * 4)
    store.get("k")
    monkeypatch.setattr(store._client, "get_object", lambda **asked: pytest.fail(f"boto3 was asked for {asked}"))
    server.requests.clear()
    return store


def test_later_gets_spare_what_boto3_does_for_each(warm: S3Store) -> None:
    data = bytes(range(250)) * 4
    for name in ("k", "x/y-z_1=.a"):
        warm.put(name, data)
        room = bytearray(100)
        warm.readinto(name, memoryview(room), start=300)
        assert (warm.get(name), warm.get(name, start=990, size=50), bytes(room)) == (data, data[990:], data[300:400])
    assert warm.get("k", start=5000) == b""
    with pytest.raises(ObjectTooShort):
        warm.readinto("k", memoryview(bytearray(20)), start=990)
    with pytest.raises(NotFound):
        warm.get("other")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("503 SlowDown", StoreBusy),
        ("500 InternalError", StoreUnavailable),
        ("403 AccessDenied", AccessDenied),
        ("404 NoSuchBucket", StoreError),
        ("501 NotImplemented", StoreError),
        ("cut", StoreUnavailable),
        ("drop", StoreUnavailable),
    ],
)
def test_refusals_of_later_gets_are_what_boto3_would_tell(
    warm: S3Store, server: S3Server, answer: str, error: type[StoreError]
) -> None:
    server.plan(answer, method="GET", amount=500)
    with pytest.raises(error) as caught:
        warm.get("k")
    assert type(caught.value) is error
    assert len(server.requests) == 1
    assert len(warm.get("k")) == 1000


@pytest.mark.parametrize("answer", ["307 TemporaryRedirect", "301 PermanentRedirect", "400 AuthorizationHeaderMalformed"])
def test_a_get_that_is_sent_elsewhere_is_asked_for_by_boto3(server: S3Server, answer: str) -> None:
    store = bare(server)
    store.put("k", b"x" * 1000)
    store.get("k")
    server.plan(answer, method="GET")
    assert store.get("k") == b"x" * 1000


def test_an_unusual_get_teaches_nothing(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bare(server)
    store.put("k", b"x")

    def sign_more(request: Any, **_: object) -> None:
        request.headers["x-amz-request-payer"] = "requester"

    store._client.meta.events.register("before-sign.s3.GetObject", sign_more)
    asked: list[str] = []
    get = store._client.get_object
    monkeypatch.setattr(store._client, "get_object", lambda **given: (asked.append(given["Key"]), get(**given))[1])
    assert [store.get("k"), store.get("k")] == [b"x", b"x"]
    assert asked == ["p/k", "p/k"]
