"""What a checkpoint is made of: boxes of tensors, laid out in parts, cut into chunks, named by a manifest.

A rank's *part* is one run of bytes (its *stream*): the rank's boxes one after the other, each starting at a multiple of
ALIGNMENT. The stream is cut into chunks (`checkpoint.cut`), each named by the BLAKE3 hash of its bytes. The same part
description serves shared memory, a peer's memory and every store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

ALIGNMENT = 64
CHUNK_BYTES = 8 * 2**20
RECORD_WINDOW = 64
"""Step records a part carries along, so that a peer's copy also proves which samples led to it."""

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16, "complex32": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A rectangular piece of one named tensor. All tuples have the tensor's rank (empty for a 0-d tensor)."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the box, stored densely in row-major order of `lengths`."""
        return math.prod(self.lengths) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """A box and where it lies in its part's stream (bytes)."""

    box: Box
    at: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of a part's stream: `id` is the hex BLAKE3 of its `size` bytes at offset `at`.

    folder  in a store: the save that put the bytes there (`repository.layout.save_folder`), with "<job>/" before it when
            it was another job's; empty while in memory only
    """

    id: str
    at: int
    size: int
    folder: str = ""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one rank did in one step: the samples it used and what it logged.

    ranges   half-open runs [first, last) of places in the job's global sample stream, in the order used; windows that are
             left out (`model.data`) have no places
    digest   hex BLAKE2b-8 over the dataset indices handed to the program, 8 bytes little-endian each
    took_s   seconds between this step's start and its end on this rank
    arrived_s   seconds from its start until this rank had all gradients of its own, and had but to wait for the others'; None:
             not known, or no measure of this rank, as ranks have unequal shares
    """

    attempt: int
    step: int
    rank: int
    world: int
    ranges: tuple[tuple[int, int], ...]
    digest: str
    took_s: float
    logs: dict[str, float] = field(default_factory=dict)
    arrived_s: float | None = None
    skipped: str = ""
    """Why the optimizers' step was skipped on all ranks, so that these samples taught nothing; empty: it was not. "state":
    what forward computes along (statistics of a batch norm) is spoilt as well."""
    state_hash: str = ""
    """`<shard>:<hash>` of the parameters after the step (`train.parameter_hash`); empty where none was due."""


@dataclass(frozen=True, slots=True, order=True)
class VersionId:
    """One checkpoint of a job: the state after `step` steps, taken in `attempt`. Attempts are never numbered twice."""

    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's share of a version. `size` is the stream's length in bytes; `chunks` cover it without gap.

    scalars  JSON leaves of the state (numbers, strings, lists), name -> value; only rank 0's part has them
    """

    version: VersionId
    rank: int
    world: int
    size: int
    shards: tuple[Shard, ...]
    chunks: tuple[Chunk, ...]
    scalars: dict[str, Any] = field(default_factory=dict)
    records: tuple[StepRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class PartRef:
    """A part as an object in a store: `digest` is the hex BLAKE3 of the object's bytes.

    base    digest of a part list of the checkpoint whose chunks this one reuses; empty when it was put whole
    """

    rank: int
    key: str
    digest: str
    size: int
    base: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The immutable list that *is* a checkpoint. `position` counts samples consumed since the job began.

    term        fencing number of the supervisor that committed it
    created_at  UTC seconds
    """

    format: int
    job: str
    term: int
    version: VersionId
    world: int
    position: int
    parts: tuple[PartRef, ...]
    created_at: float


@dataclass(frozen=True, slots=True)
class Held:
    """A part that a node agent holds: in memory, its own rank's (`own`) or a peer's copy; or on its local disk."""

    node: str
    version: VersionId
    rank: int
    world: int
    size: int
    own: bool
    disk: bool = False


def align(offset: int, to: int = ALIGNMENT) -> int:
    """The next multiple of `to` at or after `offset` (bytes)."""
    return -(-offset // to) * to
