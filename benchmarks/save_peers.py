"""Other libraries' ways to save a state, for benchmarks.save; torch is needed, each other library where it is used.

Each has the same five calls: `prepare` makes room (not timed); `save` is the call a program makes; `fence` waits until the
state may be changed; `wait` until the checkpoint is committed and synced on disk; `close` tells the processor seconds of
other processes since the way was made. What a library needs once per process is done when its way is made.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import median
from benchmarks.state import THREADS
from benchmarks.stores import BUCKET, make_client, s3_endpoint
from ray_dr.checkpoint.lane import PUTS
from ray_dr.checkpoint.memory import Pool
from ray_dr.stores.open import open_store

RAW_BYTES = 8 * 2**20
RAW_OBJECTS = 32
POLL_S = 0.005
State = dict[str, torch.Tensor]


class Disk:
    """A folder for one way to save; emptied before every save, so that all of them write into memory used before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder


def sync(folder: Path) -> None:
    """Sync every file and folder in it, and itself, for libraries that leave that out."""
    for path in [*folder.rglob("*"), folder]:
        held = os.open(path, os.O_RDONLY)
        os.fsync(held)
        os.close(held)


def children_cpu_s() -> float:
    """Processor seconds of all processes under this one; of those that ended, when they were waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks, parents = dict[int, int](), dict[int, int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended just now.
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    under, found = {os.getpid()}, 0
    while more := {pid for pid, parent in parents.items() if parent in under} - under:
        under |= more
        found += sum(ticks[pid] for pid in more)
    return ended.ru_utime + ended.ru_stime + found / os.sysconf("SC_CLK_TCK")


def raw_put_s(url: str, size: int) -> float:
    """Seconds for so many bytes into S3 by our client with as many threads as a save, and nothing else."""
    store, pool = open_store(url), Pool.create(RAW_BYTES * RAW_OBJECTS)
    times = []

    def put(number: int) -> None:
        at = number % RAW_OBJECTS * RAW_BYTES
        store.put(f"raw/{at}", pool.view[at : at + RAW_BYTES])

    with ThreadPoolExecutor(PUTS) as threads:
        for _ in range(3):
            begun = time.perf_counter()
            list(threads.map(put, range(size // RAW_BYTES)))
            times.append(time.perf_counter() - begun)
    return median(times)


class TorchSave:
    """torch.save into a file, synced."""

    def __init__(self, disk: Disk, state: State) -> None:
        self._disk, self._state = disk, state

    def prepare(self) -> None:
        """Make room."""
        self._disk.fresh()

    def save(self) -> None:
        with (self._disk.folder / "state.pt").open("wb") as sink:
            torch.save(self._state, sink)
            sink.flush()
            os.fsync(sink.fileno())

    def fence(self) -> None:
        """Nothing reads the state any more."""

    def wait(self) -> None:
        """It is there."""

    def close(self) -> float:
        return 0.0


class Safetensors(TorchSave):
    """safetensors' save_file, then synced."""

    def save(self) -> None:
        from safetensors.torch import save_file

        save_file(self._state, self._disk.folder / "state.safetensors")
        sync(self._disk.folder)


class Torchsnapshot(TorchSave):
    """torchsnapshot's Snapshot.take, then synced."""

    def __init__(self, disk: Disk, state: State) -> None:
        from torchsnapshot import StateDict

        super().__init__(disk, state)
        self._app = {"state": StateDict(**state)}

    def save(self) -> None:
        from torchsnapshot import Snapshot

        Snapshot.take(str(self._disk.folder), self._app)
        sync(self._disk.folder)


class TorchsnapshotAsync(Torchsnapshot):
    """Snapshot.async_take, which returns when it has a copy; synced when it is written."""

    def save(self) -> None:
        from torchsnapshot import Snapshot

        self._pending = Snapshot.async_take(str(self._disk.folder), self._app)

    def wait(self) -> None:
        self._pending.wait()
        sync(self._disk.folder)


class Dcp(TorchSave):
    """torch.distributed.checkpoint.save, two threads, synced."""

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self._disk.folder, thread_count=THREADS)
        dcp.save(self._state, storage_writer=writer, no_dist=True)


