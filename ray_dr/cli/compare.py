"""Two checkpoints side by side, byte by byte, each read from its own store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_dr.checkpoint.reader import read_state
from ray_dr.checkpoint.restore_plan import build_index
from ray_dr.cli.stored import StoredJob
from ray_dr.errors import CorruptChunk
from ray_dr.model.checkpoint import Box, Manifest

DIFFERENCES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was compared, and in words what differs.

    tensors, scalars   how many names; size: bytes of all tensors of one side
    """

    tensors: int
    scalars: int
    size: int
    differences: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every byte is the same, and there was something to compare."""
        return self.tensors > 0 and not self.differences


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint's tensors as dense row-major bytes, and its other values."""

    tensors: dict[str, tuple[Box, bytes]]
    scalars: dict[str, Any]


def read_checkpoint(job: StoredJob, manifest: Manifest) -> Contents:
    """All of a checkpoint, each chunk verified. Raises CheckpointError when something has no good copy."""
    parts = job.parts(manifest)
    index = build_index(parts)
    boxes = [index.box(name) for name in index.shards]
    buffers = {box: bytearray(box.size) for box in boxes}
    views = {box: memoryview(buffer) for box, buffer in buffers.items()}
    sources = {part.rank: [job.source(part)] for part in parts}
    read_state(parts, views, sources, on_corrupt=_ignore)
    scalars = {name: value for part in parts for name, value in part.scalars.items()}
    return Contents({box.name: (box, bytes(buffer)) for box, buffer in buffers.items()}, scalars)


def compare(left: Contents, right: Contents) -> Comparison:
    """What differs between two checkpoints, name by name."""
    names = sorted(left.tensors.keys() | right.tensors.keys())
    found = [text for name in names if (text := _tensor_difference(name, left, right))]
    keys = sorted(left.scalars.keys() | right.scalars.keys())
    found += [f"{name}: the values differ" for name in keys if left.scalars.get(name) != right.scalars.get(name)]
    size = sum(len(data) for _, data in left.tensors.values())
    return Comparison(len(names), len(keys), size, tuple(found[:DIFFERENCES_SHOWN]))


def _tensor_difference(name: str, left: Contents, right: Contents) -> str:
    if name not in left.tensors or name not in right.tensors:
        return f"{name}: only in the {'first' if name in left.tensors else 'second'}"
    (box, mine), (other, theirs) = left.tensors[name], right.tensors[name]
    if (box.dtype, box.global_shape) != (other.dtype, other.global_shape):
        return f"{name}: {box.dtype}{list(box.global_shape)} and {other.dtype}{list(other.global_shape)}"
    if mine != theirs:
        count = sum(a != b for a, b in zip(mine, theirs, strict=True))
        return f"{name}: {count} of {len(mine)} bytes differ"
    return ""


def _ignore(_: CorruptChunk) -> None:
    """A chunk without a good copy raises; here is one copy only."""
