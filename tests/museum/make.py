"""Makes the museum: small repositories with what is in them, to be read by every later version of ray_dr and by rescue.py.

    python -m tests.museum.make FOLDER        one directory per piece: `store` and `expected.json`

tests/museum/format-1 was made so and is never made again: a change of the format adds a folder beside it. The expected
values are written down from what was saved, not from what is read. A piece's tensors are hashes of their names.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray_dr.checkpoint.save_plan import Leaf, plan_save, replicated
from ray_dr.model.checkpoint import DTYPE_BYTES, Box, Chunk, Manifest, Part, StepRecord, VersionId
from ray_dr.repository.chunks import KnownChunks, chunk_id
from ray_dr.repository.commit import CheckpointEntry, CommitLog, encode
from ray_dr.repository.layout import log_key
from ray_dr.repository.prune import sweep
from ray_dr.repository.saving import save_part
from ray_dr.stores.base import Store
from ray_dr.stores.disk import FileStore


@dataclass(frozen=True, slots=True)
class Tensor:
    """`columns`: its ranks hold columns of it; else all of it, and each saves some rows."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    columns: bool = False


State = Mapping[str, Tensor]
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128", "complex32",
)  # fmt: skip


@dataclass(slots=True)
class Job:
    """A job that is being written, and what must be read of it: "attempt-step" -> tensors and scalars."""

    store: Store
    name: str
    chunk_bytes: int
    expected: dict[str, Any] = field(default_factory=dict)
    term: int = 0

    def take(self) -> None:
        """A supervisor takes the job."""
        self.term = CommitLog(self.store, self.name).take_term("museum", 1000.0)

    def save(self, attempt: int, step: int, state: State, *, world: int = 1, scalars: Any = None) -> Manifest:
        """Put every rank's part; the manifest to commit."""
        version = VersionId(attempt, step)
        log, refs = CommitLog(self.store, self.name), []
        for rank in range(world):
            plan = plan_save(
                [_leaf(name, tensor, rank, world) for name, tensor in state.items()], rank=rank, world=world
            )
            stream = bytearray(b"\xee" * plan.size)
            for shard in plan.shards:
                stream[shard.at : shard.at + shard.box.size] = _cut(state[shard.box.name], shard.box)
            runs = [(at, stream[at : at + self.chunk_bytes]) for at in range(0, plan.size, self.chunk_bytes)]
            chunks = tuple(Chunk(chunk_id(run), at, len(run)) for at, run in runs)
            record = StepRecord(attempt, step, rank, world, ((rank, rank + 1),), "00" * 8, 0.5, {"loss": float("nan")})
            part = Part(
                version, rank, world, plan.size, plan.shards, chunks, (scalars or {}) if rank == 0 else {}, (record,)
            )
            saved = save_part(self.store, log, self.name, part, memoryview(stream), term=self.term, known=KnownChunks())
            refs.append(saved.ref)
        return Manifest(1, self.name, self.term, version, world, 8 * step, tuple(refs), 1000.0 + step)

    def commit(self, attempt: int, step: int, state: State, *, world: int = 1, scalars: Any = None) -> Manifest:
        """A checkpoint."""
        manifest = self.save(attempt, step, state, world=world, scalars=scalars)
        CommitLog(self.store, self.name).commit(manifest)
        tensors = {
            name: [tensor.dtype, list(tensor.shape), tensor.data.hex()] for name, tensor in sorted(state.items())
        }
        self.expected[f"{attempt}-{step}"] = {"tensors": tensors, "scalars": scalars or {}}
        return manifest

    def prune(self, keep_last: int) -> None:
        """Drop what is older, also from what is expected."""
        log = CommitLog(self.store, self.name)
        seen = log.refresh()
        kept = seen.checkpoints[-keep_last:]
        assert log.keep(kept, term=self.term, seen=seen)
        sweep(self.store, self.name, kept)
        self.expected = dict(list(self.expected.items())[-keep_last:])


def tensor(seed: str, dtype: str, *shape: int, columns: bool = False) -> Tensor:
    """Any bits that the dtype may have."""
    data = hashlib.shake_128(f"{seed} {dtype}".encode()).digest(math.prod(shape) * DTYPE_BYTES[dtype])
    return Tensor(dtype, shape, bytes(byte & 1 for byte in data) if dtype == "bool" else data, columns)


def dtypes(store: Store) -> Sequence[Job]:
    """Every dtype; NaN payloads, tensors without elements and without dimensions, names that are no file names."""
    job = Job(store, "all-dtypes", 3000)
    job.take()
    state = {dtype: tensor("any", dtype, 3, 5) for dtype in DTYPES}
    payloads = bytes.fromhex("0100807f 010080ff 0000c0ff efbeed7f 00000080")
    state |= {"nan payloads": Tensor("float32", (5,), payloads), "empty": Tensor("float64", (0, 3), b"")}
    state |= {"0-d": tensor("0-d", "int64"), "tree": tensor("tree", "uint8", 5000)}
    names = ("../../up", "/absolute", ".hidden", "a/b\\c:d", "größe-大", "x" * 300)
    state |= {name: tensor(name, "bfloat16", 2, 3) for name in names}
    job.commit(1, 7, state, scalars={"lr": 0.5, "größe": {"$tuple": [1, {"$float": "nan"}]}, "none": None})
    plain = Job(store, "plain-dtypes", 256)
    plain.take()
    left_out = ("complex", "fnuz")
    plain.commit(1, 7, {name: value for name, value in state.items() if not any(part in name for part in left_out)})
    return job, plain


