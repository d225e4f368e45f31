"""A checkpoint as one safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes without gaps.

Format: https://github.com/huggingface/safetensors#format. The tensors are read straight into the mapped file, so that
each chunk is fetched once and memory is the page cache's. The file appears under its name when it is whole.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_dr.checkpoint.reader import Source, read_state
from ray_dr.checkpoint.restore_plan import Index, build_index
from ray_dr.errors import CorruptChunk, UnsupportedState
from ray_dr.model.checkpoint import Box, Part

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Names in the format. Complex numbers and the fnuz variants of float8 have none that all its readers know."""


def export_safetensors(
    path: Path,
    parts: Sequence[Part],
    sources: Mapping[int, Sequence[Source]],
    *,
    on_corrupt: Callable[[CorruptChunk], None],
) -> dict[str, int]:
    """Write all tensors of a version to `path`, and say how many bytes were read from each kind of source.

    The state's scalars are in the header's `__metadata__`, as JSON under "scalars". Raises UnsupportedState, naming the
    tensors, before anything is written when the format has no form for a dtype; OSError when the disk is full.
    """
    boxes = _boxes(build_index(parts))
    header = _header(boxes, {name: value for part in parts for name, value in part.scalars.items()})
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        counted = _fill(unfinished, header, boxes, parts, sources, on_corrupt)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return counted


def _boxes(index: Index) -> tuple[Box, ...]:
    """Every tensor whole, in order of name."""
    boxes = tuple(index.box(name) for name in index.shards)
    refused = [f"{box.name} ({box.dtype})" for box in boxes if box.dtype not in DTYPES]
    if refused:
        raise UnsupportedState(f"safetensors has no form for {', '.join(refused)} (convert them before saving)")
    return boxes


def _header(boxes: Iterable[Box], scalars: Mapping[str, Any]) -> bytes:
    """Length and JSON, padded with spaces so that the data begins at a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"scalars": json.dumps(scalars, sort_keys=True)}}
    end = 0
    for box in boxes:
        shape, place = list(box.global_shape), [end, end + box.size]
        entries[box.name] = {"dtype": DTYPES[box.dtype], "shape": shape, "data_offsets": place}
        end += box.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _fill(
    path: Path,
    header: bytes,
    boxes: Sequence[Box],
    parts: Sequence[Part],
    sources: Mapping[int, Sequence[Source]],
    on_corrupt: Callable[[CorruptChunk], None],
) -> dict[str, int]:
    size = len(header) + sum(box.size for box in boxes)
    with path.open("w+b") as file:
        # A full disk must be an error here, not a SIGBUS while the mapping is written.
        os.posix_fallocate(file.fileno(), 0, size)
        # Not closed by hand: an error's traceback may still hold views of it. It is unmapped with the last of them.
        mapped = mmap.mmap(file.fileno(), size)
        mapped[: len(header)] = header
        buffers = _buffers(memoryview(mapped)[len(header) :], boxes)
        counted = read_state(parts, buffers, sources, on_corrupt=on_corrupt)
        mapped.flush()
        os.fsync(file.fileno())
    return counted


def _buffers(view: memoryview, boxes: Iterable[Box]) -> dict[Box, memoryview]:
    """Each box's run of the file."""
    buffers: dict[Box, memoryview] = {}
    start = 0
    for box in boxes:
        buffers[box] = view[start : start + box.size]
        start += box.size
    return buffers
