"""Chunks, part lists and keys: what is read is what was written, or an error says which copy is bad."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ray_dr.errors import CorruptChunk, NotFound, StoreError
from ray_dr.model.checkpoint import Box, Chunk, Part, Shard, StepRecord, VersionId
from ray_dr.model.codec import to_json
from ray_dr.repository import layout
from ray_dr.repository.chunks import KnownChunks, chunk_id, get_chunk, put_chunk
from ray_dr.repository.parts import PLANS_KEPT, encode_part, read_part, write_part
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.telemetry.journal import segment_key

DATA = bytes(range(97))
ID = chunk_id(DATA)
FOLDER = layout.save_folder(VersionId(1, 10), 1)
CHUNK = Chunk(ID, at=0, size=len(DATA), folder=FOLDER)


def a_part(**changes: object) -> Part:
    shard = Shard(Box("w", "uint8", (97,), (0,), (97,)), at=0)
    record = StepRecord(1, 9, 0, 1, ((0, 32),), "ab", 0.25, {"loss": 1.5})
    part = Part(VersionId(1, 10), 0, 1, 97, (shard,), (CHUNK,), {"lr": 0.1, "seen": [1, 2]}, (record,))
    return replace(part, **changes)  # type: ignore[arg-type]


def test_keys_are_as_the_layout_says() -> None:
    version = VersionId(3, 1200)
    assert layout.log_key("j", 7) == "jobs/j/log/000000000007.json"
    part = layout.part_key("j", version, term=2, rank=4, digest=ID)
    assert part == f"jobs/j/parts/000003-000000001200-000002/r00004-{ID[:32]}.json"
    chunk = replace(CHUNK, folder=layout.save_folder(version, 2))
    assert layout.chunk_key("j", chunk) == f"jobs/j/chunks/000003-000000001200-000002/{ID}"
    assert layout.chunk_key("j", chunk).startswith(layout.chunks_prefix("j", chunk.folder))
    assert segment_key("j", 2, 5) == "jobs/j/journal/000002-00000005.jsonl"


def test_keys_are_read_back() -> None:
    version = VersionId(3, 1200)
    assert layout.log_seq(layout.log_key("j", 7)) == 7
    for key in (layout.part_key("j", version, term=2, rank=4, digest=ID), layout.chunk_key("j", CHUNK)):
        assert layout.folder_of(key) in (layout.save_folder(version, 2), FOLDER)
    assert layout.version_of(layout.part_key("j", version, term=2, rank=4, digest=ID)) == version
    assert layout.version_of(layout.chunk_key("j", CHUNK)) == VersionId(1, 10)
    assert layout.log_seq("jobs/j/log/x.json") is None
    assert layout.version_of("jobs/j/log/000000000007.json") is None
    assert layout.folder_of("jobs/j/log/000000000007.json") == ""


@pytest.mark.parametrize("job", ["", "a/b", "../a", "a..b", ".a", "a b", "x" * 129])
def test_a_job_name_that_would_leave_its_place_is_refused(job: str) -> None:
    with pytest.raises(StoreError):
        layout.log_key(job, 1)


def test_a_chunk_is_sent_once() -> None:
    store, known = FaultyStore(MemoryStore()), KnownChunks()
    assert put_chunk(store, "j", CHUNK, DATA, known=known)
    assert not put_chunk(store, "j", CHUNK, memoryview(DATA), known=known)
    assert len(store.calls) == 1
    assert get_chunk(store, "j", CHUNK) == DATA


def test_a_chunk_whose_put_failed_is_sent_again() -> None:
    store, known = FaultyStore(MemoryStore()), KnownChunks()
    store.fail("put")
    with pytest.raises(StoreError):
        put_chunk(store, "j", CHUNK, DATA, known=known)
    assert put_chunk(store, "j", CHUNK, DATA, known=known)


def test_a_damaged_copy_is_repaired_once_its_id_is_forgotten() -> None:
    store, known = FaultyStore(MemoryStore()), KnownChunks()
    store.flip("put", 5)
    put_chunk(store, "j", CHUNK, DATA, known=known)
    with pytest.raises(CorruptChunk) as caught:
        get_chunk(store, "j", CHUNK)
    assert caught.value.chunk == ID
    known.discard(layout.chunk_key("j", CHUNK))
    assert put_chunk(store, "j", CHUNK, DATA, known=known)
    assert get_chunk(store, "j", CHUNK) == DATA


def test_only_so_many_ids_are_remembered() -> None:
    known = KnownChunks(limit=2)
    for name in ("a", "b"):
        known.add(name)
    assert "a" in known
    known.add("c")
    assert [name in known for name in ("a", "b", "c")] == [True, False, True]


def test_every_truncated_or_flipped_byte_of_a_chunk_is_noticed() -> None:
    store = MemoryStore()
    for damaged in _damaged(DATA):
        store.put(layout.chunk_key("j", CHUNK), damaged)
        with pytest.raises(CorruptChunk):
            get_chunk(store, "j", CHUNK)


def test_a_missing_chunk_is_not_found() -> None:
    with pytest.raises(NotFound):
        get_chunk(MemoryStore(), "j", CHUNK)


def test_a_part_is_read_back_as_it_was_written() -> None:
    store = MemoryStore()
    ref = write_part(store, "j", a_part(), term=2)
    assert read_part(store, ref) == a_part()
    assert ref.size == len(store.get(ref.key))
    assert write_part(store, "j", a_part(), term=2) == ref


def test_a_part_is_never_overwritten_by_a_different_one() -> None:
    store = MemoryStore()
    ref = write_part(store, "j", a_part(), term=2)
    moved = replace(CHUNK, folder=layout.save_folder(VersionId(1, 5), 1))
    for other in (a_part(records=()), a_part(chunks=(moved,))):
        again = write_part(store, "j", other, term=2)
        assert again.key != ref.key
        assert read_part(store, again) == other
        assert read_part(store, ref) == a_part()
    assert write_part(store, "j", a_part(), term=3).key != ref.key


def test_a_list_is_sorted_json_whichever_plans_were_written_before() -> None:
    for number in [*range(2 * PLANS_KEPT), 0, 1]:
        shards = tuple(Shard(Box(f"w{n}", "uint8", (97,), (0,), (97,)), at=64 * n) for n in range(number))
        for step in (1, 2):
            part = a_part(shards=shards, version=VersionId(1, step))
            assert encode_part(part) == json.dumps(to_json(part), sort_keys=True, separators=(",", ":")).encode()


def test_every_truncated_or_flipped_byte_of_a_part_is_noticed() -> None:
    store = MemoryStore()
    ref = write_part(store, "j", a_part(), term=1)
    for damaged in _damaged(store.get(ref.key)):
        store.put(ref.key, damaged)
        with pytest.raises(CorruptChunk):
            read_part(store, ref)


def _damaged(data: bytes) -> list[bytes]:
    flipped = [data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :] for at in range(len(data))]
    return [data[:at] for at in range(len(data))] + flipped
