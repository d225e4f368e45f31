"""Which faults retrying hides from every check, and how the others come out: by name, never as silence."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner

from ray_dr.cli import store as cli_store
from ray_dr.cli.main import main
from ray_dr.errors import AccessDenied, StoreFull, StoreUnavailable
from ray_dr.stores.base import Store
from ray_dr.stores.checks import CHECKS, Check
from ray_dr.stores.examine import Examined, examine, try_out
from ray_dr.stores.faulty import Fault, FaultyStore, Kind, Operation
from ray_dr.stores.memory import MemoryStore, forget
from ray_dr.stores.retrying import Retry, Retrying

OPERATIONS: tuple[Operation, ...] = ("put", "get", "readinto", "list", "delete")
SMALL = 1000


class Rhythm(FaultyStore):
    """In each thread, of every `period` calls of an operation in `kinds` all but the last have its fault."""

    def __init__(self, inner: Store, kinds: Mapping[Operation, Kind], *, amount: float = 0.0, period: int = 2) -> None:
        super().__init__(inner, sleep=lambda _: None)
        self._kinds, self._amount, self._period = kinds, amount, period
        self._mine = threading.local()

    def _take(self, operation: Operation, key: str) -> Fault | None:
        if operation not in self._kinds:
            return None
        turn: int = getattr(self._mine, operation, 0)
        setattr(self._mine, operation, turn + 1)
        if turn % self._period == self._period - 1:
            return None
        return Fault(operation, self._kinds[operation], "", 1, amount=self._amount)


def retried(inner: Store) -> Retrying:
    return Retrying(inner, Retry(attempts=4), rng=random.Random(1), sleep=lambda _: None)


MASKED = {
    "fails once": Rhythm(MemoryStore(), dict.fromkeys(OPERATIONS, "fail")),
    "fails three times": Rhythm(MemoryStore(), dict.fromkeys(OPERATIONS, "fail"), period=4),
    "is applied, then fails": Rhythm(MemoryStore(), dict.fromkeys(OPERATIONS, "apply_then_fail")),
    "is slow": Rhythm(MemoryStore(), dict.fromkeys(OPERATIONS, "slow"), amount=1.0),
    "listings break off": Rhythm(MemoryStore(), {"list": "truncate"}, amount=1),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.run.__name__)
@pytest.mark.parametrize("fault", MASKED)
def test_retrying_hides_from_every_check_that_a_call(fault: str, check: Check) -> None:
    outcome = try_out(check, retried(MASKED[fault]), f"{fault.replace(' ', '_').replace(',', '')}/{check.run.__name__}")
    assert outcome.holds, outcome.said


def examined(faulty: FaultyStore) -> Examined:
    found = examine(retried(faulty), SMALL)
    assert list(faulty._inner.list("")) == [], "what was put is removed"
    return found


def broken(found: Examined) -> set[str]:
    return {outcome.check.run.__name__ for outcome in found.outcomes if not outcome.holds}


def test_a_store_without_faults_is_sound_and_left_empty() -> None:
    found = examined(FaultyStore(MemoryStore()))
    assert (found.sound, found.weaker, broken(found)) == (True, (), set())
    assert [each.operation for each in found.latencies] == ["put", "get"]
    assert [(each.operation, each.threads) for each in found.throughputs] == [
        ("put", 1), ("get", 1), ("put", 4), ("get", 4),
    ]  # fmt: skip
    assert all(each.size == SMALL and each.took_s > 0 for each in found.throughputs)


@pytest.mark.parametrize("operation", ["put", "get", "readinto"])
@pytest.mark.parametrize("kind", ["truncate", "flip"])
def test_other_bytes_are_found_whichever_way_they_went(operation: Operation, kind: Kind) -> None:
    inner = MemoryStore()
    name = "reads_into_memory" if operation == "readinto" else "reads_back"
    check = next(check for check in CHECKS if check.run.__name__ == name)
    faulty = FaultyStore(inner)
    getattr(faulty, kind)(operation, 100, times=1, prefix="at/object" if operation == "readinto" else "at/1000")
    outcome = try_out(check, retried(faulty), "at")
    assert not outcome.holds
    assert "different" in outcome.said or "asked for" in outcome.said


def test_a_stale_listing_is_found_and_called_what_it_is() -> None:
    faulty = FaultyStore(MemoryStore())
    check = next(check for check in CHECKS if check.run.__name__ == "lists_at_once")
    faulty.stale_list()
    assert try_out(check, faulty, "at").said == "a listing lacks an object that was put before it"
    faulty.put("at/0", b"x")
    faulty.stale_list()
    faulty.delete("at/0")
    assert [entry.key for entry in faulty.list("at/")] == ["at/0"]
    assert list(faulty.list("at/")) == []


def test_late_listings_alone_leave_a_store_sound_and_are_said() -> None:
    late = Late(MemoryStore())
    found = examine(late, SMALL)
    assert broken(found) == {"lists_in_order", "lists_at_once"}
    assert found.sound
    assert "late" in found.weaker[0]
    assert late.there() == [], "what was put is removed though it is not listed"


class Late(FaultyStore):
    """Its listings, but for the first, lack what was put."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._listed = 0

    def _take(self, operation: Operation, key: str) -> Fault | None:
        self._listed += operation == "list"
        return Fault("list", "stale", "", 1) if operation == "list" and self._listed > 1 else None

    def there(self) -> list[object]:
        return list(self._inner.list(""))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_that_keeps_failing_ends_it_with_the_stores_own_words(operation: Operation) -> None:
    for error in (StoreUnavailable, AccessDenied, StoreFull):
        faulty = FaultyStore(MemoryStore())
        faulty.fail(operation, times=10_000, error=error)
        with pytest.raises(error, match="failed"):
            examine(retried(faulty), SMALL)


