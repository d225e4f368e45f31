"""Hashing ahead: what was found good is copied as it is, what was not is found out, and nothing is good for ever."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint import verified
from ray_dr.errors import CheckpointError, NotFound
from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.model.checkpoint import CHUNK_BYTES, Part, VersionId
from ray_dr.model.journal import Restored
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.peer import PeerReader, Place
from ray_dr.train.link import Link
from ray_dr.train.restore import restore
from ray_dr.train.staging import Planner, stage
from ray_dr.train.state import flatten
from tests.unit.test_pools import assignment
from tests.unit.test_pools import mapped as mappings

TOKEN = b"secret"
WAIT_S = 60.0
V1, V2 = VersionId(1, 1), VersionId(1, 2)
ELEMENTS = 5 * 2**20
"""Float32 elements of the larger tensor: with the smaller one, three chunks."""


class Node:
    """An agent, a worker's link to it, and the model whose state the worker stages."""

    def __init__(self, name: str) -> None:
        self.agent = Agent(name, "127.0.0.1", f"memory://{name}", TOKEN)
        self.link = Link(self.agent.address, TOKEN, "w0", 1)
        self.model = torch.nn.Module()
        self.model.register_buffer("a", torch.arange(1000, dtype=torch.float32))
        self.model.register_buffer("b", torch.arange(ELEMENTS, dtype=torch.float32))

    def save(self, version: VersionId, copy_to: str = "") -> None:
        flat = flatten({"model": self.model}, rank=0, world=1)
        plan = Planner(0, 1).plan(flat)
        if not self.link.asked_for(plan.size):
            self.link.open_pool(plan.size)
        taken = self.link.take_slot(plan.size, WAIT_S)
        assert taken is not None
        stage(plan, flat, taken[1])
        part = Part(version, 0, 1, plan.size, plan.shards, (), flat.scalars)
        self.link.staged(taken[0], part, staged_at=time.time(), stall_s=0.0, to={},
                         copy_to=(copy_to,) if copy_to else ())  # fmt: skip
        while not any(held.version == version for held in self.agent.vault.held()):
            assert self.agent.writer.settle(WAIT_S)
        assert self.agent.writer.drain(WAIT_S)

    def flip(self, version: VersionId, at: int) -> None:
        """One bit of the stream in shared memory."""
        holding = self.agent.vault.read(version, 0)
        holding.view[at] ^= 1
        self.agent.vault.done(holding)

    def place(self, version: VersionId) -> Place:
        reader = PeerReader(self.agent.address, TOKEN)
        found = reader.place(version, 0)
        reader.close()
        assert found is not None
        return found

    def part(self, version: VersionId) -> Part:
        holding = self.agent.vault.read(version, 0)
        assert holding.part is not None
        self.agent.vault.done(holding)
        return holding.part

    def restore(self, version: VersionId, *, others: tuple[str, ...] = (), beside: Link | None = None) -> Restored:
        origin = Origin(version, 1, {"0": (self.agent.address, *others)})
        a = Assignment("j", 2, "w0", 0, 1, 0, "", self.agent.address, (), origin, Cadence(0, 0, 0), "gloo", False, 0, 1, "")
        return restore(a, {"model": self.model}, TOKEN, MemoryStore(), beside or self.link)

    def right(self) -> bool:
        state: dict[str, Any] = self.model.state_dict()
        return all(torch.equal(tensor, torch.arange(len(tensor), dtype=torch.float32)) for tensor in state.values())

    def close(self) -> None:
        self.link.close()
        self.agent.close()


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node("node-a")
    yield made
    made.close()


