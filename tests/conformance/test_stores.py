"""What every store must do, whatever is behind it: the checks that `ray-dr store check` makes, and its interface."""

from __future__ import annotations

import pytest

from ray_dr.errors import StoreError
from ray_dr.stores.base import Store
from ray_dr.stores.checks import CHECKS, Check
from ray_dr.stores.open import open_store, probe, proven
from tests.servers.ceph import RadosGateway


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.run.__name__)
def test_keeps_the_promise_that_it(store: Store, check: Check) -> None:
    assert check.run(store, "conformance/of-a-store")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_takes_every_kind_of_buffer(store: Store, kind: type) -> None:
    store.put("k", kind(b"some bytes"))
    assert store.get("k") == b"some bytes"


def test_a_part_of_a_bigger_buffer_is_put_as_it_is(store: Store) -> None:
    store.put("k", memoryview(bytearray(range(200)))[50:150])
    assert store.get("k") == bytes(range(50, 150))


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", ".tmp/x", "a b", "é", "x" * 513])
def test_refuses_names_that_not_every_store_could_hold(store: Store, key: str) -> None:
    with pytest.raises(StoreError):
        store.put(key, b"x")
    assert list(store.list("")) == []


def test_a_probe_finds_it_sound_and_leaves_nothing_behind(store: Store) -> None:
    assert probe(store).conditional_put
    assert proven(store) is store
    assert list(store.list("")) == []


@pytest.mark.slow
def test_a_versioned_bucket_in_which_racing_writers_all_win_is_found_out(
    gateway: RadosGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in gateway.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(gateway.url(gateway.make_bucket(versioned=True)))
    assert not probe(store).conditional_put
    assert not proven(store).traits.conditional_put
