"""Large objects of a directory go to the disk past the page cache: the same bytes, the same promises, from any address."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ray_dr.errors import StoreFull
from ray_dr.stores import direct
from ray_dr.stores.direct import DIRECT_FROM_BYTES, ROOM_BYTES, SyncedFiles
from ray_dr.stores.disk import FileStore
from ray_dr.stores.open import open_store

PAGE = mmap.PAGESIZE
SIZES = [
    DIRECT_FROM_BYTES - 1, DIRECT_FROM_BYTES, DIRECT_FROM_BYTES + 1, DIRECT_FROM_BYTES + PAGE - 1,
    ROOM_BYTES + PAGE, ROOM_BYTES + PAGE + 1, 3 * ROOM_BYTES - 1, 3 * ROOM_BYTES, 3 * ROOM_BYTES + 512,
]  # fmt: skip


@pytest.fixture(scope="module")
def memory() -> memoryview:
    """Bytes that begin a page, each page of them another."""
    room = memoryview(mmap.mmap(-1, 5 * ROOM_BYTES))
    room[:] = os.urandom(len(room))
    return room


class Writes:
    """Watches os.write: which lengths went past the page cache, and which did not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.direct: list[int] = []
        self.cached: list[int] = []
        self._write = os.write
        monkeypatch.setattr(direct.os, "write", self.write)

    def write(self, fd: int, data: memoryview) -> int:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        (self.direct if flags & os.O_DIRECT else self.cached).append(len(data))
        return self._write(fd, data)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory, memory: memoryview) -> Path:
    """A directory whose file system takes direct writes."""
    place = tmp_path_factory.mktemp("direct")
    files = SyncedFiles()
    files.make(place / "probe", memory[:DIRECT_FROM_BYTES])
    if not files.direct:
        pytest.skip("this file system does not know O_DIRECT")
    return place


@pytest.mark.parametrize("offset", [0, 1, 64, PAGE - 1, PAGE])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_put_from_any_address_reads_back(on_disk: Path, memory: memoryview, size: int, offset: int) -> None:
    store, data = FileStore(on_disk / "store"), memory[offset : offset + size]
    store.put("a/b", data)
    assert (on_disk / "store/a/b").read_bytes() == data
    assert store.get("a/b", start=size - 7) == data[-7:]
    assert store._files.direct


@pytest.mark.parametrize(
    ("offset", "size", "past", "through"),
    [
        (0, 3 * ROOM_BYTES, [3 * ROOM_BYTES], []),
        (PAGE, 3 * ROOM_BYTES + 5, [3 * ROOM_BYTES], [5]),
        (1, 2 * ROOM_BYTES + PAGE + 5, [ROOM_BYTES, ROOM_BYTES, PAGE], [5]),
        (0, DIRECT_FROM_BYTES - 1, [], [DIRECT_FROM_BYTES - 1]),
    ],
)
def test_whole_pages_go_past_the_page_cache_and_the_rest_through_it(
    on_disk: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch,
    offset: int, size: int, past: list[int], through: list[int],
) -> None:
    store, writes = FileStore(on_disk / "store"), Writes(monkeypatch)
    store.put("k", memory[offset : offset + size])
    assert (writes.direct, writes.cached) == (past, through)


def test_a_sealed_object_goes_without_another_copy(
    on_disk: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_KEY", "ab" * 32)
    store = open_store(f"file://{on_disk}/sealed?key=env:STORE_KEY")
    writes = Writes(monkeypatch)
    store.put("k", memory[1 : 1 + 3 * ROOM_BYTES])
    assert writes.direct == [3 * ROOM_BYTES]
    assert sum(writes.cached) < PAGE
    assert store.get("k") == memory[1 : 1 + 3 * ROOM_BYTES]


def test_read_only_and_nested_buffers_are_taken(on_disk: Path, memory: memoryview) -> None:
    store = FileStore(on_disk / "store")
    for data in (bytes(memory), bytearray(memory), memory.cast("d"), memory.toreadonly()):
        store.put("k", data)
        assert (on_disk / "store/k").read_bytes() == memory


def test_threads_do_not_write_each_others_bytes(on_disk: Path, memory: memoryview) -> None:
    store = FileStore(on_disk / "store")
    pieces = {f"k{number}": memory[number + 1 : number + 1 + 2 * ROOM_BYTES] for number in range(12)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store.put, pieces, pieces.values()))
    assert all((on_disk / "store" / key).read_bytes() == data for key, data in pieces.items())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("pages", [0, 3])
def test_a_file_system_that_refuses_is_asked_once(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch, offset: int, pages: int
) -> None:
    """Whether it refuses the first write, or one when it has taken some pages."""
    store, data = FileStore(tmp_path / "store"), memory[offset : offset + 2 * ROOM_BYTES + 9]
    write, refused = os.write, []

    def refuse(fd: int, piece: memoryview) -> int:
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return write(fd, piece)
        if os.fstat(fd).st_size < pages * PAGE:
            return write(fd, piece[: pages * PAGE])
        refused.append(len(piece))
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(direct.os, "write", refuse)
    store.put("one", data)
    store.put("two", data)
    assert store.get("one") == data == store.get("two")
    assert len(refused) == 1


def mounted(place: Path, *arguments: str) -> Iterator[Path]:
    place.mkdir()
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "ramfs", "-t", "ramfs", "none")


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    if request.param == "tmpfs":
        yield from mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=6m", "none")
        return
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 6 * 2**20)
    made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("cannot make a file system here")
    yield from mounted(tmp_path / "small", "-o", "loop", str(image))


@pytest.mark.parametrize("offset", [0, 1])
def test_a_file_system_without_direct_writes_is_written_as_ever(ramfs: Path, memory: memoryview, offset: int) -> None:
    store, data = FileStore(ramfs / "store"), memory[offset : offset + 2 * ROOM_BYTES + 9]
    store.put("k", data)
    assert not store._files.direct
    store.put("k2", data)
    assert store.get("k") == data == store.get("k2")


@pytest.mark.parametrize("cut", [lambda memory: memory, lambda memory: memory[1:-8]], ids=["aligned", "unaligned"])
def test_a_full_disk_is_called_so_and_nothing_is_left(
    small_disk: Path, memory: memoryview, cut: Callable[[memoryview], memoryview]
) -> None:
    store, piece = FileStore(small_disk / "store"), cut(memory)[: ROOM_BYTES + 11]
    store.put("before", piece)
    with pytest.raises(StoreFull, match=r"free space or lower `keep`: .*big"):
        store.put("big", cut(memory))
    assert list((small_disk / "store/.tmp").iterdir()) == []
    assert [entry.key for entry in store.list("")] == ["before"]
    store.put("after", piece)
    assert store.get("before") == piece == store.get("after")
    assert store._files.direct, "a full disk is no reason to leave the direct way"
