"""`ray-dr check` and `ray-dr prune`, called as a user calls them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ray_dr.checkpoint import trial
from ray_dr.checkpoint.restore_plan import plan_restore
from ray_dr.checkpoint.save_plan import Leaf, plan_save
from ray_dr.cli.main import main
from ray_dr.errors import StoreUnavailable
from ray_dr.model.checkpoint import Box, Chunk, Part, VersionId
from ray_dr.model.job import Keep
from ray_dr.repository import check, prune
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.layout import chunks_prefix, log_key, parts_prefix
from ray_dr.stores.disk import FileStore
from ray_dr.stores.faulty import FaultyStore
from tests.unit import stored_life
from tests.unit.stored_life import NAME

LEVELS = ("listing", "hashes", "restore")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # how durable the files are is not the question here
    monkeypatch.setattr(stored_life, "CHUNK_BYTES", 256)
    opened = FileStore(tmp_path / "store")
    for step in (4, 8, 12):
        stored_life.save_checkpoint(opened, step)
    return opened


def call(store: FileStore, *arguments: str) -> Result:
    return CliRunner().invoke(main, [arguments[0], NAME, "--store", store.url, *arguments[1:]])


def ask(store: FileStore, *arguments: str, status: int = 0) -> dict:
    """What a verb says as JSON."""
    result = call(store, *arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout.splitlines()[-1])


def chunk_keys(store: FileStore) -> list[str]:
    return [entry.key for entry in store.list(chunks_prefix(NAME))]


@pytest.mark.parametrize("level", LEVELS)
def test_a_whole_repository_is_whole_at_every_level(store: FileStore, level: str) -> None:
    told = ask(store, "check", "--level", level)
    assert told["whole"] is True
    assert [(version["step"], version["whole"]) for version in told["versions"]] == [(4, True), (8, True), (12, True)]
    assert told["damaged"] == []
    assert (told["bytes_read"] > 2000) == (level != "listing")
    assert "whole" in call(store, "check", "--level", level).stdout


@pytest.mark.parametrize(
    ("what", "levels"), [("missing", LEVELS), ("short", LEVELS), ("flipped", ("hashes", "restore"))]
)
def test_every_damaged_chunk_is_listed_with_the_versions_that_need_it(
    store: FileStore, what: str, levels: tuple[str, ...]
) -> None:
    first, *_, last = keys = chunk_keys(store)
    for key in (first, last):
        data = store.get(key)
        if what == "missing":
            store.delete(key)
        else:
            store.put(key, data[:-1] if what == "short" else bytes([data[0] ^ 1]) + data[1:])
    for level in LEVELS:
        told = ask(store, "check", "--level", level, "--anew", status=int(level in levels))
        assert [each["key"] for each in told["damaged"]] == ([first, last] if level in levels else [])
        if level in levels:
            assert all(each["versions"] for each in told["damaged"])
            assert told["versions"][1]["whole"]
    assert len(keys) == 12


def test_a_damaged_part_list_and_a_damaged_log_entry_are_named(store: FileStore) -> None:
    lists = [entry.key for entry in store.list(parts_prefix(NAME))]
    store.put(lists[0], store.get(lists[1]))
    store.put(log_key(NAME, 4), store.get(log_key(NAME, 3)))
    result = call(store, "check", "--level", "restore")
    assert result.exit_code == 1
    assert f"damaged: {lists[0]} does not match its hash; needed by step 4 of attempt 1" in result.stdout
    assert f"damaged: {log_key(NAME, 4)} cannot be read; needed by the log" in result.stdout
    refused = call(store, "restore", "--to", "x.safetensors")
    assert refused.exit_code == 1
    assert "a newer checkpoint may be lost; the newest that is known: step 8" in refused.stderr


def test_a_check_that_is_stopped_goes_on_where_it_was(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, read = check.look_at_chunk, list[str]()
    spoilt = chunk_keys(store)[3]
    store.put(spoilt, b"x" * 256)

    def stopping(store: FileStore, job: str, chunk: Chunk, users: tuple[VersionId, ...]) -> tuple[check.Damage, ...]:
        read.append(chunk.id)
        if len(read) == 5:
            raise KeyboardInterrupt
        return real(store, job, chunk, users)

    monkeypatch.setattr("ray_dr.cli.check.look", lambda due, progress, threads: check.look(due, progress, threads=1))
    monkeypatch.setattr(check, "look_at_chunk", stopping)
    assert call(store, "check").exit_code == 130
    stored_life.save_checkpoint(store, 16)
    told = ask(store, "check", status=1)
    assert told["resumed"] is True
    assert told["newer_versions"] == 1
    assert [each["key"] for each in told["damaged"]] == [spoilt]
    assert len(set(read)) == 12
    assert len(read) < 12 + 5
    assert ask(store, "check", status=1)["newer_versions"] == 0


def test_samples_one_after_the_other_cover_everything(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, read = check.look_at_chunk, list[str]()

    def counting(store: FileStore, job: str, chunk: Chunk, users: tuple[VersionId, ...]) -> tuple[check.Damage, ...]:
        read.append(chunk.id)
        return real(store, job, chunk, users)

    monkeypatch.setattr(check, "look_at_chunk", counting)
    for number in range(4):
        assert not ask(store, "check", "--sample", "25%")["resumed"]
        assert (len(read) == 12) == (number == 3)
    assert sorted(read) == sorted(key.rpartition("/")[2] for key in chunk_keys(store))
    assert call(store, "check", "--sample", "0%").exit_code == 2
    assert call(store, "check", "--sample", "5").exit_code == 2


def test_what_was_damaged_is_looked_at_again_by_every_sample(store: FileStore) -> None:
    key = chunk_keys(store)[5]
    good = store.get(key)
    store.put(key, b"x" * len(good))
    assert 1 in [call(store, "check", "--sample", "20%").exit_code for _ in range(5)]
    assert ask(store, "check", "--sample", "1%", status=1)["damaged"][0]["key"] == key
    store.put(key, good)
    assert ask(store, "check", "--sample", "1%")["whole"]


@pytest.mark.parametrize("room", [1, 16, 100, 1000, 10**9])
def test_the_pieces_of_a_trial_cover_every_tensor_once_and_fit(room: int) -> None:
    shapes = {"a": (7, 5, 3), "b": (), "c": (0, 4), "d": (300,), "e": (1, 1, 9)}
    leaves = [
        Leaf(name, "int32", shape, (Box(name, "int32", shape, (0,) * len(shape), shape),))
        for name, shape in shapes.items()
    ]
    plan = plan_save(leaves, rank=0, world=1)
    part = Part(VersionId(1, 1), 0, 1, plan.size, plan.shards, ())
    lots = list(trial.pieces([part], room))
    covered = {name: set[tuple[int, ...]]() for name in shapes}
    for lot in lots:
        assert sum(box.size for box in lot) <= max(room, 4)
        assert all(read.size for read in plan_restore([part], lot))
        for box in lot:
            cells = {()}
            for at, length in zip(box.offsets, box.lengths, strict=True):
                cells = {(*cell, at + i) for cell in cells for i in range(length)}
            assert not cells & covered[box.name]
            covered[box.name] |= cells
    assert {name: len(cells) for name, cells in covered.items()} == {"a": 105, "b": 1, "c": 0, "d": 300, "e": 9}


# ---------------------------------------------------------------------------------------------------------------- prune


def steps(told: dict, verdict: str) -> list[int]:
    return [row["step"] for row in told[verdict]]


def test_a_prune_says_what_goes_and_why_and_changes_nothing(store: FileStore) -> None:
    before = {entry.key for entry in store.list("")}
    told = ask(store, "prune", "--keep", "last=1")
    assert (steps(told, "keep"), steps(told, "drop"), told["executed"]) == ([12], [4, 8], False)
    text = call(store, "prune", "--keep", "last=1").stdout
    assert "number 1 of the last 1" in text
    assert "2 would go; nothing was changed (--yes does it)" in text
    assert {entry.key for entry in store.list("")} == before


def test_a_prune_with_yes_drops_and_removes_after_the_grace(store: FileStore) -> None:
    chunks = chunk_keys(store)
    told = ask(store, "prune", "--keep", "last=1", "--yes")
    assert (steps(told, "drop"), steps(told, "pending"), told["chunks_removed"]) == ([4, 8], [4, 8], 0)
    assert chunk_keys(store) == chunks
    assert [manifest.version.step for manifest in CommitLog(store, NAME).checkpoints()] == [12]
    assert "is dropped; its objects stay for readers" in call(store, "prune", "--keep", "last=1").stdout
    assert ask(store, "check", "--level", "restore")["whole"]
    stored_life.save_checkpoint(store, 16)
    told = ask(store, "prune", "--keep", "last=1", "--grace", "0s", "--yes")
    assert (steps(told, "keep"), steps(told, "drop"), steps(told, "pending")) == ([16], [12], [4, 8])
    assert len(chunk_keys(store)) < len(chunks) + 4
    assert ask(store, "check", "--level", "restore")["whole"]


def test_a_damaged_checkpoint_never_counts(store: FileStore) -> None:
    store.delete(next(key for key in chunk_keys(store) if "-000000000012-" in key))
    told = ask(store, "prune", "--keep", "last=2")
    assert (steps(told, "keep"), steps(told, "drop")) == ([4, 8], [12])
    assert "is missing" in told["drop"][0]["reason"]


def test_what_a_check_has_found_is_known_to_the_prune(store: FileStore) -> None:
    key = next(key for key in chunk_keys(store) if "-000000000012-" in key)
    store.put(key, b"x" * len(store.get(key)))
    assert steps(ask(store, "prune", "--keep", "last=1"), "keep") == [12]
    ask(store, "check", status=1)
    assert steps(ask(store, "prune", "--keep", "last=1"), "keep") == [8]


def test_nothing_goes_when_nothing_is_good(store: FileStore) -> None:
    for key in chunk_keys(store):
        store.delete(key)
    told = ask(store, "prune", "--keep", "last=1", "--yes")
    assert (steps(told, "keep"), steps(told, "drop")) == ([4, 8, 12], [])


def test_the_rules_are_those_of_the_job_yaml(store: FileStore, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    tier = f"{{kind: file, path: {tmp_path / 'store'}, keep: {{last: 2, within: 1s}}}}"
    path.write_text(f"job: {NAME}\ncheckpoint:\n  tiers:\n    - {tier}\n")
    result = CliRunner().invoke(main, ["prune", str(path), "--json"])
    assert steps(json.loads(result.stdout), "keep") == [8, 12]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing says which checkpoints are to stay"),
        (("--keep", "yearly=3"), "--keep.yearly: unknown key"),
        (("--keep", "last=0"), "--keep.last: 0 is out of range"),
        (("--keep", "within=5"), "write a unit"),
        (("--keep", "last"), "says no rules"),
        (("--keep", "last=1}"), "says no rules"),
        (("--keep", "last=1", "--grace", "5"), "--grace: 5 is no duration"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(store: FileStore, arguments: tuple[str, ...], told: str) -> None:
    result = call(store, "prune", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_damaged_log_is_not_pruned(store: FileStore) -> None:
    store.delete(log_key(NAME, 3))
    result = call(store, "prune", "--keep", "last=1", "--yes")
    assert result.exit_code == 1
    assert "the commit log is damaged (entry 3)" in result.stderr


# -------------------------------------------------------------------------------------------- what is not damage


def units_of(store: FaultyStore, level: str) -> list[check.Unit]:
    inventory = check.take_inventory(store, NAME, CommitLog(store, NAME).refresh())
    if level == "hashes":
        return check.chunk_units(store, NAME, inventory)
    return [u for version, parts in inventory.parts.items() for u in trial.trial_units(store, NAME, version, parts)]


@pytest.mark.parametrize("level", ["hashes", "restore"])
def test_a_store_that_cannot_be_reached_is_no_damage(store: FileStore, level: str) -> None:
    faulty = FaultyStore(store)
    units = units_of(faulty, level)
    for operation in ("get", "readinto"):
        faulty.fail(operation, times=1000)
    with pytest.raises(StoreUnavailable):
        units[0].look()


def test_a_checkpoint_that_is_dropped_meanwhile_is_no_damage(store: FileStore) -> None:
    faulty = FaultyStore(store)
    units = units_of(faulty, "hashes")
    log = CommitLog(store, NAME)
    prune.execute(store, log, NAME, keep=Keep(1), term=None, whole=True)
    found = [damage for unit in units for damage in unit.look()]
    assert found
    assert check.still_there(found, log.refresh()) == ()
