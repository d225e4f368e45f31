"""Checkpoints of other formats into the repository: safetensors, `torch.save`'s files, torch's distributed checkpoints.

Each is turned into the same description, a `Foreign`: which bytes of which file are which piece of which tensor. Then
its bytes are copied, piece by piece, through a bounded amount of memory. Pickles are read elsewhere (`foreign_pickle`),
in a process of their own; what it answers is as little trusted here as the files are.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_dr.checkpoint.cut import clear_gaps, place
from ray_dr.checkpoint.direct import DirectJob
from ray_dr.checkpoint.export import DTYPES
from ray_dr.checkpoint.memory import Pool
from ray_dr.checkpoint.nested import tensors_in
from ray_dr.checkpoint.save_plan import whole
from ray_dr.errors import CheckpointError
from ray_dr.model.checkpoint import DTYPE_BYTES, Box, Manifest, Part, PartRef, Shard, VersionId

PART_BYTES = 2**30
"""A foreign checkpoint is cut into parts of at most this size (or one row), so this is the memory it takes."""
INVENTORY_S = 120.0
HEADER_MAX_BYTES = 100 * 10**6
SAFETENSORS = {name: dtype for dtype, name in DTYPES.items()} | {
    "C64": "complex64", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: its first element lies at byte `at` of `file`; `strides` in bytes."""

    box: Box
    file: Path
    at: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A checkpoint as it lies in files of another format: the pieces of each tensor, and JSON values by object."""

    path: Path
    pieces: Mapping[str, tuple[Piece, ...]]
    scalars: Mapping[str, Any]

    @property
    def tensors(self) -> tuple[Box, ...]:
        """All tensors, whole, in order of name."""
        firsts = (self.pieces[name][0].box for name in sorted(self.pieces))
        return tuple(whole(box.name, box.dtype, box.global_shape) for box in firsts)


def open_foreign(path: Path) -> Foreign:
    """What a file or folder holds. Raises CheckpointError, saying what is wrong with it."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    path = path.absolute()
    try:
        files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
        found = _open_torch(path) if not files or (path / ".metadata").exists() else _open_safetensors(path, files)
        _check(found)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: it is damaged ({type(error).__name__}: {error})") from error
    return found


def import_foreign(found: Foreign, job: DirectJob, step: int | None) -> Manifest:
    """Put a foreign checkpoint into a job as its newest version. Raises CheckpointError, StoreError."""
    plans = plan_parts(found.tensors, PART_BYTES)
    opening = job.begin(step)
    refs: list[PartRef] = []
    pool = Pool.create(max(1, *(size for _, size in plans)))
    try:
        with _Files() as files:
            for rank, (shards, size) in enumerate(plans):
                clear_gaps(shards, pool.view)
                for shard in shards:
                    fill(shard.box, found.pieces[shard.box.name], pool.view[shard.at : shard.at + shard.box.size], files)
                scalars = dict(found.scalars) if rank == 0 else {}
                part = Part(VersionId(0, 0), rank, len(plans), size, shards, (), scalars)
                refs.append(job.put(opening, part, pool.view[:size]).ref)
    finally:
        pool.close()
    return job.commit(opening, refs)


def plan_parts(tensors: Sequence[Box], limit: int) -> list[tuple[tuple[Shard, ...], int]]:
    """(shards, size) of parts of at most `limit` bytes each, or of a single row that is longer. At least one part."""
    parts: list[tuple[tuple[Shard, ...], int]] = []
    shards: list[Shard] = []
    end, run = 0, None
    for box in (piece for tensor in tensors for piece in _cut(tensor, limit)):
        at, run = place(end, run, box.size)
        if shards and at + box.size > limit:
            parts.append((tuple(shards), end))
            shards = []
            at, run = place(0, None, box.size)
        shards.append(Shard(box, at))
        end = at + box.size
    return [*parts, (tuple(shards), end)]


def fill(box: Box, pieces: Sequence[Piece], into: memoryview, files: _Files) -> None:
    """A box's bytes from the pieces of its tensor. Raises CheckpointError when they do not cover it."""
    if not box.size:
        return
    kind = np.dtype(f"V{DTYPE_BYTES[box.dtype]}")
    target: np.ndarray[Any, Any] = np.ndarray(box.lengths, kind, into)
    covered = 0
    for piece in pieces:
        low = tuple(map(max, box.offsets, piece.box.offsets))
        high = tuple(min(a + n, b + m) for a, n, b, m in
                     zip(box.offsets, box.lengths, piece.box.offsets, piece.box.lengths, strict=True))  # fmt: skip
        if any(last <= first for first, last in zip(low, high, strict=True)):
            continue
        try:
            source: np.ndarray[Any, Any]
            source = np.ndarray(piece.box.lengths, kind, files.open(piece.file), piece.at, piece.strides)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{piece.file}: it ends before the bytes of {box.name} ({error})") from error
        target[_slices(low, high, box)] = source[_slices(low, high, piece.box)]
        covered += math.prod(last - first for first, last in zip(low, high, strict=True))
    if covered != math.prod(box.lengths):
        raise CheckpointError(f"{box.name}: its pieces cover {covered} of {math.prod(box.lengths)} elements")


class _Files:
    """Files that are mapped, each once. Unmapped with the last array of them."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()

    def open(self, path: Path) -> mmap.mmap:
        """The file's bytes. Raises CheckpointError."""
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: it cannot be read ({error})") from error
        return self._maps[path]


