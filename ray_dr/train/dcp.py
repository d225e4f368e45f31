"""A checkpoint as a folder of torch.distributed.checkpoint, written by torch itself: `dcp.load` reads it.

The state_dict has one entry per object: a module's is its state_dict, an optimizer's has `state` and `param_groups` by
parameter names, as `torch.distributed.checkpoint.state_dict` gives them. Takes the memory of the whole state.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ray_dr.checkpoint.nested import objects_of
from ray_dr.checkpoint.reader import Source, read_state
from ray_dr.checkpoint.restore_plan import build_index
from ray_dr.errors import CheckpointError, CorruptChunk
from ray_dr.model.checkpoint import Part
from ray_dr.train.state import bytes_of, decode


def export_dcp(
    folder: Path,
    parts: Sequence[Part],
    sources: Mapping[int, Sequence[Source]],
    *,
    on_corrupt: Callable[[CorruptChunk], None],
) -> dict[str, int]:
    """Write a version to `folder`, and say how many bytes were read from each kind of source.

    The folder appears when it is whole. Raises CheckpointError when it is there already; OSError when the disk is full.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is there already (give a folder that is not)")
    index = build_index(parts)
    boxes = [index.box(name) for name in index.shards]
    tensors = {box.name: torch.empty(box.global_shape, dtype=getattr(torch, box.dtype)) for box in boxes}
    buffers = {box: bytes_of(tensors[box.name]) for box in boxes if box.size}
    counted = read_state(parts, buffers, sources, on_corrupt=on_corrupt)
    scalars = {name: value for part in parts for name, value in part.scalars.items()}
    state = {name: decode(_plain(value), tensors) for name, value in objects_of(scalars, tensors).items()}
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # one process is meant
            save(state, storage_writer=FileSystemWriter(unfinished), no_dist=True)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return counted


def _plain(value: Any) -> Any:
    """Arrays as tensors: torch would pickle them."""
    match value:
        case {"$array": path}:
            return {"$tensor": path}
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case _:
            return value
