"""Repositories of every format there was: ray_dr and rescue.py read them to the same bytes, and refuse them damaged."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from click.testing import CliRunner

import rescue
from ray_dr.checkpoint.export import DTYPES
from ray_dr.checkpoint.reader import StoreSource, read_state
from ray_dr.checkpoint.restore_plan import build_index
from ray_dr.cli.main import main
from ray_dr.errors import CheckpointError, StoreError
from ray_dr.model.checkpoint import DTYPE_BYTES, Box, Chunk, Manifest, Part, Shard, VersionId
from ray_dr.repository.commit import CheckpointEntry, CommitLog, TermEntry, decode
from ray_dr.repository.layout import save_folder
from ray_dr.repository.parts import read_part, write_part
from ray_dr.stores.disk import FileStore
from tests.museum.make import PIECES, Job, make, tensor

ROOT = Path(__file__).parents[2]
PIECE_FOLDERS = sorted(Path(__file__).parent.glob("format-*/*"))
State = dict[str, tuple[str, list[int], bytes]]


def expected_of(piece: Path) -> dict[str, dict[str, Any]]:
    """Job -> "attempt-step" -> what was saved."""
    found: dict[str, dict[str, Any]] = json.loads((piece / "expected.json").read_text())
    return found


GOLDEN = [pytest.param(piece, job, id=job) for piece in PIECE_FOLDERS for job in expected_of(piece)]
IN_ONE_FILE = [param for param in GOLDEN if param.id != "all-dtypes"]


def by_ray_dr(root: Path, job: str, version: VersionId | None = None) -> tuple[State, dict[str, Any]]:
    """A checkpoint's tensors and scalars; without `version`, the newest."""
    store = FileStore(root)
    manifest = [m for m in CommitLog(store, job).checkpoints() if version in (None, m.version)][-1]
    parts = [read_part(store, ref) for ref in manifest.parts]
    index = build_index(parts)
    buffers = {index.box(name): bytearray(index.box(name).size) for name in index.shards}
    wanted = {box: memoryview(buffer) for box, buffer in buffers.items()}
    read_state(parts, wanted, {part.rank: [StoreSource(store, job, part)] for part in parts}, on_corrupt=lambda _: None)
    state = {box.name: (box.dtype, list(box.global_shape), bytes(data)) for box, data in buffers.items()}
    return state, {name: value for part in parts for name, value in part.scalars.items()}


def call_rescue(*arguments: object) -> int:
    """rescue.py as it is called from a shell; its exit status."""
    before = sys.argv
    sys.argv = ["rescue.py", *map(str, arguments)]
    try:
        rescue.main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return int(bool(end.code))
    finally:
        sys.argv = before
    return 0


def from_npy(folder: Path) -> tuple[State, dict[str, Any]]:
    """What rescue.py wrote: the files' bytes, under the names and dtypes that it lists."""
    state = {}
    for name, listed in json.loads((folder / "tensors.json").read_text()).items():
        array = np.load(folder / listed["file"], allow_pickle=False)
        assert str(array.dtype) == listed["dtype"] or listed["note"].endswith(f"kept as {array.dtype}")
        assert list(array.shape) == listed["shape"]
        state[name] = (listed["dtype"], list(array.shape), array.tobytes())
    return state, json.loads((folder / "scalars.json").read_text())