def _slices(low: Sequence[int], high: Sequence[int], box: Box) -> tuple[slice, ...]:
    return tuple(slice(a - at, b - at) for a, b, at in zip(low, high, box.offsets, strict=True))


def _cut(box: Box, limit: int) -> Iterator[Box]:
    """A whole tensor as boxes of at most `limit` bytes, cut along dim 0."""
    if box.size <= limit or not box.lengths:
        yield box
        return
    rows = box.lengths[0]
    most = max(1, limit // (box.size // rows))
    for first in range(0, rows, most):
        count = min(most, rows - first)
        yield replace(box, offsets=(first, *box.offsets[1:]), lengths=(count, *box.lengths[1:]))


def _check(found: Foreign) -> None:
    for name, pieces in found.pieces.items():
        if not isinstance(name, str) or not pieces:
            raise ValueError(f"{name!r} has no pieces")
        for piece in pieces:
            box = piece.box
            counts = (*box.global_shape, *box.offsets, *box.lengths, piece.at, *piece.strides)
            if not all(type(count) is int and count >= 0 for count in counts) or box.dtype not in DTYPE_BYTES:
                raise ValueError(f"{name} is described by something else than counts and a dtype")
            if not len(box.global_shape) == len(box.offsets) == len(box.lengths) == len(piece.strides):
                raise ValueError(f"{name} has pieces of another rank")
            if any(at + n > most for at, n, most in zip(box.offsets, box.lengths, box.global_shape, strict=True)):
                raise ValueError(f"{name} has pieces outside of it")
    if absent := set(tensors_in(dict(found.scalars))) - found.pieces.keys():
        raise ValueError(f"{min(absent)} is referred to and not there")


def _open_safetensors(path: Path, files: Sequence[Path]) -> Foreign:
    """The file, or all files of the folder, that `path` is."""
    pieces: dict[str, tuple[Piece, ...]] = {}
    scalars: dict[str, Any] = {}
    for file in files:
        found = _read_header(file)
        if twice := pieces.keys() & found.pieces.keys():
            raise ValueError(f"{min(twice)} is in more than one file")
        pieces.update(found.pieces)
        scalars.update(found.scalars)
    return Foreign(path, pieces, scalars)


def _read_header(path: Path) -> Foreign:
    """https://github.com/huggingface/safetensors#format. A file of ours says in `scalars` which objects it holds; the
    tensors of any other become the object `model`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_MAX_BYTES, os.fstat(file.fileno()).st_size):
            raise ValueError("its header is longer than a header can be")
        header = json.loads(file.read(length))
    extra = header.pop("__metadata__", {})
    prefix = "" if "scalars" in extra else "model/"
    pieces = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS:
            raise CheckpointError(f"{path}: {name} is of {entry['dtype']}, which the repository has no form for")
        box = whole(prefix + name, SAFETENSORS[entry["dtype"]], tuple(entry["shape"]))
        first, last = entry["data_offsets"]
        if last - first != box.size:
            raise ValueError(f"{name} has {last - first} bytes, not {box.size}")
        pieces[box.name] = (Piece(box, path, 8 + length + first, _dense(box)),)
    return Foreign(path, pieces, json.loads(extra.get("scalars", "{}")))


def _dense(box: Box) -> tuple[int, ...]:
    item = DTYPE_BYTES[box.dtype]
    return tuple(math.prod(box.lengths[dim + 1 :]) * item for dim in range(len(box.lengths)))


def _open_torch(path: Path) -> Foreign:
    inventory = read_inventory(path)
    folder = path if path.is_dir() else path.parent
    pieces = {name: tuple(_piece(name, entry, piece, folder) for piece in entry["pieces"])
              for name, entry in inventory["tensors"].items()}  # fmt: skip
    return Foreign(path, pieces, _without_modules(inventory["scalars"]))


def _piece(name: str, entry: Mapping[str, Any], piece: Mapping[str, Any], folder: Path) -> Piece:
    if Path(piece["file"]).name != piece["file"]:
        raise ValueError(f"{name} lies in {piece['file']!r}, outside of the folder")
    box = Box(name, entry["dtype"], tuple(entry["shape"]), tuple(piece["offsets"]), tuple(piece["lengths"]))
    item = DTYPE_BYTES[box.dtype]
    at = piece["at"] + piece["element"] * item
    return Piece(box, folder / piece["file"], at, tuple(stride * item for stride in piece["strides"]))


def _without_modules(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Without the objects that are nothing but tensors: those are stored as a module is."""
    return {
        name: value for name, value in scalars.items()
        if value != {key: {"$tensor": f"{name}/{key}"} for key in (value if isinstance(value, dict) else ())}
        or not value
    }  # fmt: skip


def read_inventory(path: Path, *, limit_s: float = INVENTORY_S) -> dict[str, Any]:
    """What a file with pickles in it holds, as told by a process that runs nothing of it and ends after `limit_s`.

    Raises CheckpointError with its reason for refusing.
    """
    program = Path(__file__).with_name("foreign_pickle.py")
    try:
        done = subprocess.run([sys.executable, "-I", "-S", str(program), str(path)], stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=limit_s, env={}, cwd="/", check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{path}: reading it took more than {limit_s:g} s, so it was given up") from error
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise CheckpointError(f"{path}: reading it ended with status {done.returncode} ({last[:300]})") from error
    if "refused" in found:
        raise CheckpointError(f"{path}: {found['refused']}")
    return found
