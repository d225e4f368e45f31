"""Stores in a bad state, as a save and a load meet them: what is said, what is left, and that what was saved stays."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_dr
from ray_dr.errors import AccessDenied, StoreBusy, StoreError, StoreFull, StoreUnavailable
from ray_dr.stores.disk import LEFTOVER_AGE_S, FileStore
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.retrying import Retry, Retrying
from ray_dr.stores.s3 import Bucket, S3Store
from ray_dr.train import standalone
from tests.s3_server import S3Server

HOUR_S = 3600.0


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Each test is a process that has saved nothing yet."""
    standalone._jobs.clear()
    yield
    standalone._settle()
    standalone._give_back_slot()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def weights(seed: int, size: int = 250_000) -> dict[str, Any]:
    return {"w": np.random.default_rng(seed).standard_normal(size)}


def loaded(url: str, size: int = 250_000) -> np.ndarray[Any, Any]:
    state = {"w": np.zeros(size)}
    ray_dr.load(state, url)
    return state["w"]


def test_a_full_disk_loses_the_save_and_nothing_else(small_disk: Path) -> None:
    url = f"file://{small_disk}/store"
    ray_dr.save(weights(1), url)
    with pytest.raises(StoreFull, match=r"no space left .*; free space or lower `keep`: jobs/main/"):
        ray_dr.save(weights(2), url)
    assert np.array_equal(loaded(url), weights(1)["w"])
    assert list((small_disk / "store/.tmp").iterdir()) == []


def test_a_directory_that_may_only_be_read_is_loaded_from_and_not_saved_to(small_disk: Path) -> None:
    url = f"file://{small_disk}/store"
    ray_dr.save(weights(1, 100), url)
    (small_disk / "store/.tmp/left").write_bytes(b"half")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    standalone._jobs.clear()
    assert np.array_equal(loaded(url, 100), weights(1, 100)["w"])
    with pytest.raises(AccessDenied, match=r"Read-only file system\); check owner and mount options: "):
        ray_dr.save(weights(2, 100), url)


@pytest.mark.parametrize("answer", ["507 InsufficientStorage", "403 QuotaExceeded", "507 XMinioStorageFull"])
def test_a_full_bucket_loses_the_save_and_nothing_else(server: S3Server, answer: str) -> None:
    url = server.url("b")
    ray_dr.save(weights(1), url)
    server.plan(answer, method="PUT", times=100, contains="/chunks/")
    with pytest.raises(StoreFull, match=rf"free space, raise the quota or lower `keep` \({answer[:3]} .*/chunks/"):
        ray_dr.save(weights(2), url)
    assert np.array_equal(loaded(url), weights(1)["w"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("403 AccessDenied", "do not allow this; check key and policy"),
        ("400 ExpiredToken", "have expired: renew them"),
        ("400 TokenRefreshRequired", "have expired: renew them"),
        ("403 RequestTimeTooSkewed", "clock is wrong: set it"),
    ],
)
def test_what_may_not_be_done_says_why_at_once(server: S3Server, answer: str, said: str) -> None:
    store = Retrying(bare(server), sleep=pytest.fail)
    store.put("k", b"x")
    acts: tuple[tuple[str, Callable[[], object]], ...] = (
        ("PUT", lambda: store.put("k", b"y")),
        ("GET", lambda: store.get("k")),
        ("GET", lambda: store.readinto("k", memoryview(bytearray(1)))),
        ("GET", lambda: list(store.list(""))),
        ("DELETE", lambda: store.delete("k")),
    )
    for method, act in acts:
        server.requests.clear()
        server.plan(answer, method=method)
        with pytest.raises(AccessDenied, match=said):
            act()
        assert len(server.requests) == 1, "it cannot succeed and is not tried again"
    assert store.get("k") == b"x"


def bare(server: S3Server) -> S3Store:
    return S3Store(Bucket("b", "p", f"http://127.0.0.1:{server.port}", "us-east-1"))


class Time:
    """A clock that only sleeping moves. `until`: what happens when."""

    def __init__(self, until: float, then: Callable[[], None]) -> None:
        self.now, self._until, self._then = 0.0, until, then

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self._until:
            self._then()


