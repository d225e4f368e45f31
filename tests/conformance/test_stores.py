"""What every store must do, whatever is behind it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_dr.errors import AlreadyExists, NotFound, ObjectTooShort, StoreError
from ray_dr.stores import s3
from ray_dr.stores.base import Store
from ray_dr.stores.open import probe


def test_gives_back_what_was_put(store: Store) -> None:
    for data in (b"", b"x", bytes(range(256)) * 5000):
        store.put("a/b.json", data)
        assert store.get("a/b.json") == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_takes_every_kind_of_buffer(store: Store, kind: type) -> None:
    store.put("k", kind(b"some bytes"))
    assert store.get("k") == b"some bytes"


def test_a_part_of_a_bigger_buffer_is_put_as_it_is(store: Store) -> None:
    store.put("k", memoryview(bytearray(range(200)))[50:150])
    assert store.get("k") == bytes(range(50, 150))


def test_a_put_replaces(store: Store) -> None:
    store.put("k", b"long before")
    store.put("k", b"after")
    assert store.get("k") == b"after"


def test_reads_ranges_like_slices(store: Store) -> None:
    data = bytes(range(100))
    store.put("k", data)
    for start, size in ((0, 10), (10, 5), (90, 10), (95, 50), (0, 0), (99, 1), (100, 5), (40, None), (100, None)):
        assert store.get("k", start=start, size=size) == data[start : None if size is None else start + size]


def test_reads_into_the_callers_memory(store: Store) -> None:
    data = bytes(range(256)) * 4000
    store.put("k", data)
    room = bytearray(len(data))
    store.readinto("k", memoryview(room))
    assert room == data
    piece = bytearray(b"." * 1000)
    store.readinto("k", memoryview(piece)[100:900], start=300)
    assert piece == b"." * 100 + data[300:1100] + b"." * 100


@pytest.mark.parametrize("start", [0, 5, 10, 11])
def test_says_so_when_an_object_is_too_short(store: Store, start: int) -> None:
    store.put("k", b"0123456789")
    with pytest.raises(ObjectTooShort):
        store.readinto("k", memoryview(bytearray(11)), start=start)
    assert store.get("k") == b"0123456789"


def test_says_so_when_there_is_no_object(store: Store) -> None:
    for read in (
        lambda: store.get("a/none"),
        lambda: store.get("a/none", size=0),
        lambda: store.get("a/none", start=3, size=4),
        lambda: store.readinto("a/none", memoryview(bytearray(4))),
        lambda: store.readinto("a/none", memoryview(bytearray())),
    ):
        with pytest.raises(NotFound):
            read()


def test_put_if_absent_refuses_a_taken_name_and_keeps_what_is_there(store: Store) -> None:
    store.put("log/1", b"first", if_absent=True)
    with pytest.raises(AlreadyExists):
        store.put("log/1", b"second", if_absent=True)
    assert store.get("log/1") == b"first"
    store.put("log/2", b"", if_absent=True)
    with pytest.raises(AlreadyExists):
        store.put("log/2", b"", if_absent=True)


def test_of_eight_racing_creators_one_wins(store: Store) -> None:
    for number in range(5):
        together = threading.Barrier(8)

        def create(racer: int, key: str = f"race/{number}", together: threading.Barrier = together) -> int | None:
            together.wait()
            try:
                store.put(key, f"racer {racer}".encode(), if_absent=True)
            except AlreadyExists:
                return None
            return racer

        with ThreadPoolExecutor(8) as pool:
            winners = [racer for racer in pool.map(create, range(8)) if racer is not None]
        assert len(winners) == 1
        assert store.get(f"race/{number}") == f"racer {winners[0]}".encode()


def test_lists_by_prefix_in_order_of_key_with_sizes(store: Store) -> None:
    keys = [f"jobs/a/log/{number:03d}" for number in range(20)] + ["jobs/a-b/x", "jobs/a.b/x", "jobs/ab/x", "other"]
    for key in keys:
        store.put(key, key.encode() * 2)
    log = "jobs/a/log/"
    for prefix in ("", "jobs/", "jobs/a", "jobs/a/", f"{log}01", f"{log}019", "o", "none/", f"{log}019/"):
        wanted = sorted(key for key in keys if key.startswith(prefix))
        assert [(entry.key, entry.size) for entry in store.list(prefix)] == [(key, 2 * len(key)) for key in wanted]


def test_a_deleted_object_is_gone_and_its_name_is_free(store: Store) -> None:
    store.put("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    with pytest.raises(NotFound):
        store.get("a/b")
    assert list(store.list("")) == []
    store.put("a/b", b"y", if_absent=True)
    assert store.get("a/b") == b"y"


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", ".tmp/x", "a b", "é", "x" * 513])
def test_refuses_names_that_not_every_store_could_hold(store: Store, key: str) -> None:
    with pytest.raises(StoreError):
        store.put(key, b"x")
    assert list(store.list("")) == []


def test_a_reader_sees_one_whole_value_while_another_replaces_it(store: Store) -> None:
    values = [bytes([number]) * 200_000 for number in range(6)]
    store.put("k", values[0])
    done = threading.Event()

    def replace() -> None:
        for value in values[1:]:
            store.put("k", value)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    while not done.is_set():
        assert store.get("k") in values
    writer.join()
    assert store.get("k") == values[-1]


def test_big_objects_arrive_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "MULTIPART_FROM_BYTES", 11 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    data = bytes(range(256)) * (12 * 2**12)
    for if_absent in (False, True):
        store.put(f"big-{if_absent}", data, if_absent=if_absent)
        assert store.get(f"big-{if_absent}") == data


def test_a_probe_finds_it_sound_and_leaves_nothing_behind(store: Store) -> None:
    assert probe(store).conditional_put
    assert list(store.list("")) == []
