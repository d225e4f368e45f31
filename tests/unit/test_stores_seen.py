"""A store that is counted: what came of its requests, and from an agent's report to a finding."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ray_dr.actors.node_agent import Agent
from ray_dr.errors import AlreadyExists, NotFound, StoreFull, StoreUnavailable
from ray_dr.model import codec
from ray_dr.model.signal import StoreSeen
from ray_dr.stores.checks import CHECKS, Check
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.seen import Seen
from ray_dr.stores.wire import connect
from tests.unit.test_sensing import NODES, Stage

TOKEN = b"secret"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.run.__name__)
def test_it_keeps_every_promise_of_the_store_inside(check: Check) -> None:
    assert check.run(Seen(MemoryStore(), "store"), "conformance/of-a-store")


def test_what_came_of_requests_is_told_once_and_an_answer_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = MemoryStore()
    store = Seen(inner, "store")
    assert store.take() is None
    store.put("a", b"x", if_absent=True)
    with pytest.raises(AlreadyExists):
        store.put("a", b"x", if_absent=True)
    with pytest.raises(NotFound):
        store.get("b")
    assert [entry.key for entry in store.list("")] == ["a"]
    assert store.take() == StoreSeen("store", done=4)
    assert store.take() is None

    def fail(error: Exception) -> Any:
        raise error

    monkeypatch.setattr(inner, "get", lambda key, **_: fail(StoreUnavailable("away")))
    monkeypatch.setattr(inner, "put", lambda key, data, **_: fail(StoreFull("no space left")))
    with pytest.raises(StoreUnavailable):
        store.get("a")
    assert store.take() == StoreSeen("store", failed=1)
    with pytest.raises(StoreFull):
        store.put("c", b"y")
    assert store.take() == StoreSeen("store", failed=1, refused="StoreFull: no space left")


def test_a_request_that_does_not_end_grows_old() -> None:
    inner, now = MemoryStore(), [100.0]
    store, begun, go = Seen(inner, "disk", clock=lambda: now[0]), threading.Event(), threading.Event()
    inner.delete = lambda key: (begun.set(), go.wait(60))  # type: ignore[method-assign, assignment, return-value]
    asking = threading.Thread(target=lambda: store.delete("a"))
    asking.start()
    assert begun.wait(60)
    now[0] += 31.0
    assert store.take() == StoreSeen("disk", oldest_s=31.0)
    go.set()
    asking.join()
    assert store.take() == StoreSeen("disk", done=1)


def test_a_refusal_is_told_by_the_agent_and_becomes_a_finding_until_it_works_again(tmp_path: Path) -> None:
    agent = Agent("node-a", "127.0.0.1", f"file://{tmp_path}/store", TOKEN)
    watcher = connect(agent.address, TOKEN)
    watcher.timeout(60.0)
    watcher.send({"op": "watch"})

    def told() -> list[StoreSeen]:
        while True:
            for message in watcher.receive()[0]["messages"]:
                if message.get("stores"):
                    return list(codec.from_json(tuple[StoreSeen, ...], message["stores"]))

    (store,) = agent.witness.stores
    store.put("a", b"x")
    assert told() == [StoreSeen("store", done=1)]
    watcher.close()
    agent.close()

    stage = Stage(hang_s=300.0)
    for seen in (StoreSeen("store", 9), StoreSeen("store", 0, 1, "StoreFull: no space left"), StoreSeen("store", 1)):
        stage.now += 1.0
        stage.senses.receive(stage.now)
        stage.senses.beat(NODES[0], {"beat": stage.now, "beacons": (), "stores": codec.to_json((seen,))})
    assert [(note["kind"], note["stage"]) for note in stage.notes] == [("storage", "confirmed"), ("storage", "withdrawn")]
    assert "no space left" in stage.notes[0]["evidence"]