@pytest.mark.parametrize(
    ("method", "act"),
    [
        ("PUT", lambda store: store.put("k", b"x")),
        ("GET", lambda store: store.get("k")),
        ("GET", lambda store: list(store.list(""))),
    ],
    ids=["put", "get", "list"],
)
def test_a_store_that_throttles_for_a_minute_is_waited_for(
    server: S3Server, method: str, act: Callable[[Retrying], object]
) -> None:
    bare(server).put("k", b"x")
    server.requests.clear()
    server.plan("503 SlowDown", method=method, times=10_000)
    time_ = Time(60.0, server.forgive)
    act(Retrying(bare(server), rng=random.Random(1), sleep=time_.sleep, clock=lambda: time_.now))
    assert 60.0 <= time_.now < 60.0 + Retry().most_s
    assert 10 < len(server.requests) < 60, "asked now and then, not hammered"


def test_one_that_throttles_on_is_given_up_in_minutes_and_one_that_is_gone_in_seconds() -> None:
    for error, least_s, most_s in ((StoreBusy, 170.0, 180.0), (StoreUnavailable, 0.0, 4.0)):
        faulty, time_ = FaultyStore(MemoryStore()), Time(float("inf"), lambda: None)
        faulty.fail("put", times=10_000, error=error)
        store = Retrying(faulty, rng=random.Random(1), sleep=time_.sleep, clock=lambda t=time_: t.now)
        with pytest.raises(error):
            store.put("k", b"x")
        assert least_s < time_.now <= most_s


def test_failures_after_a_long_throttling_are_still_tried_again() -> None:
    faulty, time_ = FaultyStore(MemoryStore()), Time(float("inf"), lambda: None)
    faulty.fail("put", times=20, error=StoreBusy)
    faulty.fail("put", times=5)
    Retrying(faulty, Retry(busy_s=1e9), rng=random.Random(1), sleep=time_.sleep, clock=lambda: time_.now).put("k", b"x")
    assert faulty.get("k") == b"x"


@pytest.mark.parametrize("ahead_s", [HOUR_S, -HOUR_S])
def test_a_clock_an_hour_off_that_of_the_bucket_is_named(server: S3Server, ahead_s: float) -> None:
    ray_dr.save(weights(1), server.url("b"))
    server.ahead_s = ahead_s
    for act in (lambda: ray_dr.save(weights(2), server.url("b")), lambda: loaded(server.url("b"))):
        with pytest.raises(AccessDenied, match=r"this machine's clock is wrong: set it \(403 RequestTimeTooSkewed"):
            act()
    server.ahead_s = 0.0
    assert np.array_equal(loaded(server.url("b")), weights(1)["w"])


def test_what_was_saved_last_is_the_newest_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, now = f"file://{tmp_path}", time.time
    for seed, off_s in enumerate((0.0, HOUR_S, -HOUR_S, 400 * HOUR_S, -400 * HOUR_S)):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda off_s=off_s: now() + off_s)
            standalone._jobs.clear()
            ray_dr.save(weights(seed, 100), url)
            assert np.array_equal(loaded(url, 100), weights(seed, 100)["w"])
    assert np.array_equal(loaded(url, 100), weights(4, 100)["w"])


@pytest.mark.parametrize("off_s", [2 * HOUR_S, -2 * HOUR_S])
def test_a_clock_that_is_off_sweeps_away_no_running_put_and_keeps_no_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    FileStore(tmp_path)
    young, old = tmp_path / ".tmp/young", tmp_path / ".tmp/old"
    for path in (young, old):
        path.write_bytes(b"half")
    past = young.stat().st_mtime - LEFTOVER_AGE_S - 60
    os.utime(old, (past, past))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + off_s)
    FileStore(tmp_path)
    assert list((tmp_path / ".tmp").iterdir()) == [young]


@pytest.mark.parametrize("key", ["", "?key=env:STORE_KEY"])
def test_a_repository_of_a_newer_format_is_refused_by_name_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("STORE_KEY", "ab" * 32)
    url = f"file://{tmp_path}{key}"
    ray_dr.save(weights(1, 100), url)
    newest = max((tmp_path / "jobs/main/log").glob("*.json"))
    if key:
        newest.write_bytes(b"RDs2" + newest.read_bytes()[4:])
    else:
        with monkeypatch.context() as patch:
            patch.setattr("ray_dr.repository.commit.FORMAT", 2)
            standalone._jobs.clear()
            ray_dr.save(weights(2, 100), f"file://{tmp_path}/newer")
        newest.write_bytes(max((tmp_path / "newer/jobs/main/log").glob("*.json")).read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    standalone._jobs.clear()
    for act in (lambda: ray_dr.save(weights(3, 100), url), lambda: loaded(url, 100)):
        with pytest.raises(StoreError, match=rf"newer format .*use a newer ray_dr.*: jobs/main/log/{newest.name}"):
            act()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
