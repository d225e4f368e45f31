"""Memory that other processes of the node can map, and fast copies into it.

A pool is an anonymous file (memfd): it has no name in any file system, so the kernel frees it with its last holder,
however that one ended. A process of the same user maps it through the owner's `/proc/<pid>/fd/<fd>`; its mapping stays
valid when the owner is gone, and the pool's bytes stay when a mapping process is killed.

Fresh pages cost ten times as much as touched ones, so a pool is touched once when it is made and reused from then on.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

MEMFD_NAME = "ray-dr"
SPLIT_BYTES = 8 * 2**20
"""Copies are dealt to threads in runs of about this size."""
WORTH_A_THREAD_BYTES = 4 * 2**20
"""Below this many bytes per thread, starting the thread costs more than it saves."""


class Pool:
    """Shared memory of `size` bytes (> 0), zero at first. Made by `Pool.create` or `Pool.sparse`."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = self.reserved = size
        self._fd, self._lock = fd, threading.Lock()
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        self._closed = weakref.finalize(self, os.close, fd)
        self.view = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED))

    @classmethod
    def create(cls, size: int, *, threads: int = 2) -> Pool:
        """A pool with all its pages in place. Raises OSError when the memory cannot be had."""
        # Reserving first turns a lack of memory into an error here instead of a SIGBUS in whoever writes.
        pool = cls._make(size, lambda fd: os.posix_fallocate(fd, 0, size))
        touch(pool.view, threads=threads)
        return pool

    @classmethod
    def sparse(cls, size: int) -> Pool:
        """A pool without pages: `reserve` a run of it before anybody writes there. `reserved` is what `keep` left."""
        pool = cls._make(size, lambda fd: os.ftruncate(fd, size))
        pool.reserved = 0
        return pool

    @classmethod
    def _make(cls, size: int, enlarge: Callable[[int], None]) -> Pool:
        fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            enlarge(fd)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size)

    def reserve(self, start: int, size: int) -> None:
        """Get the memory for a run of a sparse pool. Raises OSError when it cannot be had, or when the pool is closed."""
        with self._lock:  # a closed descriptor's number may be another file's
            if not self._closed.alive:
                raise OSError("the pool is closed")
            fd = os.dup(self._fd)
        try:
            os.posix_fallocate(fd, start, size)
        finally:
            os.close(fd)

    def keep(self, size: int) -> None:
        """Give back the memory of all but the first `size` bytes, a multiple of the page size, of a sparse pool."""
        self.reserved = size
        if isinstance(self.view.obj, mmap.mmap) and size < self.size:
            self.view.obj.madvise(mmap.MADV_REMOVE, size, self.size - size)

    def close(self) -> None:
        """Give the memory back: at once, or with the last slice of `view` or mapping elsewhere that is still in use."""
        owner = self.view.obj
        self.view.release()
        with self._lock:
            self._closed()
        if isinstance(owner, mmap.mmap):
            try:
                owner.close()
            except BufferError:
                return  # Slices are still in use; the mapping ends with the last of them.


def available_bytes() -> int:
    """Memory that can still be had on this node: the kernel's estimate, or what the control group leaves of its limit."""
    with open("/proc/meminfo") as info:
        found = next((int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:")), sys.maxsize)
    with contextlib.suppress(OSError, ValueError):  # no version 2 control group, or one without a limit ("max")
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found = min(found, max(0, limit - used))
    return found


def attach(
    path: str, size: int, *, populate: bool = True, writable: bool = True, name: str = MEMFD_NAME
) -> memoryview:
    """The first `size` bytes of another process's pool; unmapped when the last slice of the view is gone.

    populate    map every page now, by one thread; else whoever comes to a page first does, which is quicker when all of
                it is read once by several threads
    name        that its memory has
    Raises OSError when the pool's process is gone, or when the path is not a pool of at least that size.
    """
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        # A pid or a descriptor may have been used again for something else.
        if f"/memfd:{name} (deleted)" not in os.readlink(f"/proc/self/fd/{fd}") or os.fstat(fd).st_size < size:
            raise OSError(f"{path} is not a shared-memory pool of {size} bytes")
        allowed = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0), allowed))
    finally:
        os.close(fd)


def touch(view: memoryview, *, threads: int = 2) -> None:
    """Write a zero to every page, so that later writes find it in place."""
    pages = np.frombuffer(view, np.uint8)[:: mmap.PAGESIZE]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda run: run.fill(0), np.array_split(pages, threads)))


def meet(view: memoryview, stop: threading.Event) -> None:
    """Read of every page of mapped memory, so that it is in this process's page table; until then, or until `stop`."""
    data = np.frombuffer(view, np.uint8)
    for at in range(0, len(data), SPLIT_BYTES):
        if stop.is_set():
            return
        data[at : at + SPLIT_BYTES : mmap.PAGESIZE].max()


def copy_into(into: memoryview, data: memoryview) -> None:
    """Copy bytes; both are contiguous and of the same length. The GIL is released.

    Through numpy: slice assignment of memoryviews holds the GIL.
    """
    if data.nbytes:
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))
    elif into.nbytes:
        raise ValueError(f"no bytes for {into.nbytes}")


def copy_many(pairs: Iterable[tuple[memoryview, memoryview]], *, threads: int = 2) -> None:
    """Copy each (into, data) pair, large ones split over the threads. The pairs must not overlap."""
    runs = [run for into, data in pairs for run in _split(into, data)]
    useful = 1 + sum(into.nbytes for into, _ in runs) // WORTH_A_THREAD_BYTES
    in_threads((functools.partial(copy_into, *run) for run in runs), min(threads, useful))


def in_threads(jobs: Iterable[Callable[[], object]], threads: int) -> None:
    """Do all of these in so many threads, of which this is one. Raises what one of them raised."""
    left = deque(jobs)
    threads = min(threads, len(left))
    if threads <= 1:
        return _do_all(left)
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(_do_all, left) for _ in range(threads - 1)]
        _do_all(left)
        for other in others:
            other.result()
    return None


def _do_all(left: deque[Callable[[], object]]) -> None:
    """Until nothing is left; several threads share it."""
    while True:
        try:
            job = left.popleft()
        except IndexError:
            return
        job()


def _split(into: memoryview, data: memoryview) -> Iterable[tuple[memoryview, memoryview]]:
    if into.nbytes != data.nbytes:
        raise ValueError(f"{data.nbytes} bytes do not fill {into.nbytes}")
    if data.nbytes == 0:
        return []
    if data.nbytes <= SPLIT_BYTES:
        return [(into, data)]
    into, data = into.cast("B"), data.cast("B")
    starts = range(0, data.nbytes, SPLIT_BYTES)
    return [(into[at : at + SPLIT_BYTES], data[at : at + SPLIT_BYTES]) for at in starts]