def join_group(disk: Disk) -> None:
    """A process group of this process alone."""
    import torch.distributed as dist

    store = dist.FileStore(str(disk.folder) + ".rendezvous", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


class DcpAsync(TorchSave):
    """torch.distributed.checkpoint.async_save in a thread, with one of torch's stagers or one that keeps its copy."""

    def __init__(self, disk: Disk, state: State, stager: Callable[[], Any]) -> None:
        super().__init__(disk, state)
        join_group(disk)
        self._stager = stager()
        self._staged: Any = None
        self._saved: Any = None

    def save(self) -> None:
        self._begin(self._state, self._stager)

    def _begin(self, state: State, stager: Any, **how: Any) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self._disk.folder, thread_count=THREADS)
        answer = dcp.async_save(state, storage_writer=writer, async_stager=stager, **how)
        self._staged = getattr(answer, "staging_completion", None)
        self._saved = getattr(answer, "upload_completion", answer)

    def fence(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def wait(self) -> None:
        self._saved.result()


class DcpProcess(DcpAsync):
    """The same in a process of its own, which is started, with a save of one number, when this is made."""

    def __init__(self, disk: Disk, state: State, stager: Callable[[], Any]) -> None:
        super().__init__(disk, state, stager)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        disk.fresh()
        self._begin({"one": torch.zeros(1)}, stager())
        self.wait()
        self._before_s = children_cpu_s()

    def _begin(self, state: State, stager: Any, **how: Any) -> None:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        super()._begin(state, stager, async_checkpointer_type=AsyncCheckpointerType.PROCESS, **how)

    def close(self) -> float:
        return children_cpu_s() - self._before_s


def default_stager(*, behind: bool) -> Any:
    """torch's own, which copies to shared memory: in `async_save`, or in a thread that the next update has to wait for."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return DefaultStager(StagingOptions(False, True, behind, False))


class CachedStager:
    """What torch's BlockingAsyncStager(cache_staged_state_dict=True) does, which itself works with an accelerator only:
    it copies into tensors that it keeps (there pinned, here shared)."""

    _synchronize_after_execute = True
    should_synchronize_after_execute = True

    def __init__(self) -> None:
        self._kept: Any = None

    def stage(self, state_dict: Any) -> Any:
        from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict

        if self._kept is None:
            self._kept = _create_cpu_state_dict(state_dict, share_memory=True)
        return _copy_state_dict(state_dict, self._kept)

    def synchronize_staging(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to give back."""


class DcpInS3(TorchSave):
    """torch.distributed.checkpoint.save with s3torchconnector's writer, two threads, to a small S3 server, a process of its
    own on the same cores, that keeps objects in memory."""

    def __init__(self, disk: Disk, state: State) -> None:
        super().__init__(disk, state)
        self._server = ExitStack()
        endpoint = self._server.enter_context(s3_endpoint("small", disk.folder))
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        self._url = f"s3://{BUCKET}/raw?endpoint={endpoint}&region=us-east-1"
        self._client = make_client(endpoint)

    def prepare(self) -> None:
        """Remove the older checkpoint."""
        for entry in self._client.list_objects_v2(Bucket=BUCKET, Prefix="dcp/").get("Contents", ()):
            self._client.delete_object(Bucket=BUCKET, Key=entry["Key"])

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageWriter

        at = S3ClientConfig(force_path_style=True)
        writer = S3StorageWriter("us-east-1", f"s3://{BUCKET}/dcp", at, thread_count=THREADS)
        dcp.save(self._state, storage_writer=writer, no_dist=True)

    def raw_put_s(self, size: int) -> float:
        """Seconds for the same bytes by our client, and nothing else."""
        return raw_put_s(self._url, size)

    def close(self) -> float:
        self._server.close()
        return 0.0


class Nvrx(TorchSave):
    """nvidia-resiliency-ext's asynchronous writer of DCP's format, from a worker process that stays or from a fork per save.

    It is made for GPUs. What it does there while a program waits, the copy to the host, is here one from the state, which it
    moves to shared memory, into the worker's own memory; a fork has the state as it was. The worker and the queue are
    started, with a save of one number, when this is made.
    """

    def __init__(self, disk: Disk, state: State, *, persistent: bool) -> None:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue

        super().__init__(disk, state)
        join_group(disk)
        if not (persistent or torch.cuda.is_available()):
            torch.cuda.synchronize = lambda *_: None  # It is called before each fork, and fails without a GPU.
        self._queue, self._persistent = AsyncCallsQueue(persistent=persistent), persistent
        disk.fresh()
        self._begin({"one": torch.zeros(1)})
        self.wait()
        self._before_s = children_cpu_s()

    def save(self) -> None:
        self._begin(self._state)

    def _begin(self, state: State) -> None:
        from nvidia_resiliency_ext.checkpointing.async_ckpt import state_dict_saver as saver
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncRequest
        from nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async import FileSystemWriterAsync

        writer = FileSystemWriterAsync(self._disk.folder, thread_count=THREADS)
        planned = saver.save_state_dict_async_plan(state, writer)
        write, _, given = writer.get_save_function_and_args()
        copy = partial(copy_buckets, writer.write_buckets) if self._persistent else None
        finish = [partial(saver.save_state_dict_async_finalize, *planned)]
        # A worker is given the buckets by `copy` alone.
        given = (given[0], None, *given[2:]) if self._persistent else tuple(given)
        self._queue.schedule_async_request(AsyncRequest(write, given, finish, preload_fn=copy))

    def wait(self) -> None:
        while not self._queue.maybe_finalize_async_calls(no_dist=True):
            time.sleep(POLL_S)

    def close(self) -> float:
        cpu_s = children_cpu_s() - self._before_s
        if self._persistent:
            self._queue.persistent_caller.close()
        return cpu_s


def copy_buckets(buckets: Sequence[Any]) -> list[Any]:
    """Called in the worker: what to write, copied."""
    return [
        (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for path, key, (data, tensors) in buckets
    ]


DCP_ASYNC = "DCP async_save"
PEERS: dict[str, Callable[[Disk, State], Any]] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "torchsnapshot take": Torchsnapshot,
    "torchsnapshot async_take": TorchsnapshotAsync,
    "DCP save": Dcp,
    DCP_ASYNC: lambda disk, state: DcpAsync(disk, state, CachedStager),
    f"{DCP_ASYNC}, default stager": lambda disk, state: DcpAsync(disk, state, lambda: default_stager(behind=False)),
    f"{DCP_ASYNC}, asynchronous stager": lambda disk, state: DcpAsync(disk, state, lambda: default_stager(behind=True)),
    f"{DCP_ASYNC}, process": lambda disk, state: DcpProcess(disk, state, CachedStager),
    "NVRx, persistent worker": lambda disk, state: Nvrx(disk, state, persistent=True),
    "NVRx, fork": lambda disk, state: Nvrx(disk, state, persistent=False),
    "DCP in S3, s3torchconnector": DcpInS3,
}
MODULES = {
    "safetensors": "safetensors", "torchsnapshot take": "torchsnapshot", "torchsnapshot async_take": "torchsnapshot",
    "NVRx, persistent worker": "nvidia_resiliency_ext", "NVRx, fork": "nvidia_resiliency_ext",
    "DCP in S3, s3torchconnector": "s3torchconnector",
}  # fmt: skip
"""What has to be installed for a way."""
