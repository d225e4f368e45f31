"""A directory as a store: on a local disk, or on a filesystem that all nodes mount.

An object is a file at root/<key>. A put writes a file in root/.tmp, syncs it (`stores.direct`), and then gives it its
name by one system call (`rename`, or `link` for put-if-absent: of several racing links exactly one succeeds), and syncs
the directory. A crash leaves at most a file in root/.tmp; no key starts with a dot, so nobody sees it, and opening the
store removes those older than LEFTOVER_AGE_S.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_dr.errors import AccessDenied, AlreadyExists, NotFound, ObjectTooShort, StoreError, StoreFull, StoreUnavailable
from ray_dr.stores.base import Buffer, Entry, Traits, check_key
from ray_dr.stores.direct import SyncedFiles

NAME_TRIES = 8
LEFTOVER_AGE_S = 3600.0
_IO_MAX_BYTES = 2**30
"""Linux moves at most 2 GiB - 4 KiB per call."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENODEV, errno.ENOTCONN)


class FileStore:
    """Objects as files below `root`, which is made when missing. `shared`: every node mounts this directory."""

    def __init__(self, root: str | Path, *, shared: bool = False) -> None:
        self._root = Path(os.path.abspath(root))
        self._staging = self._root / ".tmp"
        self._shared = shared
        self._files = SyncedFiles()
        with _translated(str(self._root)):
            self._staging.mkdir(parents=True, exist_ok=True)
            self._sweep()

    @property
    def traits(self) -> Traits:
        return Traits(conditional_put=True, durable=True, shared=self._shared)

    @property
    def url(self) -> str:
        return f"file://{self._root}"

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        target = self._root / check_key(key)
        staged = self._staging / uuid.uuid4().hex
        with _translated(key):
            if if_absent and target.exists():  # spares the write; the link below decides
                raise AlreadyExists("the name is taken", key=key)
            try:
                self._check_root(key)
                self._files.make(staged, memoryview(data).cast("B"))
                self._name(staged, target, key, if_absent=if_absent)
            except BaseException:
                _drop(staged)
                raise
            _sync_directory(target.parent)

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        with self._opened(key) as fd:
            there = max(0, os.fstat(fd).st_size - start)
            wanted = there if size is None else min(size, there)
            if wanted <= _IO_MAX_BYTES:
                return os.pread(fd, wanted, start)
            buffer = bytearray(wanted)
            _read_exactly(fd, memoryview(buffer), start, key)
            return bytes(buffer)

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        with self._opened(key) as fd:
            _read_exactly(fd, into.cast("B"), start, key)

    def list(self, prefix: str) -> Iterator[Entry]:
        with _translated(prefix):
            self._check_root(prefix)
            folder = prefix.rpartition("/")[0]
            yield from _walk(self._root / folder, f"{folder}/" if folder else "", prefix)

    def delete(self, key: str) -> None:
        target = self._root / check_key(key)
        with _translated(key):
            self._check_root(key)
            with suppress(FileNotFoundError, NotADirectoryError):
                target.unlink()
                _sync_directory(target.parent)
            self._drop_empty(target.parent)

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        path = self._root / check_key(key)
        with _translated(key):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                self._check_root(key)
                raise NotFound("no such object", key=key) from None
            try:
                yield fd
            finally:
                os.close(fd)

    def _check_root(self, key: str) -> None:
        """An unmounted or removed directory is a store that went away: it is not made anew under running jobs."""
        if not self._staging.is_dir():
            raise StoreUnavailable(f"the store's directory {self._root} is gone", key=key)

    def _drop_empty(self, folder: Path) -> None:
        """Remove directories that hold nothing any more, up to the root; whoever puts into one makes it anew."""
        with suppress(OSError):
            while folder != self._root:
                folder.rmdir()
                folder = folder.parent

    def _name(self, staged: Path, target: Path, key: str, *, if_absent: bool) -> None:
        """Give a staged file its name, also when a delete removes the directory in between."""
        for _ in range(NAME_TRIES):
            self._make_parents(target)
            with suppress(FileNotFoundError):
                return _give_name(staged, target, key, if_absent=if_absent)
        raise StoreUnavailable("its directory is removed over and over", key=key)

    def _make_parents(self, target: Path) -> None:
        missing = []
        folder = target.parent
        while folder != self._root and not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with suppress(FileNotFoundError):  # its parent was removed meanwhile: the next try makes it
                folder.mkdir(exist_ok=True)
                _sync_directory(folder.parent)

    def _sweep(self) -> None:
        """Remove what crashed puts left. Its age is told by the clock that dates the files: that of another machine, where
        the directory is a network's, and this one's may be an hour off."""
        with os.scandir(self._staging) as found:
            left = [item.path for item in found]
        if not left:
            return
        with suppress(OSError):  # a directory that may only be read is swept by others
            os.utime(self._staging)
            oldest = self._staging.stat().st_mtime - LEFTOVER_AGE_S
            for path in left:
                with suppress(FileNotFoundError):
                    if os.stat(path).st_mtime < oldest:
                        os.unlink(path)


def _give_name(staged: Path, target: Path, key: str, *, if_absent: bool) -> None:
    if not if_absent:
        os.rename(staged, target)
        return
    try:
        os.link(staged, target)
        _drop(staged)
    except FileExistsError:
        raise AlreadyExists("the name is taken", key=key) from None
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            remedy = "put-if-absent needs hard links, which this filesystem lacks; use a directory on another one"
            raise StoreError(remedy, key=key) from error
        raise


def _drop(staged: Path) -> None:
    with suppress(OSError):
        staged.unlink()


def _read_exactly(fd: int, into: memoryview, start: int, key: str) -> None:
    done = 0
    while done < into.nbytes:
        count = os.preadv(fd, [into[done : done + _IO_MAX_BYTES]], start + done)
        if count == 0:
            raise ObjectTooShort(f"{into.nbytes} bytes asked for at {start}, {done} there", key=key)
        done += count


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _walk(folder: Path, base: str, prefix: str) -> Iterator[Entry]:
    """Files below `folder` in order of key. A directory sorts as its name with a slash, as its keys do."""
    try:
        with os.scandir(folder) as found:
            items = [(item.name + "/" * item.is_dir(follow_symlinks=False), item) for item in found]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, item in sorted(items, key=lambda pair: pair[0]):
        key = base + name
        if name.startswith(".") or not (key.startswith(prefix) or prefix.startswith(key)):
            continue
        if name.endswith("/"):
            yield from _walk(Path(item.path), key, prefix)
            continue
        with suppress(FileNotFoundError):  # deleted since
            if key.startswith(prefix):
                yield Entry(key, item.stat().st_size)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """OSErrors as ours."""
    try:
        yield
    except OSError as error:
        raise _as_store_error(error, key) from error


def _as_store_error(error: OSError, key: str) -> StoreError:
    what = error.strerror or str(error)
    if error.errno in _FULL:
        return StoreFull(f"no space left in the store's directory ({what}); free space or lower `keep`", key=key)
    if error.errno in _DENIED:
        return AccessDenied(f"may not use the store's directory ({what}); check owner and mount options", key=key)
    if error.errno in _PASSING:
        return StoreUnavailable(f"the store's directory fails ({what})", key=key)
    return StoreError(what, key=key)
