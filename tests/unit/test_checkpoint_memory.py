"""Shared memory that outlives whoever maps it, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys

import pytest

from ray_dr.checkpoint.memory import Pool, attach, copy_many

WRITER = """
import sys
from ray_dr.checkpoint.memory import attach
view = attach(sys.argv[1], int(sys.argv[2]))
view[:5] = b"alive"
view[-1:] = b"!"
print("written", flush=True)
sys.stdin.read()
"""


def held() -> tuple[set[str], set[str], int]:
    """(open descriptors, files in /dev/shm, mapped pools)."""
    with open("/proc/self/maps") as maps:
        return set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm")), maps.read().count("memfd:ray-dr")


def test_bytes_survive_the_sigkill_of_a_process_that_wrote_them() -> None:
    pool = Pool.create(1 << 20)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, pool.path, str(pool.size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert bytes(pool.view[:5]) == b"alive"
    assert bytes(pool.view[-1:]) == b"!"
    pool.close()


def test_nothing_is_left_after_close() -> None:
    gc.collect()
    before = held()
    pool = Pool.create(1 << 20)
    assert len(held()[0]) > len(before[0])
    pool.close()
    assert held() == before


def test_a_slice_in_use_stays_valid_after_close_and_frees_the_pool_with_itself() -> None:
    gc.collect()
    before = held()
    pool = Pool.create(1 << 20)
    piece = pool.view[10:20]
    piece[:] = b"0123456789"
    pool.close()
    assert bytes(piece) == b"0123456789"
    del piece, pool
    assert held() == before


def test_a_dropped_pool_frees_itself() -> None:
    gc.collect()
    before = held()
    pool = Pool.create(1 << 20)
    del pool
    assert held() == before


def test_attaching_shares_the_bytes_and_refuses_what_is_no_pool(tmp_path: object) -> None:
    pool = Pool.create(4096)
    view = attach(pool.path, 100)
    view[0] = 7
    assert pool.view[0] == 7
    with pytest.raises(OSError, match="not a shared-memory pool"):
        attach(pool.path, 4097)
    del view
    pool.close()
    with pytest.raises(OSError):
        attach(pool.path, 100)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_copies_of_any_size_arrive_whole(threads: int) -> None:
    sizes = [0, 1, 1000, 9 << 20, (17 << 20) + 3]
    pairs = [(memoryview(bytearray(n)), memoryview(os.urandom(n))) for n in sizes]
    copy_many(pairs, threads=threads)
    assert all(into == data for into, data in pairs)


def test_a_copy_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes do not fill 4"):
        copy_many([(memoryview(bytearray(4)), memoryview(b"abc"))])