@pytest.fixture
def peer() -> Iterator[Node]:
    made = Node("node-b")
    yield made
    made.close()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what a reader hashes itself."""
    from ray_dr.checkpoint import reader

    found: list[int] = []
    check = reader._check
    monkeypatch.setattr(reader, "_check", lambda job, *rest: (found.append(job.chunk.size), check(job, *rest)))
    return found


def all_good(part: Part) -> dict[int, str]:
    return {chunk.at: chunk.id for chunk in part.chunks}


def test_what_was_hashed_ahead_is_restored_without_hashing_it_again(node: Node, hashed: list[int]) -> None:
    node.save(V1)
    node.agent.begin(V1)
    for buffer in node.model.buffers():
        buffer.zero_()
    restored = node.restore(V1)
    assert node.right()
    assert hashed == []
    assert restored.sources == {"memory": node.part(V1).size}


def test_without_an_attempt_begun_the_reader_hashes_all_itself(node: Node, hashed: list[int]) -> None:
    node.save(V1)
    assert node.place(V1).good == {}
    for buffer in node.model.buffers():
        buffer.zero_()
    node.restore(V1)
    assert node.right()
    assert sum(hashed) == node.part(V1).size


@pytest.mark.parametrize("at", [0, 2**20, CHUNK_BYTES, 2 * CHUNK_BYTES + 5])
def test_a_bit_that_flipped_before_the_attempt_began_is_found_and_read_from_the_peer(node: Node, peer: Node, at: int) -> None:
    node.save(V1, copy_to=peer.agent.address)
    node.flip(V1, at)
    node.agent.begin(V1)
    bad = at // CHUNK_BYTES * CHUNK_BYTES
    assert node.place(V1).good == {place: id for place, id in all_good(node.part(V1)).items() if place != bad}
    for buffer in node.model.buffers():
        buffer.zero_()
    restored = node.restore(V1, others=(peer.agent.address,))
    assert node.right()
    size = next(chunk.size for chunk in node.part(V1).chunks if chunk.at == bad)
    assert restored.sources == {"memory": node.part(V1).size - size, "peer": size}


def test_a_flipped_bit_and_no_other_copy_is_an_error_that_is_journaled(node: Node) -> None:
    node.save(V1)
    node.flip(V1, 9)
    node.agent.begin(V1)
    with pytest.raises(CheckpointError, match="no good copy"):
        node.restore(V1)
    deadline = time.monotonic() + WAIT_S
    while not any(m.get("record", {}).get("name") == "chunk.corrupt" for _, m in tuple(node.agent.outbox._messages)):
        assert time.monotonic() < deadline


def test_a_bit_that_flips_after_it_was_hashed_is_found_when_the_next_attempt_begins(node: Node) -> None:
    node.save(V1)
    node.agent.begin(V1)
    assert node.place(V1).good == all_good(node.part(V1))
    node.flip(V1, 9)
    assert 0 in node.place(V1).good, "the window that the module's text tells of"
    node.agent.begin(V1)
    assert 0 not in node.place(V1).good


def test_a_place_is_told_when_all_of_it_was_looked_at(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: memoryview, max_threads: int) -> Any:
        while not asked.wait(0.01):
            pass
        return blake3(data, max_threads=max_threads)

    node.save(V1)
    asked = threading.Event()
    monkeypatch.setattr(verified, "blake3", slow)
    threading.Timer(0.1, asked.set).start()
    node.agent.begin(V1)
    assert node.place(V1).good == all_good(node.part(V1))


def test_only_the_version_named_is_looked_through_and_its_memory_comes_free_again(node: Node) -> None:
    node.save(V1)
    node.agent.begin(V1)
    assert node.place(V1).good
    node.save(V2)
    node.agent.vault.completed(V2)
    assert node.place(V2).good == {}
    with pytest.raises(NotFound):
        node.agent.vault.read(V1, 0)
    node.agent.begin(None)
    assert node.agent.vault.held() == ()


def test_what_is_staged_again_under_the_same_name_is_not_taken_for_what_was_hashed(node: Node) -> None:
    node.save(V1)
    node.agent.begin(V1)
    assert node.place(V1).good
    before = node.place(V1)
    node.save(V1)
    after = before
    while after.offset == before.offset:
        with contextlib.suppress(NotFound):  # it is being sealed
            after = node.place(V1)
    assert after.good == {}


def test_a_process_that_staged_nothing_maps_the_memory_anew(node: Node, hashed: list[int]) -> None:
    node.save(V1)
    node.agent.begin(V1)
    other = Link(node.agent.address, TOKEN, "w1", 2)
    assert other.mapped(node.place(V1).path, 1) is None
    for buffer in node.model.buffers():
        buffer.zero_()
    node.restore(V1, beside=other)
    assert node.right()
    assert hashed == []
    other.close()


def test_the_pool_that_a_worker_stages_into_is_mapped_once(node: Node) -> None:
    node.save(V1)
    place, part = node.place(V1), node.part(V1)
    mapped = node.link.mapped(place.path, place.offset + part.size)
    assert mapped is not None
    holding = node.agent.vault.read(V1, 0)
    assert np.array_equal(np.frombuffer(mapped[place.offset :], np.uint8), np.frombuffer(holding.view, np.uint8))
    node.agent.vault.done(holding)
    before = mappings()
    origin = Origin(V1, 1, {"0": (node.agent.address,)})
    node.link.map_ahead(assignment(node.agent.address, origin), TOKEN).join()
    assert mappings() == before
    assert node.link.mapped(place.path, 2**40) is None
    assert node.link.mapped("/proc/1/fd/3", 1) is None