def test_a_hanging_call_is_no_answer_and_its_release_is() -> None:
    faulty = FaultyStore(MemoryStore())
    hung = faulty.hang("put")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(retried(faulty).put, "k", b"x")
        while not faulty.calls:
            pass
        assert not waiting.done()
        assert list(faulty.list("")) == []
        hung.set()
        waiting.result()
    assert faulty.get("k") == b"x"


class Interrupted(MemoryStore):
    """Ctrl-C comes in the midst of the nth call of get."""

    def __init__(self, at: int) -> None:
        super().__init__("interrupted")
        self._left = at

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return super().get(key, start=start, size=size)


@pytest.mark.parametrize("at", [1, 12, 60])
def test_ctrl_c_leaves_nothing_behind(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Interrupted(at)
    monkeypatch.setattr(cli_store, "open_store", lambda *_, **__: store)
    try:
        result = CliRunner().invoke(main, ["store", "check", "memory://x", "--bytes", "100"])
        assert result.exit_code == 130
        assert list(store.list("")) == []
    finally:
        forget("interrupted")


def test_what_cannot_be_removed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = FaultyStore(MemoryStore())
    faulty.fail("delete", times=10_000, error=AccessDenied)
    monkeypatch.setattr(cli_store, "open_store", lambda *_, **__: faulty)
    result = CliRunner().invoke(main, ["store", "check", "memory://x"])
    assert result.exit_code == 1
    (left,) = faulty.list("")
    assert f"does not let this be removed: {left.key}" in result.stderr


def test_the_command_says_what_holds_and_the_verdict() -> None:
    result = CliRunner().invoke(main, ["store", "check", "memory://checked", "--bytes", "1000"])
    assert result.exit_code == 0, result.output
    assert "put-if-absent has one winner" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("sound: ")


def test_the_command_says_the_weaker_guarantee_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ignoring(MemoryStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            super().put(key, data)

    monkeypatch.setattr(cli_store, "open_store", lambda *_, **__: Ignoring())
    result = CliRunner().invoke(main, ["store", "check", "memory://x", "--bytes", "1000"])
    assert result.exit_code == 1
    assert "NOT SOUND" in result.stdout
    assert "only safe while a single supervisor runs the job" in result.stdout
    told = json.loads(CliRunner().invoke(main, ["store", "check", "x", "--bytes", "1000", "--json"]).stdout)
    assert not told["sound"]
    failed = {row["name"] for row in told["checks"] if not row["holds"]}
    assert failed == {"put-if-absent refuses the second", "put-if-absent has one winner"}
    assert told["bytes"] == 1000
    assert {row["operation"] for row in told["throughput"]} == {"put", "get"}


@pytest.mark.parametrize(("url", "told"), [("gs://b", "unknown kind of store"), ("s3://", "needs a bucket")])
def test_a_url_that_names_no_store_is_bad_input(url: str, told: str) -> None:
    result = CliRunner().invoke(main, ["store", "check", url])
    assert result.exit_code == 2
    assert told in result.stderr
