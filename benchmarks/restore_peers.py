"""Other libraries' ways to load a state into tensors that are there, for benchmarks.restore.

Each function saves the state and gives what loads it; what a program would do anew after a failure, such as opening a
file and reading its index, is done at every load.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.alone import run_alone
from benchmarks.restore_dcp import dcp_from_disk, dcp_from_s3, dcp_to_disk, dcp_to_s3, load
from benchmarks.save_peers import Disk, Nvrx
from benchmarks.state import THREADS, make_state
from benchmarks.stores import BUCKET

State = dict[str, torch.Tensor]
Load = Callable[[], object]


def torch_load(folder: Path, state: State) -> Load:
    """torch.load, then copied."""
    torch.save(state, folder / "state.pt")

    def run() -> None:
        loaded = torch.load(folder / "state.pt", weights_only=True)
        for name, tensor in state.items():
            tensor.copy_(loaded[name])

    return run


def _safetensors(folder: Path, state: State) -> Path:
    from safetensors.torch import save_file

    path = folder / "state.safetensors"
    if not path.exists():
        save_file(state, path)
    return path


def safetensors_load_file(folder: Path, state: State) -> Load:
    """load_file, which maps the file, then copied."""
    from safetensors.torch import load_file

    path = _safetensors(folder, state)

    def run() -> None:
        for name, tensor in load_file(path).items():
            state[name].copy_(tensor)

    return run


def safetensors_safe_open(folder: Path, state: State) -> Load:
    """safe_open, each tensor copied as it is had."""
    from safetensors import safe_open

    path = _safetensors(folder, state)

    def run() -> None:
        with safe_open(path, "pt") as file:
            for name, tensor in state.items():
                tensor.copy_(file.get_tensor(name))

    return run


def torchsnapshot(folder: Path, state: State) -> Load:
    """Snapshot.restore, which reads into the tensors."""
    from torchsnapshot import Snapshot, StateDict

    app = {"state": StateDict(**state)}
    Snapshot.take(str(folder / "torchsnapshot"), app)
    return lambda: Snapshot(str(folder / "torchsnapshot")).restore(app)


def dcp_disk(folder: Path, state: State) -> Load:
    """torch.distributed.checkpoint.load."""
    dcp_to_disk(folder, state)
    return lambda: dcp_from_disk(folder, state)


def dcp_s3(endpoint: str, folder: Path, state: State, threads: int) -> Load:
    """The same, by `restore_dcp`'s reader."""
    dcp_to_s3(folder, state, endpoint)
    return lambda: dcp_from_s3(endpoint, state, threads)


def nvrx(folder: Path, state: State, size: int) -> Load:
    """What its writer wrote, by its reader. A process of its own makes the same state and writes it, as the writer forks."""
    from nvidia_resiliency_ext.checkpointing.async_ckpt.cached_metadata_filesystem_reader import (
        CachedMetadataFileSystemReader,
    )

    told = run_alone(_write_nvrx, str(folder / "nvrx"), size)
    if "failed" in told:
        raise RuntimeError(told["failed"])
    return lambda: load(CachedMetadataFileSystemReader(folder / "nvrx"), state)


def _write_nvrx(folder: str, size: int) -> dict[str, object]:
    disk = Disk(Path(folder))
    way = Nvrx(disk, make_state(size), persistent=False)
    way.prepare()
    way.save()
    way.wait()
    return {}


def s3torchconnector(endpoint: str, state: State) -> Load:
    """DCP by its writer and its reader."""
    import torch.distributed.checkpoint as dcp
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter

    os.environ["AWS_ENDPOINT_URL"] = endpoint
    url, config = f"s3://{BUCKET}/connector", S3ClientConfig(force_path_style=True)
    dcp.save(state, storage_writer=S3StorageWriter("us-east-1", url, config, thread_count=THREADS), no_dist=True)
    return lambda: load(S3StorageReader("us-east-1", url, config), state)