def as_saved(expected: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    tensors = expected["tensors"].items()
    state = {name: (dtype, shape, bytes.fromhex(data)) for name, (dtype, shape, data) in tensors}
    return state, expected["scalars"]


def version_in(text: str) -> VersionId:
    attempt, step = text.split("-")
    return VersionId(int(attempt), int(step))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A piece's store where it may be written to."""
    return lambda piece: Path(shutil.copytree(piece / "store", tmp_path / "store"))


@pytest.mark.parametrize(("piece", "job"), GOLDEN)
def test_both_read_every_checkpoint_as_it_was_saved(
    piece: Path, job: str, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    check_checkpoints(copied(piece), job, expected_of(piece)[job], tmp_path)


def check_checkpoints(root: Path, job: str, expected: dict[str, Any], folder: Path) -> None:
    there = [f"{m.version.attempt}-{m.version.step}" for m in CommitLog(FileStore(root), job).checkpoints()]
    assert sorted(there) == sorted(expected)
    repo = rescue.Repository(str(root))
    log = rescue.Log(repo, job)
    assert [f"{attempt}-{step}" for attempt, step in log.manifests] == there
    for name in there:
        version = version_in(name)
        rescue.restore(repo, job, log.manifests[version.attempt, version.step], folder / f"{job} {name}")
        assert from_npy(folder / f"{job} {name}") == as_saved(expected[name])
        assert by_ray_dr(root, job, version) == as_saved(expected[name])


@pytest.mark.parametrize(("piece", "job"), IN_ONE_FILE)
def test_both_write_the_same_safetensors_file(
    piece: Path, job: str, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    store = copied(piece)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    done = CliRunner().invoke(main, ["restore", job, "--store", f"file://{store}", "--to", str(ours)])
    assert done.exit_code == 0, done.output
    assert call_rescue(f"file://{store}", job, "--to", theirs) == 0
    assert theirs.read_bytes() == ours.read_bytes()
    data = ours.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    saved, _ = as_saved(list(expected_of(piece)[job].values())[-1])
    for name, (_, shape, content) in saved.items():
        first, last = header[name]["data_offsets"]
        assert (header[name]["shape"], data[len(data) - _body(header) :][first:last]) == (shape, content)


def _body(header: dict[str, Any]) -> int:
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


def test_what_is_made_today_is_what_the_museum_expects_and_is_read(tmp_path: Path) -> None:
    make(tmp_path / "new")
    for piece in PIECES:
        expected = expected_of(tmp_path / "new" / piece)
        if piece != "training":  # its values are torch's
            assert expected == expected_of(PIECE_FOLDERS[0].parent / piece)
        for job, checkpoints in expected.items():
            check_checkpoints(tmp_path / "new" / piece / "store", job, checkpoints, tmp_path)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 32, 48, 64, 100, 1000])
def test_a_stream_may_be_cut_anywhere(chunk_bytes: int, tmp_path: Path) -> None:
    job = Job(FileStore(tmp_path / "store"), "cut", chunk_bytes)
    job.take()
    job.commit(1, 1, {"a": tensor("a", "uint8", 5), "b": tensor("b", "float32", 1), "c": tensor("c", "int16", 40)})
    check_checkpoints(tmp_path / "store", "cut", job.expected, tmp_path)


def test_what_cannot_be_written_is_said_and_leaves_nothing(
    copied: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = copied(next(piece for piece in PIECE_FOLDERS if piece.name == "training"))
    for target, told in ((tmp_path / "no" / "folder", "cannot be written: No such file"), (store, "exists already")):
        assert call_rescue(store, "training", "--to", target) == 1
        assert told in capfd.readouterr().err
    monkeypatch.setattr(rescue.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert call_rescue(store, "training", "--to", tmp_path / "out") == 1
    assert "lacks space" in capfd.readouterr().err
    assert call_rescue(store, "training", "--step", 9, "--to", tmp_path / "out") == 1
    assert "no such checkpoint" in capfd.readouterr().err
    assert call_rescue(store, "nobody") == 1
    assert call_rescue(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_rescue_needs_neither_ray_dr_nor_blake3(copied: Callable[[Path], Path], tmp_path: Path) -> None:
    modules = {name.split(".")[0] for name in _imported(ast.parse((ROOT / "rescue.py").read_text()))}
    assert modules - set(sys.stdlib_module_names) == {"numpy", "blake3"}
    assert len((ROOT / "rescue.py").read_text().splitlines()) <= 300
    alone = "import sys, runpy; sys.modules.update(ray_dr=None, blake3=None); del sys.argv[0]; " \
            "runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip
    (piece,) = [piece for piece in PIECE_FOLDERS if piece.name == "dtypes"]
    asked = [ROOT / "rescue.py", copied(piece), "all-dtypes", "--to", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", alone, *map(str, asked)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert from_npy(tmp_path / "out") == as_saved(expected_of(piece)["all-dtypes"]["1-7"])


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_rescue_knows_the_dtypes_of_ray_dr_and_of_its_export() -> None:
    assert {
        name: np.dtype(kept).itemsize for name, (kept, _) in rescue.DTYPES.items() if name in DTYPE_BYTES
    } == DTYPE_BYTES
    assert {name: known for name, (_, known) in rescue.DTYPES.items() if known != "-"} == DTYPES


def test_numpys_blake3_is_blake3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescue, "blake3", None)
    data = np.random.default_rng(5).bytes(70_000)
    for size in (*range(66), *range(1022, 1027), *range(0, 9 * 1024, 1024), *range(1, 20 * 1024, 3001), 70_000):
        assert rescue.digest(data[:size]) == blake3(data[:size]).hexdigest(), size


LONGER = "longer by a byte"


def damages(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What a disk, a network or a hand may do to one object."""
    yield "missing", None
    yield "empty", b""
    yield "cut by a byte", data[:-1]
    yield "cut in half", data[: len(data) // 2]
    yield LONGER, data + b"\0"
    for at in sorted({0, 1, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1} & set(range(len(data)))):
        yield f"a bit at {at}", data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]


def write(path: Path, data: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


@pytest.mark.parametrize(("piece", "job"), IN_ONE_FILE)
def test_both_refuse_a_checkpoint_of_which_any_object_is_damaged(
    piece: Path, job: str, copied: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, target = copied(piece), tmp_path / "out.safetensors"
    assert call_rescue(store, job, "--to", target) == 0
    golden, needed, saved = target.read_bytes(), needed_by_newest(store, job), by_ray_dr(store, job)
    objects = {str(path.relative_to(store)): path.read_bytes() for path in data_objects(store, job)}
    assert needed <= set(objects)
    for key, data in objects.items():
        for what, damaged in (*damages(data), *_of_others(objects, key)):
            write(store / key, damaged)
            target.unlink(missing_ok=True)
            ended = call_rescue(store, job, "--to", target)
            if key in needed:
                assert (ended, key in capfd.readouterr().err) == (1, True), f"{key}: {what}"
                assert not list(tmp_path.glob("*out*")), f"{key}: {what}"
                if what == LONGER and "/chunks/" in key:
                    assert by_ray_dr(store, job) == saved  # it reads no more than the chunk's size
                    continue
                with pytest.raises((CheckpointError, StoreError)):
                    by_ray_dr(store, job)
            else:
                assert (ended, target.read_bytes()) == (0, golden), f"{key}: {what}"
        write(store / key, data)


def data_objects(store: Path, job: str) -> list[Path]:
    """Part lists and chunks."""
    found = itertools.chain(*((store / "jobs" / job / kind).rglob("*") for kind in ("parts", "chunks")))
    return sorted(path for path in found if path.is_file())


def needed_by_newest(root: Path, job: str) -> set[str]:
    """Keys of the part lists and chunks of the newest checkpoint."""
    store = FileStore(root)
    manifest = CommitLog(store, job).checkpoints()[-1]
    chunks = [chunk for ref in manifest.parts for chunk in read_part(store, ref).chunks]
    return {ref.key for ref in manifest.parts} | {f"jobs/{job}/chunks/{chunk.folder}/{chunk.id}" for chunk in chunks}


def _of_others(objects: dict[str, bytes], key: str) -> list[tuple[str, bytes]]:
    """Another object's bytes in this one's place: of the next of its kind."""
    kind = key.split("/")[2]
    others = [name for name in objects if name.split("/")[2] == kind and objects[name] != objects[key]]
    return [(f"bytes of {name}", objects[name]) for name in others[:1]]


@pytest.mark.parametrize(("piece", "job"), IN_ONE_FILE)
def test_a_damaged_moved_or_replayed_log_entry_never_brings_back_an_older_checkpoint_unasked(
    piece: Path, job: str, copied: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, target = copied(piece), tmp_path / "out.safetensors"
    assert call_rescue(store, job, "--to", target) == 0
    golden = target.read_bytes()
    log = sorted((store / "jobs" / job / "log").iterdir())
    entries = [path.read_bytes() for path in log]
    for changed in changed_logs(entries):
        for path, data in zip(log, changed, strict=True):
            write(path, data)
        target.unlink(missing_ok=True)
        if call_rescue(store, job, "--to", target) == 0:
            assert target.read_bytes() == golden
        else:
            assert "damaged: jobs/" in capfd.readouterr().err
            assert not target.exists()


def changed_logs(entries: list[bytes]) -> Iterator[list[bytes | None]]:
    """Each entry damaged (but for a lost last one, which nothing tells), and each pair swapped or one of it replayed."""
    for number, data in enumerate(entries):
        for what, damaged in damages(data):
            if what != "missing" or number < len(entries) - 1:
                yield [*entries[:number], damaged, *entries[number + 1 :]]
    for one, other in itertools.permutations(range(len(entries)), 2):
        replayed: list[bytes | None] = list(entries)
        replayed[one] = entries[other]
        yield replayed
        if one < other:
            yield [*replayed[:other], entries[one], *replayed[other + 1 :]]


def test_an_older_one_is_restored_when_asked_for(
    copied: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (piece,) = [piece for piece in PIECE_FOLDERS if piece.name == "incremental"]
    store, expected = copied(piece), expected_of(piece)["adapter"]
    newest, before = (m.parts[0].key for m in CommitLog(FileStore(store), "adapter").checkpoints()[:0:-1])
    (store / newest).write_bytes(b"{}")
    assert call_rescue(store, "adapter", "--to", tmp_path / "out") == 1
    assert "--older" in capfd.readouterr().err
    assert call_rescue(store, "adapter", "--older", "--to", tmp_path / "out") == 0
    assert f"damaged: step 5 of attempt 1: {newest}" in capfd.readouterr().err
    assert from_npy(tmp_path / "out") == as_saved(expected["1-4"])
    (store / before).unlink()
    assert call_rescue(store, "adapter", "--older", "--to", tmp_path / "older") == 0
    assert from_npy(tmp_path / "older") == as_saved(expected["1-3"])
    assert call_rescue(store, "adapter", "--step", 3, "--to", tmp_path / "named") == 0
    assert from_npy(tmp_path / "named") == as_saved(expected["1-3"])


def test_a_lost_end_of_the_log_shows_in_what_is_left_of_the_save(
    copied: Callable[[Path], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    store = copied(next(piece for piece in PIECE_FOLDERS if piece.name == "training"))
    max((store / "jobs/training/log").iterdir()).unlink()
    assert call_rescue(store, "training") == 0
    told = capfd.readouterr()
    assert "parts/000001-000000000003-000001: of a later save" in told.err
    assert told.out == "steps: 1 (attempt 1) 2 (attempt 1)\n"


def entry(**body: Any) -> bytes:
    """A log entry with the digest that belongs to it."""
    digest = blake3(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, sort_keys=True, separators=(",", ":")).encode()


def test_a_newer_format_is_refused_by_name(copied: Callable[[Path], Path], capfd: pytest.CaptureFixture[str]) -> None:
    store = copied(next(piece for piece in PIECE_FOLDERS if piece.name == "training"))
    (store / "jobs/training/log/000000000005.json").write_bytes(entry(entry="checkpoint", format=2, manifest="?"))
    assert call_rescue(store, "training", "--older", "--to", store / "out") == 1
    assert "000000000005.json: of format 2" in capfd.readouterr().err


def test_an_entry_of_another_job_or_name_and_one_that_is_known_to_be_lost_stand_in_the_newests_way(
    copied: Callable[[Path], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    store = copied(next(piece for piece in PIECE_FOLDERS if piece.name == "incremental"))
    last, another = store / "jobs/adapter/log/000000000009.json", store / "jobs/other/log/000000000002.json"
    manifest = json.loads(another.read_bytes())["manifest"]
    foreign = entry(entry="checkpoint", format=1, manifest={**manifest, "version": {"attempt": 1, "step": 6}})
    moved = entry(entry="term", format=1, term=9, place="jobs/adapter/log/000000000010.json")
    for name, data, told in (
        (last.name, foreign, "of another job"),
        (last.name, moved, "was put as jobs/adapter/log/000000000010.json"),
        ("000000000009.mark", b"", "000000000009.json: No such file"),
    ):
        (last.parent / name).write_bytes(data)
        assert call_rescue(store, "adapter", "--to", store / "out") == 1, told
        assert told in capfd.readouterr().err
        (last.parent / name).unlink()
    assert call_rescue(store, "adapter", "--to", store / "out") == 0


BOX = Box("w", "int32", (4,), (0,), (4,))
FOLDER = save_folder(VersionId(1, 1), 1)


def hostile(data: bytes) -> Iterator[tuple[str, Part]]:
    """Part lists whose hashes are right and that nobody could have meant."""
    good = Chunk(blake3(data).hexdigest(), 0, len(data), FOLDER)
    part = Part(VersionId(1, 1), 0, 1, len(data), (Shard(BOX, 0),), (good,))
    yield "good", part
    yield "leaves the repository", replace(part, chunks=(replace(good, folder="../../../.."),))
    yield "leaves a gap", replace(part, chunks=(replace(good, at=4),))
    yield "ends early", replace(part, size=len(data) + 8)
    yield "is huge", replace(part, shards=(Shard(replace(BOX, global_shape=(10**15,), lengths=(10**15,)), 0),))
    yield "is not covered", replace(part, shards=(Shard(replace(BOX, global_shape=(5,)), 0),))
    halves = [Shard(replace(BOX, offsets=(at,), lengths=(2,)), 8 * at) for at in (0, 1)]
    yield "overlaps", replace(part, shards=tuple(halves))
    yield "lies outside", replace(part, shards=(Shard(replace(BOX, offsets=(1,)), 0),))
    yield "lies before", replace(part, shards=(Shard(BOX, -4),))
    yield "is of another version", replace(part, version=VersionId(1, 2))
    yield "is of another rank", replace(part, rank=1)


def test_a_part_list_that_nobody_could_have_meant_is_refused_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / blake3(bytes(range(16))).hexdigest()).write_bytes(bytes(range(16)))  # outside, with the right bytes
    for what, part in hostile(bytes(range(16))):
        store = FileStore(tmp_path / what)
        term = CommitLog(store, "j").take_term("t", 1.0)
        store.put(f"jobs/j/chunks/{FOLDER}/{part.chunks[0].id}", bytes(range(16)))
        ref = replace(write_part(store, "j", part, term=term), rank=0)
        CommitLog(store, "j").commit(Manifest(1, "j", term, VersionId(1, 1), 1, 1, (ref,), 1.0))
        ended = call_rescue(tmp_path / what, "j", "--to", tmp_path / f"{what}.safetensors")
        told = capfd.readouterr().err
        assert (ended, "damaged: step 1 of attempt 1" in told) == ((0, False) if what == "good" else (1, True)), what
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["good.safetensors"]


def test_the_entries_that_the_format_shows_are_entries() -> None:
    text = (ROOT / "ray_dr/repository/FORMAT.md").read_text()
    shown = re.findall(r"```json\n(.*?)\n```", text, re.S)
    assert [type(decode(entry.encode())) for entry in shown] == [TermEntry, CheckpointEntry]
    found = dict(re.findall(r"^\| (\d+) \| (`.*?) \|$", text, re.M))
    assert {name: int(size) for size, names in found.items() for name in names.replace("`", "").split()} == DTYPE_BYTES