def elastic(store: Store) -> Sequence[Job]:
    """Three attempts of 2, 3 and 1 workers by two supervisors; what the first one still did after that counts for nothing."""
    job = Job(store, "elastic", 512)
    job.take()
    for attempt, step, world in ((1, 4, 2), (1, 8, 2), (2, 6, 3)):
        job.commit(attempt, step, _mixed(f"{attempt}-{step}"), world=world, scalars={"steps": step})
    stale = job.save(2, 9, _mixed("stale"), world=3)
    job.take()
    log = CommitLog(store, job.name)
    store.put(log_key(job.name, log.refresh().tail + 1), encode(CheckpointEntry(stale)), if_absent=True)
    job.commit(3, 8, _mixed("3-8"), scalars={"steps": 8})
    job.save(3, 12, _mixed("not committed"))
    return (job,)


def incremental(store: Store) -> Sequence[Job]:
    """A frozen base under an adapter, whose checkpoints reuse the base's chunks; old ones were pruned. And another job."""
    job, other = Job(store, "adapter", 256), Job(store, "other", 256)
    job.take()
    base = {"base/weight": tensor("base", "float16", 40, 16)}
    for step in range(1, 6):
        job.commit(1, step, {**base, "adapter/a": tensor(f"a{step}", "float32", 4, 16)})
        if step == 3:
            job.prune(2)
    job.prune(3)
    other.take()
    other.commit(1, 2, {**base, "adapter/a": tensor("other", "float32", 4, 16)})
    return job, other


def training(store: Store) -> Sequence[Job]:
    """A module, its optimizer and its scheduler, as ctx.restore keeps them."""
    import torch

    from ray_dr.train.state import bytes_of, flatten

    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2, dtype=torch.float32)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    job = Job(store, "training", 512)
    job.take()
    for step in range(1, 4):
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        flat = flatten({"model": model, "optimizer": optimizer, "scheduler": scheduler}, rank=0, world=1)
        found = {name: (local.leaf, bytes(bytes_of(local.tensor))) for name, local in flat.tensors.items()}
        state = {name: Tensor(leaf.dtype, leaf.global_shape, data) for name, (leaf, data) in found.items()}
        job.commit(1, step, state, scalars=json.loads(json.dumps(flat.scalars)))
    return (job,)


PIECES: Mapping[str, Callable[[Store], Sequence[Job]]] = {
    "dtypes": dtypes, "elastic": elastic, "incremental": incremental, "training": training,
}  # fmt: skip


def make(folder: Path) -> None:
    """All pieces, below a new folder."""
    for name, piece in PIECES.items():
        (folder / name).mkdir(parents=True)
        jobs = piece(FileStore(folder / name / "store"))
        shutil.rmtree(folder / name / "store" / ".tmp")
        expected = {job.name: job.expected for job in jobs}
        (folder / name / "expected.json").write_text(json.dumps(expected, indent=0, sort_keys=True) + "\n")


def _mixed(seed: str) -> State:
    """Rows for all, columns, too few rows for all, and nothing at all."""
    return {
        "rows": tensor(seed + "rows", "float32", 11, 7), "columns": tensor(seed + "columns", "bfloat16", 6, 12, columns=True),
        "few": tensor(seed + "few", "int32", 2, 30), "none": Tensor("int8", (0,), b""), "step": tensor(seed, "int64"),
    }  # fmt: skip


def _leaf(name: str, tensor: Tensor, rank: int, world: int) -> Leaf:
    whole = replicated(name, tensor.dtype, tensor.shape, rank=rank, world=world)
    if not tensor.columns:
        return whole
    rows, columns = tensor.shape
    width = columns // world
    box = replace(whole.boxes[0], offsets=(0, rank * width), lengths=(rows, width))
    return Leaf(name, tensor.dtype, tensor.shape, (box,))


def _cut(tensor: Tensor, box: Box) -> bytes:
    """The bytes of a box: whole rows, or columns of rows."""
    if not box.lengths:
        return tensor.data
    row = len(tensor.data) // box.global_shape[0] if tensor.data else 0
    rows = [tensor.data[i * row : (i + 1) * row] for i in range(box.offsets[0], box.offsets[0] + box.lengths[0])]
    if not tensor.columns:
        return b"".join(rows)
    item = DTYPE_BYTES[tensor.dtype]
    return b"".join(line[box.offsets[1] * item : (box.offsets[1] + box.lengths[1]) * item] for line in rows)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
