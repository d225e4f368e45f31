"""A node's own disk: what is there after a restart, what is read from it, what goes; and lives that never mix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.local_disk import LocalDisk, life_name
from ray_dr.checkpoint.reader import StoreSource
from ray_dr.checkpoint.sealing import Sealer
from ray_dr.errors import NotFound
from ray_dr.model.checkpoint import Part, VersionId
from ray_dr.repository.chunks import KnownChunks
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.saving import save_part
from ray_dr.stores.disk import FileStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.peer import PeerReader

TOKEN = b"secret"
SIZE = 3_000_000
JOB = life_name("job", "0123456789ab")


def data_of(step: int, rank: int = 0) -> bytes:
    return (b"%03d.%02d" % (step, rank)) * (SIZE // 6)


def put(root: Path, step: int, rank: int = 0, *, job: str = JOB, attempt: int = 1) -> None:
    data = memoryview(data_of(step, rank))
    bare = Part(VersionId(attempt, step), rank, 2, len(data), (), ())
    part = Part(bare.version, rank, 2, len(data), (), tuple(chunk for chunk, _ in Sealer().seal(bare, data)))
    save_part(FileStore(root), None, job, part, data, term=1, known=KnownChunks())


@pytest.fixture
def disk(tmp_path: Path) -> LocalDisk:
    return LocalDisk(lambda: FileStore(tmp_path), JOB, "node-a")


def test_a_new_agent_finds_what_an_earlier_one_left(disk: LocalDisk, tmp_path: Path) -> None:
    put(tmp_path, 3, 0)
    put(tmp_path, 3, 1)
    held = disk.held()
    assert {(h.version.step, h.rank, h.world, h.disk, h.node) for h in held} == {
        (3, 0, 2, True, "node-a"), (3, 1, 2, True, "node-a"),
    }  # fmt: skip
    into = memoryview(bytearray(1000))
    part = disk.part(VersionId(1, 3), 1)
    StoreSource(disk.store, JOB, part, "disk").read(1, 500, into)
    assert bytes(into) == data_of(3, 1)[500:1500]
    with pytest.raises(NotFound, match="does not hold rank 1 of step 4 on its disk"):
        disk.part(VersionId(1, 4), 1)


def test_nothing_of_another_life_is_seen(disk: LocalDisk, tmp_path: Path) -> None:
    put(tmp_path, 3, job=life_name("job", "ba9876543210"))
    assert disk.held() == ()


def test_a_log_that_was_emptied_is_another_life() -> None:
    def life(store: MemoryStore) -> str:
        log = CommitLog(store, "job")
        assert log.life() == ""
        log.take_term("me", 0.0)
        found = log.life()
        log.take_term("you", 1.0)
        assert CommitLog(store, "job").life() == found, "the same for ever"
        return found

    first, second = life(MemoryStore("life-one")), life(MemoryStore("life-two"))
    assert first != second
    assert len(first) == 12


def test_older_versions_go_and_newer_ones_stay(disk: LocalDisk, tmp_path: Path) -> None:
    for step in range(1, 6):
        put(tmp_path, step)
    disk.held()
    assert disk.keep([VersionId(1, 4), VersionId(1, 2)]) > 0
    assert {held.version.step for held in disk.held()} == {2, 4, 5}
    folders = {path.name.split("-")[1] for path in (tmp_path / "jobs" / JOB / "chunks").iterdir()}
    assert {int(folder) for folder in folders} == {2, 4, 5}
    assert disk.keep([]) == 0


def test_a_save_that_was_cut_off_is_no_part_and_goes_with_the_older_ones(disk: LocalDisk, tmp_path: Path) -> None:
    put(tmp_path, 1)
    for path in (tmp_path / "jobs" / JOB / "parts").rglob("*.json"):
        path.unlink()
    put(tmp_path, 2)
    assert {held.version.step for held in disk.held()} == {2}
    assert disk.keep([VersionId(1, 2)]) == 1
    assert not (tmp_path / "jobs" / JOB / "chunks" / "000001-000000000001-000001").exists()


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b"{}"), lambda path: os.truncate(path, 100)])
def test_a_damaged_list_is_no_part(disk: LocalDisk, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    put(tmp_path, 1, 0)
    put(tmp_path, 1, 1)
    harm(next((tmp_path / "jobs" / JOB / "parts").rglob("r00000-*.json")))
    assert [held.rank for held in disk.held()] == [1]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent("node-a", "127.0.0.1", "memory://local-disk", TOKEN, disk=(f"file://{tmp_path}/disk", JOB))
    yield made
    made.close()


def test_an_agent_gives_from_its_disk_what_it_has_not_in_memory(agent: Agent, tmp_path: Path) -> None:
    put(tmp_path / "disk", 7)
    assert [(held.version.step, held.disk) for held in agent.held()] == [(7, True)]
    reader = PeerReader(agent.address, TOKEN)
    assert reader.part(VersionId(1, 7), 0)["size"] == SIZE
    assert reader.place(VersionId(1, 7), 0) is None
    into = memoryview(bytearray(SIZE))
    reader.read(VersionId(1, 7), 0, 0, [into])
    assert bytes(into) == data_of(7)
    with pytest.raises(NotFound):
        reader.part(VersionId(1, 8), 0)
    for path in (tmp_path / "disk" / "jobs" / JOB / "chunks").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(NotFound):
        reader.read(VersionId(1, 7), 0, 0, [into])
    assert reader.part(VersionId(1, 7), 0)["rank"] == 0, "the connection is still of use"
    reader.close()


def test_a_disk_that_cannot_be_used_is_said_and_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    agent = Agent("node-a", "127.0.0.1", "memory://no-disk", TOKEN, disk=(f"file://{tmp_path}/file", JOB))
    assert agent.held() == ()
    agent.keep_on_disk([VersionId(1, 1)])
    noted = [message["record"]["name"] for _, message in agent.outbox._messages]
    assert noted == ["disk.unavailable"] * 2
    agent.close()
