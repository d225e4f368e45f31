"""A small repository, and everything that can happen to one of its objects: it is noticed, or it is harmless.

For each damage, both a restore (the newest checkpoint, and each by its step) and `check` are asked. A restore gives the
right bytes or an error, never anything else; and where a restore gives an error, or a checkpoint is not there any more,
the check says that something is damaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pytest

from ray_dr.checkpoint import reader
from ray_dr.checkpoint.reader import read_state
from ray_dr.checkpoint.restore_plan import build_index
from ray_dr.checkpoint.save_plan import plan_save, replicated
from ray_dr.cli.stored import StoredJob
from ray_dr.errors import CorruptChunk, RayDrError
from ray_dr.model.checkpoint import Chunk, Manifest, Part, PartRef, VersionId
from ray_dr.model.job import Keep
from ray_dr.repository import check, commit, prune
from ray_dr.repository.chunks import KnownChunks, chunk_id, get_chunk
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.layout import chunk_key, folder_of, log_prefix, log_seq, parts_prefix
from ray_dr.repository.parts import read_part
from ray_dr.repository.saving import save_part
from ray_dr.stores.memory import MemoryStore

JOB = "j"
CUT = 64
STRIDE = 3
"""Of the whole way from the log to the tensors, so many bytes apart; each object's reader meets every bit."""
SHAPES = {"a": (8,), "b": (12, 2)}
Objects = Mapping[str, bytes]
Bytes = dict[str, bytes]


