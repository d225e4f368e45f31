"""What a node's agent keeps in memory, when it gives slots back, and what survives a worker's death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ray_dr.checkpoint.memory import attach
from ray_dr.checkpoint.vault import GIVE_UP_S, KEPT_COPIES, SLOTS, Holding, Vault
from ray_dr.errors import NotFound
from ray_dr.model.checkpoint import Part, StepRecord, VersionId


class Node:
    """A vault and one worker's view of its slots."""

    def __init__(self, size: int = 1000, worker: str = "w0") -> None:
        self.now = 0.0
        self.vault = Vault("node-a", self._came_free, lambda: self.now)
        self.worker, self.size = worker, size
        self.open(size)

    def open(self, size: int) -> None:
        self.path, self.per_slot, count, free = self.vault.open_pool(self.worker, size)
        self.free = set(free)
        self.slots = attach(self.path, self.per_slot * count)

    def stage(self, version: VersionId, rank: int = 0) -> Holding:
        slot = min(self.free)
        self.free.discard(slot)
        start = slot * self.per_slot
        self.slots[start : start + self.size] = fill(version, self.size)
        return self.vault.stage(self.worker, slot, version=version, rank=rank, world=1, size=self.size)

    def save(self, version: VersionId, rank: int = 0) -> None:
        if not self.free:
            self.now += GIVE_UP_S
            self.vault.want(self.worker)
        holding = self.stage(version, rank)
        holding.part = part_of(version, rank, self.size)
        self.vault.done(holding)

    @property
    def versions(self) -> set[VersionId]:
        return {held.version for held in self.vault.held()}

    def _came_free(self, worker: str, slot: int, path: str) -> None:
        if path == self.path and worker == self.worker:
            assert slot not in self.free, "given back twice"
            self.free.add(slot)


def fill(version: VersionId, size: int) -> bytes:
    return bytes([(7 * version.step + version.attempt) % 251]) * size


def part_of(version: VersionId, rank: int, size: int) -> Part:
    return Part(version, rank, 1, size, (), (), {}, (StepRecord(version.attempt, version.step, rank, 1, (), "", 0.1),))


def v(step: int, attempt: int = 1) -> VersionId:
    return VersionId(attempt, step)


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.vault.close()


def content(vault: Vault, version: VersionId, rank: int = 0) -> bytes:
    holding = vault.read(version, rank)
    data = bytes(holding.view)
    vault.done(holding)
    return data


def test_a_staged_part_counts_only_once_it_is_sealed(node: Node) -> None:
    holding = node.stage(v(1))
    with pytest.raises(NotFound):
        node.vault.read(v(1), 0)
    holding.part = part_of(v(1), 0, node.size)
    node.vault.done(holding)
    assert content(node.vault, v(1)) == fill(v(1), node.size)


