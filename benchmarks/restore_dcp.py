"""torch.distributed.checkpoint from disk and from S3, for benchmarks.restore.

torch has no reader of S3 of its own; its readers for it (fsspec's, s3torchconnector's) give DCP a file per object. So does
this one, over the client that ray_dr uses: the object comes into memory by ranged gets in as many threads as are asked
for, and DCP reads its tensors from there.
"""

from __future__ import annotations

import io
import mmap
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from benchmarks.state import THREADS
from benchmarks.stores import BUCKET
from ray_dr.stores.s3 import Bucket, S3Store

GET_BYTES = 8 * 2**20


class InMemory(io.RawIOBase):
    """A file over memory."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence] + offset
        return self._at

    def readinto(self, into: Any) -> int:
        piece = self._data[self._at : self._at + len(into)]
        memoryview(into).cast("B")[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class Objects(FileSystem):
    """DCP's view of a bucket: objects by the names of its files, each fetched whole when it is opened."""

    def __init__(self, store: S3Store, sizes: dict[str, int], threads: int) -> None:
        self._store, self._sizes, self._threads = store, sizes, threads

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        name = object_name(path)
        data = memoryview(mmap.mmap(-1, self._sizes[name]))

        def get(start: int) -> None:
            self._store.readinto(name, data[start : start + GET_BYTES], start=start)

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(get, range(0, len(data), GET_BYTES)))
        yield InMemory(data)

    def exists(self, path: Any) -> bool:
        return object_name(path) in self._sizes


def dcp_to_disk(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Save to a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=THREADS), no_dist=True)


def dcp_to_s3(folder: Path, state: dict[str, torch.Tensor], endpoint: str) -> None:
    """Save to a folder, and move its files into the bucket."""
    dcp_to_disk(folder, state)
    store = _store(endpoint)
    for path in folder.iterdir():
        store.put(object_name(path), path.read_bytes())
        path.unlink()


def dcp_from_disk(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Load into the state's tensors."""
    load(dcp.FileSystemReader(folder), state)


def dcp_from_s3(endpoint: str, state: dict[str, torch.Tensor], threads: int) -> None:
    """Load into the state's tensors, each file fetched with so many threads."""
    store = _store(endpoint)
    reader = dcp.FileSystemReader("/bucket")
    reader.fs = Objects(store, {entry.key: entry.size for entry in store.list("")}, threads)
    load(reader, state)


def load(reader: dcp.FileSystemReader, state: dict[str, torch.Tensor]) -> None:
    """Load into the state's tensors by a reader of DCP's format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)


def _store(endpoint: str) -> S3Store:
    return S3Store(Bucket(BUCKET, "dcp", endpoint, "us-east-1"))


def object_name(path: Any) -> str:
    """A file's name as our stores take it."""
    return Path(path).name.lstrip("._")
