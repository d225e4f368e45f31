"""A directory as a store: crashes, full disks, forbidden places, disks that go away."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ray_dr.errors import AccessDenied, NotFound, StoreError, StoreFull, StoreUnavailable
from ray_dr.stores import disk
from ray_dr.stores.disk import LEFTOVER_AGE_S, FileStore


def test_objects_are_there_for_the_next_process(tmp_path: Path) -> None:
    FileStore(tmp_path / "s").put("a/b", b"x")
    assert FileStore(tmp_path / "s").get("a/b") == b"x"
    assert (tmp_path / "s/a/b").read_bytes() == b"x"


def test_leftovers_of_a_crashed_put_are_hidden_and_the_old_ones_swept(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    young, old = tmp_path / ".tmp/young", tmp_path / ".tmp/old"
    for path in (young, old):
        path.write_bytes(b"half")
    past = young.stat().st_mtime - LEFTOVER_AGE_S - 60
    os.utime(old, (past, past))
    assert list(store.list("")) == []
    FileStore(tmp_path)
    assert (young.exists(), old.exists()) == (True, False)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.EROFS, AccessDenied),
        (errno.EIO, StoreUnavailable),
        (errno.ENAMETOOLONG, StoreError),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open"])
def test_a_put_that_the_system_refuses_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[StoreError], call: str
) -> None:
    store = FileStore(tmp_path)
    store.put("k", b"before")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, call, refuse)
        with pytest.raises(error) as caught:
            store.put("k", b"after")
    assert type(caught.value) is error
    assert caught.value.key == "k"
    assert store.get("k") == b"before"
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_a_directory_that_went_away_is_unavailable_and_not_made_anew(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "mount")
    store.put("a/k", b"x")
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    for act in (
        lambda: store.put("a/k", b"y"),
        lambda: store.get("a/k"),
        lambda: list(store.list("")),
        lambda: store.delete("a/k"),
    ):
        with pytest.raises(StoreUnavailable):
            act()
    assert not (tmp_path / "mount").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "mount")
    assert store.get("a/k") == b"x"


def test_an_object_cannot_be_a_directory_as_well(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a/b", b"x")
    with pytest.raises(StoreError):
        store.put("a", b"y")
    with pytest.raises(StoreError):
        store.put("a/b/c", b"y")
    with pytest.raises(NotFound):
        store.get("a/b/c")
    assert [entry.key for entry in store.list("")] == ["a/b"]


def test_a_filesystem_without_hard_links_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(disk.os, "link", refuse)
    with pytest.raises(StoreError, match="hard links"):
        FileStore(tmp_path).put("k", b"x", if_absent=True)


def test_a_place_that_is_a_file_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError):
        FileStore(tmp_path / "file")
    shutil.rmtree(tmp_path)