def test_the_newest_complete_version_is_never_given_back(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    for step in range(2, 20):
        node.save(v(step))
        assert content(node.vault, v(1)) == fill(v(1), node.size)


def test_what_is_older_than_the_newest_complete_version_comes_free(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    node.save(v(2))
    node.vault.completed(v(2))
    assert node.versions == {v(2)}
    assert len(node.free) == SLOTS - 1


def test_an_incomplete_version_goes_when_its_slot_is_wanted_and_it_had_its_time(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    node.save(v(2))
    node.vault.want("w0")
    assert node.versions == {v(1), v(2)}
    assert not node.free, "it may become complete any moment"
    node.now += GIVE_UP_S
    node.vault.want("w0")
    assert node.versions == {v(1)}
    assert len(node.free) == 1


def test_a_version_that_another_rank_went_without_goes_at_once_also_when_it_comes_later(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    node.save(v(2))
    node.vault.abandoned(v(2))
    assert node.versions == {v(1)}
    node.vault.abandoned(v(3))
    node.vault.abandoned(v(1))
    node.save(v(3))
    assert node.versions == {v(1)}
    assert len(node.free) == 1


def test_a_version_completed_after_this_node_gave_it_up_makes_nothing_go(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    node.save(v(2))
    node.save(v(3))
    node.vault.completed(v(2))
    assert node.versions == {v(1), v(3)}


@pytest.mark.parametrize("copied", [True, False])
def test_while_a_slow_store_reads_the_older_version_the_newest_one_is_spared_only_if_peers_have_it(
    node: Node, copied: bool
) -> None:
    node.save(v(1))
    storing = node.vault.read(v(1), 0)
    node.save(v(2))
    node.vault.completed(v(2), copied=copied)
    node.now += GIVE_UP_S
    node.vault.want("w0")
    assert len(node.free) == int(copied)
    assert bytes(storing.view) == fill(v(1), node.size)
    node.vault.done(storing)
    assert len(node.free) == int(copied) + 1
    assert node.versions == (set() if copied else {v(2)})


def test_the_newest_complete_version_stays_while_a_newer_one_is_sealed(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1), copied=True)
    sealing = node.stage(v(2))
    node.now += GIVE_UP_S
    node.vault.want("w0")
    assert v(1) in node.versions
    assert not node.free
    node.vault.done(sealing)


def test_a_save_that_waits_gets_the_slot_of_the_newest_version_while_a_slow_store_reads_the_older(node: Node) -> None:
    node.save(v(1))
    storing = node.vault.read(v(1), 0)
    node.save(v(2))
    node.vault.completed(v(2))
    node.vault.want("w0", waiting=True)
    assert len(node.free) == 1
    assert content(node.vault, v(1)) == fill(v(1), node.size), "what is left should the save to come be cut off"
    node.vault.done(storing)


def test_a_slot_of_a_pool_that_was_replaced_is_not_taken_for_the_new_ones(node: Node) -> None:
    old = node.path
    node.open(10_000)
    with pytest.raises(NotFound, match="has another pool"):
        node.vault.stage("w0", 0, version=v(1), rank=0, world=1, size=1000, path=old)


def test_two_versions_that_never_complete_do_not_hold_up_the_next(node: Node) -> None:
    for step in range(1, 9):
        node.save(v(step))
    assert node.versions == {v(7), v(8)}


def test_a_reader_keeps_its_bytes_until_it_is_done(node: Node) -> None:
    node.save(v(1))
    reading = node.vault.read(v(1), 0)
    node.save(v(2))
    node.vault.completed(v(2))
    assert bytes(reading.view) == fill(v(1), node.size)
    assert len(node.free) == 0
    node.vault.done(reading)
    assert len(node.free) == 1
    with pytest.raises(NotFound):
        node.vault.read(v(1), 0)


def test_a_new_attempt_keeps_only_the_version_it_restores(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    node.save(v(2))
    node.vault.begin(v(1))
    assert node.versions == {v(1)}
    assert len(node.free) == SLOTS - 1
    for step in range(2, 9):
        node.save(v(step, attempt=2))
    assert content(node.vault, v(1)) == fill(v(1), node.size)


def test_a_new_attempt_from_scratch_keeps_nothing(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    node.vault.begin(None)
    assert node.versions == set()
    assert len(node.free) == SLOTS


def test_a_part_that_could_not_be_sealed_gives_its_slot_back(node: Node) -> None:
    holding = node.stage(v(1))
    node.vault.abandon(holding)
    node.vault.done(holding)
    assert len(node.free) == SLOTS


def test_a_larger_state_gets_larger_slots_and_the_old_version_stays(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    old, node.size = node.size, 10_000
    node.open(10_000)
    node.save(v(2))
    assert content(node.vault, v(1)) == fill(v(1), old)
    assert content(node.vault, v(2)) == fill(v(2), 10_000)


def test_a_smaller_state_is_staged_into_the_slots_that_are_there(node: Node) -> None:
    path = node.path
    node.save(v(1))
    node.open(10)
    assert node.path == path
    assert len(node.free) == SLOTS - 1


def test_the_pool_of_a_dead_worker_goes_with_its_last_version(node: Node) -> None:
    node.save(v(1))
    node.vault.completed(v(1))
    node.vault.forget_worker("w0")
    assert content(node.vault, v(1)) == fill(v(1), node.size)
    other = Node.__new__(Node)
    other.vault, other.worker, other.size = node.vault, "w1", node.size
    other.open(other.size)
    other.save(v(2))
    node.vault.completed(v(2))
    assert len(node.vault._pools) == 1


def test_copies_for_peers_are_kept_of_the_complete_version_and_of_the_newest(node: Node) -> None:
    for step in range(1, 10):
        buffer = node.vault.buffer(node.size)
        buffer.view[:] = fill(v(step), node.size)
        node.vault.keep_copy(part_of(v(step), 1, node.size), buffer)
        if step == 4:
            node.vault.completed(v(4))
    assert sorted(version.step for version in node.versions) == [4, 9]
    assert content(node.vault, v(9), rank=1) == fill(v(9), node.size)


def test_a_copy_that_is_read_is_not_overwritten_by_the_next(node: Node) -> None:
    def copy(step: int) -> None:
        buffer = node.vault.buffer(node.size)
        buffer.view[:] = fill(v(step), node.size)
        node.vault.keep_copy(part_of(v(step), 1, node.size), buffer)

    copy(1)
    reading = node.vault.read(v(1), 1)
    for step in range(1, 9):
        copy(step)
    assert bytes(reading.view) == fill(v(1), node.size)
    node.vault.done(reading)


def test_step_records_travel_with_their_part(node: Node) -> None:
    node.save(v(4))
    held = node.vault.read(v(4), 0)
    assert held.part is not None
    assert [record.step for record in held.part.records] == [4]
    node.vault.done(held)


def test_a_thousand_saves_take_no_more_memory_than_the_first_few(node: Node) -> None:
    def memory() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), int(Path("/proc/self/statm").read_text().split()[1])

    for step in range(1, 1001):
        node.save(v(step))
        if step % 3:
            node.vault.completed(v(step))
        buffer = node.vault.buffer(node.size)
        node.vault.keep_copy(part_of(v(step), 1, node.size), buffer)
        if step == 20:
            before = memory()
    files, pages = memory()
    assert files == before[0]
    assert pages - before[1] < 500
    assert len(node.vault._pools) == 1
    assert len(node.vault._free) <= KEPT_COPIES


STAGE_AND_WAIT = """
import sys, time
from ray_dr.checkpoint.memory import attach
path, size = sys.argv[1], int(sys.argv[2])
slot = attach(path, size)
slot[:size] = b"precious" * (size // 8)
print("staged", flush=True)
time.sleep(600)
"""


def test_bytes_staged_by_a_process_that_is_killed_stay(node: Node) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", STAGE_AND_WAIT, node.path, str(node.size)], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "staged\n"
    holding = node.vault.stage("w0", 0, version=v(7), rank=0, world=1, size=node.size)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait(10)
    worker.stdout.close()
    node.vault.forget_worker("w0")
    holding.part = part_of(v(7), 0, node.size)
    node.vault.done(holding)
    assert content(node.vault, v(7)) == b"precious" * (node.size // 8)


class VaultMachine(RuleBasedStateMachine):
    """Any order of saves, readers, completions and new attempts: bytes that are promised are there and right."""

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(size=64)
        self.attempt, self.step = 1, 0
        self.complete: VersionId | None = None
        self.staged: list[Holding] = []
        self.reading: list[Holding] = []

    @precondition(lambda self: self.node.free)
    @rule()
    def stage(self) -> None:
        self.step += 1
        self.staged.append(self.node.stage(v(self.step, self.attempt)))

    @precondition(lambda self: self.staged)
    @rule()
    def seal(self) -> None:
        holding = self.staged.pop(0)
        holding.part = part_of(holding.version, 0, 64)
        self.node.vault.done(holding)

    @precondition(lambda self: self.staged)
    @rule()
    def fail(self) -> None:
        holding = self.staged.pop()
        self.node.vault.abandon(holding)
        self.node.vault.done(holding)

    @rule(data=st.data())
    def complete_one(self, data: st.DataObject) -> None:
        held = sorted(version for version in self.node.versions if version.attempt == self.attempt)
        if held:
            version = data.draw(st.sampled_from(held))
            self.node.vault.completed(version)
            self.complete = max(version, self.complete or version)

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        if self.node.versions:
            self.reading.append(self.node.vault.read(data.draw(st.sampled_from(sorted(self.node.versions))), 0))

    @precondition(lambda self: self.reading)
    @rule()
    def finish_reading(self) -> None:
        self.node.vault.done(self.reading.pop())

    @rule()
    def new_attempt(self) -> None:
        self.attempt += 1
        self.node.vault.begin(self.complete)

    @rule(late=st.booleans())
    def want(self, late: bool) -> None:
        self.node.now += GIVE_UP_S * late
        self.node.vault.want("w0")

    @invariant()
    def the_complete_version_is_there(self) -> None:
        if self.complete is not None:
            assert content(self.node.vault, self.complete) == fill(self.complete, 64)

    @invariant()
    def readers_see_their_own_bytes(self) -> None:
        for holding in (*self.reading, *self.staged):
            assert bytes(holding.view) == fill(holding.version, 64)

    @invariant()
    def slots_are_free_or_in_use(self) -> None:
        used = {h.slot.index for h in (*self.node.vault._holdings.values(), *self.node.vault._reading) if h.slot}
        assert used.isdisjoint(self.node.free)
        assert used | self.node.free == set(range(SLOTS))

    def teardown(self) -> None:
        self.node.vault.close()


VaultMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_any_history_keeps_the_vaults_promises = VaultMachine.TestCase
