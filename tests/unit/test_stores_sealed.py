"""Encrypted stores: what a key holder gets back, what others get to see, and every way to meddle with an object."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_dr.cli.main import main
from ray_dr.errors import NotFound, StoreError
from ray_dr.stores import memory, sealed
from ray_dr.stores.keys import LocalKey, WrongKey, find_key, open_keys, rotate
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.open import open_store, probe, refuse_locked
from ray_dr.stores.sealed import HEADER, SEGMENT_BYTES, TAG_BYTES, BrokenSeal, SealedStore

KEY, OTHER = LocalKey(b"k" * 32), LocalKey(b"o" * 32)
SMALL = 64
"""Segments of so many bytes make every case of a large object a small one."""


@pytest.fixture
def inner() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def store(inner: MemoryStore) -> SealedStore:
    return SealedStore(inner, open_keys(inner, KEY))


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "SEGMENT_BYTES", SMALL)
    monkeypatch.setattr(sealed, "_SEALED_SEGMENT", SMALL + TAG_BYTES)


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, 3 * SMALL + 5])
def test_every_range_reads_as_it_would_in_clear(store: SealedStore, size: int) -> None:
    data = os.urandom(size)
    store.put("a/b", data)
    assert store.get("a/b") == data
    assert [(entry.key, entry.size) for entry in store.list("")] == [("a/b", size)]
    edges = sorted({0, 1, SMALL - 1, SMALL, SMALL + 1, size - 1, size} & set(range(size + 1)))
    for start, end in itertools.combinations_with_replacement(edges, 2):
        assert store.get("a/b", start=start, size=end - start) == data[start:end]
        room = bytearray(end - start)
        store.readinto("a/b", memoryview(room), start=start)
        assert room == data[start:end]


def test_a_real_segment_is_crossed(store: SealedStore) -> None:
    data = os.urandom(2 * SEGMENT_BYTES + 100)
    store.put("big", data)
    assert store.get("big") == data
    assert store.get("big", start=SEGMENT_BYTES - 5, size=10) == data[SEGMENT_BYTES - 5 : SEGMENT_BYTES + 5]


def test_nothing_of_the_bytes_can_be_seen_and_no_two_seals_are_alike(inner: MemoryStore, store: SealedStore) -> None:
    secret = b"the same sixteen bytes, again and again. " * 10
    store.put("one", secret)
    store.put("two", secret)
    seen = inner.get("one"), inner.get("two")
    assert not any(secret[:16] in each for each in seen)
    assert seen[0][HEADER.size :] != seen[1][HEADER.size :]


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("size", [0, 1, SMALL, 2 * SMALL + 3])
def test_no_changed_byte_and_no_cut_is_ever_read(inner: MemoryStore, store: SealedStore, size: int) -> None:
    store.put("a", os.urandom(size))
    whole = inner.get("a")
    damaged = [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in (1, 0x80)]
    damaged += [whole[:length] for length in range(len(whole))] + [whole + b"x", whole + whole]
    for bad in damaged:
        inner.put("a", bad)
        with pytest.raises(BrokenSeal):
            store.get("a")
        if size:
            with pytest.raises(StoreError):
                read_in_ranges(store, size)


def read_in_ranges(store: SealedStore, size: int) -> None:
    """All of "a", segment by segment, and to its end: a range shows the damage of its own segments only."""
    for start in range(0, size, SMALL):
        store.readinto("a", memoryview(bytearray(min(SMALL, size - start))), start=start)
    store.get("a", start=size - 1, size=SMALL)


@pytest.mark.usefixtures("small_segments")
def test_segments_cannot_be_exchanged_nor_dropped(inner: MemoryStore, store: SealedStore) -> None:
    store.put("a", os.urandom(4 * SMALL))
    whole, step = inner.get("a"), SMALL + TAG_BYTES
    pieces = [whole[HEADER.size + i * step : HEADER.size + (i + 1) * step] for i in range(4)]
    for chosen in itertools.chain.from_iterable(itertools.permutations(range(4), n) for n in range(5)):
        if chosen != (0, 1, 2, 3):
            inner.put("a", whole[: HEADER.size] + b"".join(pieces[i] for i in chosen))
            with pytest.raises(BrokenSeal):
                store.get("a")


def test_an_object_does_not_open_under_another_name_nor_in_another_store(inner: MemoryStore, store: SealedStore) -> None:
    store.put("jobs/a/chunks/1", b"bytes")
    other = MemoryStore()
    abroad = SealedStore(other, open_keys(other, KEY))
    for target, reader in ((inner, store), (other, abroad)):
        target.put("jobs/a/parts/1", inner.get("jobs/a/chunks/1"))
        with pytest.raises(BrokenSeal):
            reader.get("jobs/a/parts/1")


def test_an_object_in_clear_is_refused(inner: MemoryStore, store: SealedStore) -> None:
    inner.put("a", b"not sealed at all, but long enough for a header")
    with pytest.raises(BrokenSeal, match="not encrypted"):
        store.get("a")
    with pytest.raises(NotFound):
        store.get("b")


def test_another_key_opens_nothing_and_says_which_one_would(inner: MemoryStore, store: SealedStore) -> None:
    store.put("a", b"bytes")
    with pytest.raises(WrongKey, match=KEY.fingerprint):
        open_keys(inner, OTHER)


def test_a_damaged_wrapped_key_is_refused(inner: MemoryStore, store: SealedStore) -> None:
    (entry,) = inner.list("keys/")
    whole = inner.get(entry.key)
    for at in range(len(whole)):
        inner.put(entry.key, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(WrongKey):
            open_keys(inner, KEY)


def test_a_store_with_jobs_in_clear_is_not_taken_over() -> None:
    inner = MemoryStore()
    inner.put("jobs/a/log/1", b"{}")
    with pytest.raises(WrongKey, match="not encrypted"):
        open_keys(inner, KEY)
    assert list(inner.list("keys/")) == []


def test_after_a_rotation_only_the_new_key_opens_and_no_object_was_touched(inner: MemoryStore, store: SealedStore) -> None:
    store.put("a", b"bytes")
    before = inner.get("a")
    assert rotate(inner, KEY, OTHER) == 1
    assert inner.get("a") == before
    assert SealedStore(inner, open_keys(inner, OTHER)).get("a") == b"bytes"
    with pytest.raises(WrongKey, match=OTHER.fingerprint):
        open_keys(inner, KEY)
    with pytest.raises(WrongKey, match="neither"):
        rotate(inner, KEY, LocalKey(b"x" * 32))


def test_a_rotation_cut_off_anywhere_leaves_a_store_that_opens_and_is_completed_by_the_next(store: SealedStore) -> None:
    class Cut(Exception):
        pass

    class Stopping(MemoryStore):
        left = 0

        def put(self, *args: object, **kwargs: object) -> None:
            self._count()
            super().put(*args, **kwargs)  # type: ignore[arg-type]

        def delete(self, key: str) -> None:
            self._count()
            super().delete(key)

        def _count(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise Cut

    for steps in range(3):
        inner = Stopping()
        inner.left = 10
        SealedStore(inner, open_keys(inner, KEY)).put("a", b"bytes")
        inner.left = steps
        try:
            rotate(inner, KEY, OTHER)
        except Cut:
            assert any(_opens(inner, key) for key in (KEY, OTHER))
            inner.left = 10
            rotate(inner, KEY, OTHER)
        assert _opens(inner, OTHER)
        assert not _opens(inner, KEY)


def _opens(inner: MemoryStore, key: LocalKey) -> bool:
    try:
        return SealedStore(inner, open_keys(inner, key)).get("a") == b"bytes"
    except WrongKey:
        return False


@pytest.mark.parametrize(
    ("source", "said"),
    [("env:NO_SUCH_KEY", "NO_SUCH_KEY"), ("file:/no/such/key", "/no/such/key"), ("env:SHORT", "256-bit"), ("magic", "no source")],
)
def test_a_key_that_is_none_is_refused_with_a_remedy(source: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT", "abcd")
    with pytest.raises(WrongKey, match=said):
        find_key(source)


@pytest.fixture
def named() -> Iterator[str]:
    yield "memory://sealed-by-url"
    memory.forget("sealed-by-url")


def test_a_url_says_where_the_key_is(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_KEY", "ab" * 32)
    (tmp_path / "key").write_text("cd" * 32 + "\n")
    store = open_store(f"{named}?key=env:STORE_KEY")
    store.put("jobs/a/log/1", b"{}")
    assert probe(store).conditional_put
    with pytest.raises(WrongKey, match="is encrypted"):
        refuse_locked(open_store(named))
    with pytest.raises(WrongKey, match="is encrypted"):
        probe(open_store(named))
    arguments = ["keys", "rotate", "--store", f"{named}?key=env:STORE_KEY", "--to", f"file:{tmp_path / 'key'}"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert open_store(f"{named}?key=file:{tmp_path / 'key'}").get("jobs/a/log/1") == b"{}"
    with pytest.raises(WrongKey):
        open_store(f"{named}?key=env:STORE_KEY")