class Serial:
    """A pool without threads: some thousand restores shall be quick."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None: ...
    def map(self, function: Any, items: Iterable[Any]) -> list[Any]:
        return [function(item) for item in items]

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture(autouse=True)
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (check, commit, prune, reader):
        monkeypatch.setattr(module, "ThreadPoolExecutor", Serial)


def stream(step: int, size: int) -> bytes:
    """A run that never changes, one that goes back and forth, the rest of this step only."""
    return (b"\x07" * CUT + bytes([step // 10 % 2]) * CUT + bytes((at * 5 + step) % 256 for at in range(size)))[:size]


def save(store: MemoryStore, step: int) -> None:
    plan = plan_save(
        [replicated(name, "int32", shape, rank=0, world=1) for name, shape in SHAPES.items()], rank=0, world=1
    )
    data = stream(step, plan.size)
    runs = [(at, data[at : at + CUT]) for at in range(0, plan.size, CUT)]
    chunks = tuple(Chunk(chunk_id(run), at, len(run)) for at, run in runs)
    part = Part(VersionId(1, step), 0, 1, plan.size, plan.shards, chunks)
    log = CommitLog(store, JOB)
    saved = save_part(store, log, JOB, part, memoryview(data), term=1, known=KnownChunks())
    log.commit(Manifest(1, JOB, 1, part.version, 1, step, (saved.ref,), float(step)))
    log.mark()


def repository() -> tuple[Objects, list[Objects]]:
    """Its objects: a term, checkpoints 10 to 40 of which 10 was pruned, 30 and 40 came later. And what it was before."""
    store = MemoryStore()
    CommitLog(store, JOB).take_term("a", 0.0)
    past = []
    for step in (10, 20, 30, 40):
        save(store, step)
        past.append(objects_of(store))
        if step == 20:
            prune.execute(store, CommitLog(store, JOB), JOB, keep=Keep(1), term=1)
            past.append(objects_of(store))
    return past.pop(), past


def objects_of(store: MemoryStore) -> Objects:
    return {entry.key: store.get(entry.key) for entry in store.list("")}


def store_of(objects: Objects) -> MemoryStore:
    store = MemoryStore()
    store._space.objects.update(objects)
    return store


def restored(store: MemoryStore, step: int | None) -> tuple[int, Bytes] | None:
    """The step and the tensors that `ray-dr restore` would write; None when it refuses."""
    job = StoredJob(JOB, store)
    try:
        manifest = job.checkpoint(step)
        parts = job.parts(manifest)
        index = build_index(parts)
        wanted = {index.box(name): bytearray(index.box(name).size) for name in index.shards}
        sources = {part.rank: [job.source(part)] for part in parts}
        read_state(parts, {b: memoryview(v) for b, v in wanted.items()}, sources, threads=1, on_corrupt=lambda e: None)
    except RayDrError:
        return None
    return manifest.version.step, {box.name: bytes(room) for box, room in wanted.items()}


def checked(store: MemoryStore) -> list[str]:
    """Keys that `ray-dr check --level hashes` finds damaged."""
    try:
        view = CommitLog(store, JOB).refresh()
    except RayDrError as error:
        return [str(error)]
    inventory = check.take_inventory(store, JOB, view)
    fresh = check.Progress(1, JOB, "", "hashes", 1.0, ())
    found = list(inventory.damaged)
    for _, progress in check.look(check.stretch(check.chunk_units(store, JOB, inventory), fresh), fresh):
        found += progress.damaged
    return [damage.key for damage in found]


OBJECTS, PAST = repository()
TRUTH = {step: restored(store_of(OBJECTS), step) for step in (20, 30, 40)}


def expect_noticed_or_harmless(objects: Objects, what: object) -> bool:
    """Whether it was noticed."""
    store = store_of(objects)
    noticed = bool(checked(store))
    newest = restored(store, None)
    assert newest is None or newest == TRUTH[40], what
    assert noticed or newest is not None, what
    for step, truth in TRUTH.items():
        found = restored(store, step)
        assert found is None or found == truth, what
        assert noticed or found is not None, what
    return noticed


def needed() -> set[str]:
    """What the checkpoints need: the log from the `kept` entry on, their part lists and chunks."""
    store = store_of(OBJECTS)
    refs = [manifest.parts[0] for manifest in CommitLog(store, JOB).checkpoints()]
    chunks = {chunk_key(JOB, chunk) for ref in refs for chunk in read_part(store, ref).chunks}
    entries = {key for key in OBJECTS if key.endswith(".json") and (log_seq(key) or 0) > 3}
    return {ref.key for ref in refs} | chunks | entries


def with_one(key: str, data: bytes) -> Objects:
    return {**OBJECTS, key: data}


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def test_the_repository_is_whole_and_has_one_of_everything() -> None:
    assert not checked(store_of(OBJECTS))
    assert restored(store_of(OBJECTS), None) == TRUTH[40]
    assert restored(store_of(OBJECTS), 10) is None
    for step, truth in TRUTH.items():
        assert truth is not None
        data = stream(step, 64 + 96)
        assert truth == (step, {"a": data[:32], "b": data[64:160]})
    view = CommitLog(store_of(OBJECTS), JOB).refresh()
    named = [chunk.folder for m in view.checkpoints for chunk in read_part(store_of(OBJECTS), m.parts[0]).chunks]
    assert named[0].startswith("000001-000000000010")  # of a save that is no checkpoint any more
    assert sum(map(len, OBJECTS.values())) < 12_000


@pytest.mark.parametrize("key", [key for key in OBJECTS if OBJECTS[key]], ids=lambda key: key[7:40])
def test_every_flipped_bit_and_every_truncation_is_noticed_by_the_reader(key: str) -> None:
    good, store = OBJECTS[key], MemoryStore()
    digest = chunk_id(good)
    for data in damages_of(good):
        if key.startswith(log_prefix(JOB)):
            found = commit.decode(data, key)
            assert found is None or found == commit.decode(good, key), data
            continue
        store.put(key, data)
        part, chunk = PartRef(0, key, digest, len(good)), Chunk(digest, 0, len(good), folder_of(key))
        with pytest.raises(CorruptChunk):
            read_part(store, part) if key.startswith(parts_prefix(JOB)) else get_chunk(store, JOB, chunk)


def damages_of(data: bytes) -> Iterator[bytes]:
    """Every flipped bit and every truncation."""
    for bit in range(8 * len(data)):
        yield flip(data, bit)
    for size in range(len(data)):
        yield data[:size]


def test_a_flipped_bit_is_noticed_or_harmless_all_the_way() -> None:
    noticed = 0
    for key, data in OBJECTS.items():
        for at in range(0, len(data), STRIDE):
            noticed += expect_noticed_or_harmless(with_one(key, flip(data, 8 * at + at % 8)), (key, at))
    assert noticed


def test_a_truncation_is_noticed_or_harmless() -> None:
    for key, data in OBJECTS.items():
        for size in {*range(0, len(data), 16 * STRIDE), len(data) - 1} - {-1}:
            expect_noticed_or_harmless(with_one(key, data[:size]), (key, size))


def test_a_missing_object_is_noticed_or_harmless() -> None:
    for key in OBJECTS:
        noticed = expect_noticed_or_harmless({k: v for k, v in OBJECTS.items() if k != key}, key)
        assert noticed == (key in needed()), key


def test_two_swapped_objects_are_noticed_or_harmless() -> None:
    for one, other in itertools.combinations(OBJECTS, 2):
        swapped = {**OBJECTS, one: OBJECTS[other], other: OBJECTS[one]}
        expect_noticed_or_harmless(swapped, (one, other))


def test_an_object_in_anothers_place_is_noticed_or_harmless() -> None:
    """So is one that a copy of an older one was put over, which is what a replay is: names are never used twice here."""
    for one, other in itertools.permutations(OBJECTS, 2):
        expect_noticed_or_harmless(with_one(one, OBJECTS[other]), (one, other))
    for older in PAST:
        for key in older.keys() & OBJECTS.keys():
            assert older[key] == OBJECTS[key], f"{key} was overwritten"
        for key in older.keys() - OBJECTS.keys():
            expect_noticed_or_harmless(with_one(key, older[key]), key)


def test_without_its_place_in_the_hash_a_replayed_entry_would_be_taken() -> None:
    """The tests above can fail: an entry of the old form, which doesn't know its place, is believed anywhere."""
    keys = sorted(key for key in OBJECTS if key.startswith(log_prefix(JOB)) and key.endswith("json"))
    old = {key: commit.encode(found) for key in keys if (found := commit.decode(OBJECTS[key], key)) is not None}
    replayed = {**OBJECTS, **old, keys[-1]: old[keys[-2]]}
    with pytest.raises(AssertionError):
        expect_noticed_or_harmless(replayed, "replay")


def test_without_the_mark_a_lost_last_entry_would_not_be_noticed() -> None:
    last = max(key for key in OBJECTS if key.startswith(log_prefix(JOB)) and key.endswith("json"))
    lost = {key: data for key, data in OBJECTS.items() if key != last and not key.endswith(".mark")}
    with pytest.raises(AssertionError):
        expect_noticed_or_harmless(lost, last)
    step = restored(store_of({key: data for key, data in OBJECTS.items() if key != last}), 30)
    assert step == TRUTH[30]
