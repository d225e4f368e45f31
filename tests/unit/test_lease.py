"""Leases, programs and what guards did, in a store."""

from __future__ import annotations

import io
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from ray_dr.actors.packing import is_encrypted, pack, unpack
from ray_dr.errors import StoreError
from ray_dr.model.lease import Guarding, Lease, Program
from ray_dr.repository.lease import (
    guard_key,
    lease_key,
    read_guarding,
    read_lease,
    sweep_leases,
    write_guarding,
    write_lease,
)
from ray_dr.repository.program import blob_key, digest_of, program_key, read_blob, read_program, write_program
from ray_dr.stores.memory import MemoryStore

JOB = "job"
LEASE = Lease(2, 7, 100.0, 3.0, "host:1", 40, "Running")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(uuid.uuid4().hex)


def test_the_lease_of_the_highest_term_counts_however_late_an_older_one_is_renewed(store: MemoryStore) -> None:
    assert read_lease(store, JOB) is None
    write_lease(store, JOB, LEASE)
    write_lease(store, JOB, replace(LEASE, term=3, beat=1))
    write_lease(store, JOB, replace(LEASE, beat=8))
    assert read_lease(store, JOB) == replace(LEASE, term=3, beat=1)
    sweep_leases(store, JOB, 3)
    assert [entry.key for entry in store.list("jobs/")] == [lease_key(JOB, 3)]


def test_a_damaged_lease_is_trouble_and_no_absence(store: MemoryStore) -> None:
    store.put(lease_key(JOB, 2), b"{")
    with pytest.raises(StoreError, match="lease is damaged"):
        read_lease(store, JOB)


def test_what_a_guard_did_is_read_again_and_begins_anew_where_it_is_damaged(store: MemoryStore) -> None:
    assert read_guarding(store, JOB) == Guarding()
    write_guarding(store, JOB, Guarding(2, 5.0, 3, 40))
    assert read_guarding(store, JOB) == Guarding(2, 5.0, 3, 40)
    store.put(guard_key(JOB), b"no json")
    assert read_guarding(store, JOB) == Guarding()


def test_a_program_is_kept_once_and_replaces_the_one_before_with_its_bytes(store: MemoryStore) -> None:
    first, second = b"first", b"second"
    program = Program({"name": JOB}, digest_of(first), "3.11", "2.60", term=1, at=5.0)
    assert write_program(store, JOB, program, {program.train: first})
    assert not write_program(store, JOB, replace(program, term=2, at=9.0), {program.train: first})
    other = replace(program, train=digest_of(second))
    assert write_program(store, JOB, other, {other.train: second})
    assert read_program(store, JOB) == other
    assert read_blob(store, JOB, other.train) == second
    assert sorted(entry.key for entry in store.list("jobs/")) == [program_key(JOB), blob_key(JOB, other.train)]


def test_damaged_bytes_of_a_program_are_not_run(store: MemoryStore) -> None:
    program = Program({}, digest_of(b"good"), "3.11", "2.60")
    write_program(store, JOB, program, {program.train: b"good"})
    store.put(blob_key(JOB, program.train), b"evil")
    with pytest.raises(StoreError, match="do not match"):
        read_blob(store, JOB, program.train)


def test_a_directory_is_packed_to_the_same_bytes_and_comes_back_as_it_was(tmp_path: Path) -> None:
    home, there = tmp_path / "home", tmp_path / "there"
    (home / "deep").mkdir(parents=True)
    (home / "deep" / "run.sh").write_text("#!/bin/sh")
    (home / "deep" / "run.sh").chmod(0o755)
    (home / "__pycache__").mkdir()
    (home / "__pycache__" / "x.pyc").write_bytes(b"old")
    packed = pack(home)
    assert packed is not None
    (home / "deep" / "run.sh").touch()
    assert pack(home) == packed
    there.mkdir()
    unpack(packed, there)
    assert [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()] == ["deep/run.sh"]
    assert (there / "deep" / "run.sh").stat().st_mode & 0o777 == 0o755


def test_a_package_that_names_places_outside_is_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("../evil.py", "x")
    (tmp_path / "in").mkdir()
    with pytest.raises(StoreError, match="outside"):
        unpack(sink.getvalue(), tmp_path / "in")
    assert not (tmp_path / "evil.py").exists()


def test_only_a_store_with_a_key_is_encrypted() -> None:
    assert is_encrypted("s3://bucket/x?region=a&key=env:LAB")
    assert not is_encrypted("s3://bucket/key=x?region=a")
