"""Synced files, written past the page cache where the file system allows it.

A large object's bytes are read again by another machine or much later, if ever: a copy of them in the page cache costs
processor time that training needs, and pushes out pages that somebody reads. With O_DIRECT the disk takes them from the
caller's memory. It takes whole pages from the start of a page: what begins elsewhere goes through a small aligned
buffer, and the end of a file that is no whole page is written as ever.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

import numpy as np

DIRECT_FROM_BYTES = 2**18
"""Smaller files are written through the page cache: a round trip to the disk costs more than the copy. 512 files of 512 KiB
in four threads take 0.23 cpu-s past it and 0.84 through it."""
ROOM_BYTES = 2**20
"""As much as stays in the processor's cache between the copy and the write."""
_IO_MAX_BYTES = 2**30
"""Linux moves at most 2 GiB - 4 KiB per call."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_NOT_HERE = (errno.EINVAL, errno.EOPNOTSUPP)


class SyncedFiles:
    """Makes files on one file system. One that does not know O_DIRECT is asked once."""

    def __init__(self) -> None:
        self.direct = bool(_O_DIRECT)
        self._mine = threading.local()

    def make(self, path: Path, data: memoryview) -> None:
        """A new file at `path` that holds `data` (bytes), on the disk when this returns. Raises OSError."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if self.direct and data.nbytes >= DIRECT_FROM_BYTES:
                self._begin_directly(fd, data)
            done = os.lseek(fd, 0, os.SEEK_CUR)
            while done < data.nbytes:
                done += os.write(fd, data[done : done + _IO_MAX_BYTES])
            os.fsync(fd)
        finally:
            os.close(fd)

    def _begin_directly(self, fd: int, data: memoryview) -> None:
        """Write as many whole pages of `data` as go; the file's position says how many."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT)
            self._write_pages(fd, data)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            self.direct = False
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)

    def _write_pages(self, fd: int, data: memoryview) -> None:
        source = np.frombuffer(data, np.uint8)
        aligned = source.ctypes.data % mmap.PAGESIZE == 0
        whole, done = data.nbytes - data.nbytes % mmap.PAGESIZE, 0
        while done < whole and done % mmap.PAGESIZE == 0:  # a disk that fills up may take less than a page
            most = min(whole - done, _IO_MAX_BYTES if aligned else ROOM_BYTES)
            piece = data[done : done + most] if aligned else self._copy(source[done : done + most])
            done += os.write(fd, piece)

    def _copy(self, source: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> memoryview:
        """The same bytes in this thread's aligned room, until the next call."""
        room: mmap.mmap | None = getattr(self._mine, "room", None)
        if room is None:  # private: a forked process must not write into its parent's
            room = self._mine.room = mmap.mmap(-1, ROOM_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(room, np.uint8)[: source.size] = source
        return memoryview(room)[: source.size]
