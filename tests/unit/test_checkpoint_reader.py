"""Reading: good copies are used, bad ones reported, and nothing is passed off as whole that is not."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import pytest
from blake3 import blake3

from ray_dr.checkpoint import reader
from ray_dr.checkpoint.export import export_safetensors
from ray_dr.checkpoint.reader import MemorySource, StoreSource, read_state
from ray_dr.checkpoint.restore_plan import build_index, compare, plan_restore
from ray_dr.checkpoint.save_plan import plan_save, replicated, whole
from ray_dr.errors import CheckpointError, CopiesAway, CorruptChunk, UnsupportedState
from ray_dr.model.checkpoint import Chunk, Part, VersionId
from ray_dr.repository.layout import chunk_key
from ray_dr.stores.memory import MemoryStore

NAMES = {"a": (5, 3), "b": (), "c": (200,)}


def saved(dtype: str = "int32") -> tuple[Part, bytearray]:
    plan = plan_save([replicated(n, dtype, s, rank=0, world=1) for n, s in NAMES.items()], rank=0, world=1)
    stream = bytearray(i * 7 % 251 for i in range(plan.size))
    runs = [(at, stream[at : at + 100]) for at in range(0, plan.size, 100)]
    chunks = tuple(Chunk(blake3(run).hexdigest(), at, len(run)) for at, run in runs)
    return Part(VersionId(1, 5), 0, 1, plan.size, plan.shards, chunks, {"lr": 0.5}), stream


def buffers(part: Part) -> dict:
    return {shard.box: memoryview(bytearray(shard.box.size)) for shard in part.shards}


def expect_equal(part: Part, stream: bytearray, found: dict) -> None:
    for shard in part.shards:
        assert bytes(found[shard.box]) == bytes(stream[shard.at : shard.at + shard.box.size])


@dataclass(frozen=True)
class Gone:
    """A copy on a node that went away."""

    asked: list[int]
    name: str = "peer 10.0.0.9"
    kind: str = "peer"

    def read(self, rank: int, start: int, into: memoryview) -> None:
        self.asked.append(start)
        raise ConnectionResetError("gone")


def test_a_corrupt_chunk_is_reported_and_read_from_the_next_copy() -> None:
    part, stream = saved()
    bad = bytearray(stream)
    bad[150] ^= 1
    reports: list[CorruptChunk] = []
    found = buffers(part)
    sources = {0: [MemorySource(memoryview(bad)), MemorySource(memoryview(stream), "peer x", "peer")]}
    counted = read_state(part_list := [part], found, sources, on_corrupt=reports.append)
    expect_equal(part_list[0], stream, found)
    assert [(error.chunk, error.source) for error in reports] == [(part.chunks[1].id, "own memory")]
    assert counted == {"memory": part.size - 100, "peer": 100}


def test_a_source_that_fails_is_asked_last_from_then_on() -> None:
    part, stream = saved()
    gone = Gone([])
    told: list[str] = []
    found = buffers(part)
    read_state([part], found, {0: [gone, MemorySource(memoryview(stream))]}, threads=1,
               on_corrupt=pytest.fail, on_unreadable=lambda source, error: told.append(source.name))  # fmt: skip
    expect_equal(part, stream, found)
    assert len(gone.asked) == 1
    assert told == ["peer 10.0.0.9"]


def test_no_good_copy_is_an_error_that_names_every_try() -> None:
    part, stream = saved()
    stream[0] ^= 1
    with pytest.raises(CopiesAway, match=r"no good copy.*own memory.*peer 10\.0\.0\.9"):
        read_state([part], buffers(part), {0: [MemorySource(memoryview(stream)), Gone([])]}, on_corrupt=lambda e: None)
    with pytest.raises(CheckpointError) as caught:
        read_state([part], buffers(part), {0: [MemorySource(memoryview(stream))]}, on_corrupt=lambda e: None)
    assert not isinstance(caught.value, CopiesAway), "what is damaged everywhere won't come back"


def test_no_source_at_all_is_an_error() -> None:
    part, _ = saved()
    with pytest.raises(CheckpointError, match="no source"):
        read_state([part], buffers(part), {}, on_corrupt=pytest.fail)


def test_chunks_of_a_store_fill_the_state() -> None:
    part, stream = saved()
    part = replace(part, chunks=tuple(replace(chunk, folder="000001-000000000005-000001") for chunk in part.chunks))
    store = MemoryStore()
    for chunk in part.chunks:
        store.put(chunk_key("j", chunk), bytes(stream[chunk.at : chunk.at + chunk.size]))
    found = buffers(part)
    sources = {0: [StoreSource(store, "j", part)]}
    assert read_state([part], found, sources, on_corrupt=pytest.fail) == {"store": part.size}
    expect_equal(part, stream, found)
    across = memoryview(bytearray(150))
    StoreSource(store, "j", part).read(0, 60, across)
    assert bytes(across) == bytes(stream[60:210])


def test_a_missing_part_is_an_error_before_anything_is_read() -> None:
    leaves = [[replicated("w", "int8", (8,), rank=rank, world=2)] for rank in range(2)]
    plan = plan_save(leaves[0], rank=0, world=2)
    part = Part(VersionId(1, 1), 0, 2, plan.size, plan.shards, ())
    with pytest.raises(CheckpointError, match=r"w\[0:8\]: the saved boxes cover 4 of 8 bytes"):
        plan_restore([part], [whole("w", "int8", (8,))])


def test_differences_name_both_sides() -> None:
    part, _ = saved()
    wanted = [whole("a", "int32", (5, 4)), whole("b", "int64", ()), whole("d", "int8", (2,))]
    assert compare(build_index([part]), wanted) == (
        "d: the program wants int8[2], the checkpoint does not have it",
        "c: the checkpoint has int32[200], the program does not want it",
        "a: shape [5, 3] in the checkpoint, [5, 4] in the program",
        "b: dtype int32 in the checkpoint, int64 in the program",
    )


def test_the_exported_file_holds_every_tensor_and_the_scalars(tmp_path: Path) -> None:
    part, stream = saved()
    sources = {0: [MemorySource(memoryview(stream))]}
    export_safetensors(tmp_path / "x.safetensors", [part], sources, on_corrupt=pytest.fail)
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["scalars"]) == {"lr": 0.5}
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == NAMES
    for shard in part.shards:
        first, last = header[shard.box.name]["data_offsets"]
        assert data[8 + length + first : 8 + length + last] == bytes(stream[shard.at : shard.at + shard.box.size])
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_export_refuses_by_name_what_the_format_lacks_and_leaves_no_file(tmp_path: Path) -> None:
    part, stream = saved("complex64")
    with pytest.raises(UnsupportedState, match=r"a \(complex64\)"):
        export_safetensors(tmp_path / "x", [part], {0: [MemorySource(memoryview(stream))]}, on_corrupt=pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_no_file(tmp_path: Path) -> None:
    part, _ = saved()
    with pytest.raises(CheckpointError):
        export_safetensors(tmp_path / "x", [part], {}, on_corrupt=pytest.fail)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Scattered(MemorySource):
    """Memory that tells how many places it was asked to fill at once."""

    places: list[int] = field(default_factory=list)

    def read_each(self, rank: int, start: int, into: Sequence[memoryview]) -> None:
        self.places.append(len(into))
        super().read_each(rank, start, into)


def test_a_chunk_of_several_tensors_is_read_straight_into_them_and_a_bad_one_is_replaced_in_all() -> None:
    part, stream = saved()
    bad = bytearray(stream)
    bad[70] ^= 1  # in the second of the first chunk's tensors
    first = Scattered(memoryview(bad))
    reports: list[CorruptChunk] = []
    found = buffers(part)
    sources = {0: [first, MemorySource(memoryview(stream), "peer x", "peer")]}
    assert read_state([part], found, sources, on_corrupt=reports.append) == {"memory": part.size - 100, "peer": 100}
    expect_equal(part, stream, found)
    assert [error.chunk for error in reports] == [part.chunks[0].id]
    assert max(first.places) > 2, "tensors, and the gaps between them"


def test_a_chunk_of_which_little_is_wanted_is_read_into_a_buffer_and_nowhere_else() -> None:
    size = 3 * reader.GAP_BYTES
    plan = plan_save([replicated(name, "int8", (size,), rank=0, world=1) for name in "abc"], rank=0, world=1)
    stream = bytearray(range(256)) * (plan.size // 256)
    part = Part(VersionId(1, 5), 0, 1, plan.size, plan.shards, (Chunk(blake3(stream).hexdigest(), 0, plan.size),))
    source = Scattered(memoryview(stream))
    found = {part.shards[1].box: memoryview(bytearray(size))}
    assert read_state([part], found, {0: [source]}, on_corrupt=pytest.fail) == {"memory": plan.size}
    at = part.shards[1].at
    assert bytes(found[part.shards[1].box]) == bytes(stream[at : at + size])
    assert source.places == []


def test_only_a_chunk_found_good_under_its_very_name_is_copied_unhashed() -> None:
    part, stream = saved()
    torn = bytearray(stream)
    torn[150] ^= 1
    good = {part.chunks[0].at: part.chunks[0].id, part.chunks[1].at: part.chunks[2].id, 3: part.chunks[3].id}
    reports: list[CorruptChunk] = []
    sources = {0: [MemorySource(memoryview(torn), good=good), MemorySource(memoryview(stream), "peer x", "peer")]}
    found = buffers(part)
    read_state([part], found, sources, on_corrupt=reports.append)
    expect_equal(part, stream, found)
    assert [error.chunk for error in reports] == [part.chunks[1].id]


def test_what_was_found_good_but_lies_beyond_the_memory_is_read_from_the_next_copy() -> None:
    part, stream = saved()
    good = {chunk.at: chunk.id for chunk in part.chunks}
    short = MemorySource(memoryview(stream)[:150], good=good)
    found = buffers(part)
    counted = read_state([part], found, {0: [short, MemorySource(memoryview(stream), "peer x", "peer")]},
                         on_corrupt=pytest.fail)  # fmt: skip
    expect_equal(part, stream, found)
    assert counted == {"memory": 100, "peer": part.size - 100}


@dataclass(frozen=True)
class Together:
    """A copy that answers when as many ask as should."""

    buffer: memoryview
    asked: threading.Barrier
    kind: str
    name: str = "slow"

    def read(self, rank: int, start: int, into: memoryview) -> None:
        if start < self.asked.parties * 100:
            self.asked.wait(60)
        into[:] = self.buffer[start : start + len(into)]


@pytest.mark.parametrize("kind", ["peer", "store"])
def test_a_source_that_waits_for_others_is_asked_by_more_threads(kind: str) -> None:
    part, stream = saved()
    count = reader.THREADS[kind]
    assert len(part.chunks) > count > reader.THREADS["memory"]
    found = buffers(part)
    read_state([part], found, {0: [Together(memoryview(stream), threading.Barrier(count), kind)]}, on_corrupt=pytest.fail)
    expect_equal(part, stream, found)


def test_every_kind_of_source_has_its_threads() -> None:
    assert set(reader.THREADS) == set(get_args(reader.Kind))
