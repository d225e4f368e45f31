"""Several ranks of a node restore together: what more than one wants is fetched once, and memory for it ends with it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint import shared_fetch
from ray_dr.checkpoint.reader import MemorySource, Source, read_state
from ray_dr.checkpoint.shared_source import Sharing
from ray_dr.errors import CheckpointError
from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.model.checkpoint import Box, Part
from ray_dr.model.journal import Record, Restored
from ray_dr.repository.layout import chunk_key
from ray_dr.repository.parts import write_part
from ray_dr.stores import memory
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.open import open_store
from ray_dr.stores.peer import PeerReader
from ray_dr.stores.wire import Connection
from ray_dr.train.restore import restore
from tests.unit.laid_out import (
    CHUNK,
    JOB,
    TOKEN,
    VERSION,
    WAIT_S,
    hold,
    network,
    put,
    saved,
    saved_network,
    stage_own,
    wait_until,
)

LOCALS = 4


@dataclass
class Reads:
    """What was read of the stores and of agents' memory, each chunk by its name or place."""

    store: Counter[str] = field(default_factory=Counter)
    peer: Counter[int] = field(default_factory=Counter)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    found = Reads()
    lock = threading.Lock()
    readinto, answer = MemoryStore.readinto, Agent._answer

    def count_store(self: MemoryStore, key: str, into: memoryview, *, start: int = 0) -> None:
        with lock:
            found.store[key.rpartition("/")[2]] += 1
        readinto(self, key, into, start=start)

    def count_peer(self: Agent, connection: Connection, header: dict[str, Any]) -> None:
        if header["op"] == "read":
            with lock:
                found.peer[header["start"]] += 1
        answer(self, connection, header)

    monkeypatch.setattr(MemoryStore, "readinto", count_store)
    monkeypatch.setattr(Agent, "_answer", count_peer)
    return found


@pytest.fixture
def url() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    memory.forget(name)


@pytest.fixture
def agents(url: str) -> Iterator[list[Agent]]:
    """The ranks' own node, and another one."""
    made = [Agent(name, "127.0.0.1", url, TOKEN) for name in ("node-a", "node-b")]
    yield made
    for agent in made:
        agent.close()


@dataclass
class Rank:
    """What one rank read."""

    buffers: dict[Box, memoryview]
    counted: dict[str, int]
    corrupt: list[str]

    def holds(self, part: Part, stream: bytearray) -> bool:
        places = {shard.box.name: shard.at for shard in part.shards}
        return all(
            bytes(view) == bytes(stream[places[box.name] + box.offsets[0] :][: box.size])
            for box, view in self.buffers.items()
        )


def read_all(
    agent: Agent, part: Part, sources: Callable[[], Sequence[Source]], *, wanted: Callable[[int], Sequence[Box]] | None = None,
    locals_: int = LOCALS, threads: int = 2, name: str = "1",
) -> list[Rank]:  # fmt: skip
    """What each of a node's ranks reads, all at once."""

    def one(local: int) -> Rank:
        boxes = wanted(local) if wanted else [shard.box for shard in part.shards]
        buffers = {box: memoryview(bytearray(box.size)) for box in boxes}
        corrupt: list[str] = []
        with Sharing(agent.address, TOKEN, restore=name, local=local, of=locals_) as sharing:
            found = sharing.join([part], buffers, {0: sources()})
            counted = read_state([part], buffers, found, threads=threads, turn=sharing.turn,
                                 on_corrupt=lambda error: corrupt.append(error.chunk))  # fmt: skip
            return Rank(buffers, sharing.recount(counted), corrupt)

    with ThreadPoolExecutor(locals_) as pool:
        return list(pool.map(one, range(locals_)))


def descriptors() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue  # the one that listed the directory
    return [target for target in found if "memfd:ray-dr" in target]


def mapped() -> int:
    """Mappings of shared-memory pools in this process."""
    return sum("memfd:ray-dr" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_ranks_of_a_node_fetch_every_chunk_of_a_replicated_state_once_from_the_store(
    agents: list[Agent], url: str, reads: Reads
) -> None:
    part, stream = saved()
    source = put(url, part, stream)
    ranks = read_all(agents[0], part, lambda: [source])
    assert all(rank.holds(part, stream) for rank in ranks)
    assert reads.store == {chunk.id: 1 for chunk in part.chunks}
    assert sum(rank.counted.get("store", 0) for rank in ranks) == part.size
    assert sum(rank.counted.get("shared", 0) for rank in ranks) == (LOCALS - 1) * part.size


def test_ranks_of_a_node_fetch_every_chunk_of_a_replicated_state_once_from_a_peer(
    agents: list[Agent], reads: Reads
) -> None:
    part, stream = saved()
    hold(agents[1], part, stream)
    readers = [PeerReader(agents[1].address, TOKEN) for _ in range(LOCALS)]
    waiting = iter(readers)
    ranks = read_all(agents[0], part, lambda: [next(waiting).source(VERSION, 0)])
    assert all(rank.holds(part, stream) for rank in ranks)
    assert reads.peer == {chunk.at: 1 for chunk in part.chunks}
    assert sum(rank.counted.get("peer", 0) for rank in ranks) == part.size
    for reader in readers:
        reader.close()


def test_what_only_one_rank_wants_never_passes_the_agent(agents: list[Agent], url: str, reads: Reads) -> None:
    part, stream = saved()
    source = put(url, part, stream)
    box = part.shards[0].box
    quarter = box.lengths[0] // LOCALS // CHUNK * CHUNK

    def mine(local: int) -> list[Box]:
        return [replace(box, offsets=(local * quarter,), lengths=(quarter,))]

    ranks = read_all(agents[0], part, lambda: [source], wanted=mine)
    assert all(rank.holds(part, stream) for rank in ranks)
    assert [rank.counted for rank in ranks] == [{"store": quarter}] * LOCALS
    assert descriptors() == []


def test_only_the_chunks_that_two_ranks_want_are_shared(agents: list[Agent], url: str, reads: Reads) -> None:
    part, stream = saved()
    source = put(url, part, stream)
    first, second = (shard.box for shard in part.shards)
    ranks = read_all(agents[0], part, lambda: [source], wanted=lambda local: [first, second] if local else [first], locals_=2)
    assert all(rank.holds(part, stream) for rank in ranks)
    assert sorted(reads.store) == sorted(chunk.id for chunk in part.chunks)
    assert set(reads.store.values()) == {1}
    assert sum(rank.counted.get("shared", 0) for rank in ranks) == 10 * CHUNK


def test_a_rank_with_its_own_memory_asks_nobody_and_nobody_waits_for_it(
    agents: list[Agent], url: str, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_fetch, "GATHER_S", WAIT_S * 10)  # waiting for one more would hang
    part, stream = saved()
    stored = put(url, part, stream)
    kinds: list[Source] = [MemorySource(memoryview(stream)), stored, stored]
    waiting = iter(kinds)
    ranks = read_all(agents[0], part, lambda: [next(waiting)], locals_=3)
    assert all(rank.holds(part, stream) for rank in ranks)
    assert {"memory": part.size} in [rank.counted for rank in ranks]
    assert reads.store == {chunk.id: 1 for chunk in part.chunks}


def test_a_corrupt_chunk_is_told_and_read_once_from_the_next_source(
    agents: list[Agent], url: str, reads: Reads
) -> None:
    part, stream = saved()
    bad = bytearray(stream)
    bad[3 * CHUNK + 7] ^= 1
    source = put(url, part, bad)
    hold(agents[1], part, stream)
    reader = PeerReader(agents[1].address, TOKEN)
    ranks = read_all(agents[0], part, lambda: [source, reader.source(VERSION, 0)])
    assert all(rank.holds(part, stream) for rank in ranks)
    assert set().union(*(rank.corrupt for rank in ranks)) == {part.chunks[3].id}
    assert reads.store == {chunk.id: 1 for chunk in part.chunks}
    assert reads.peer == {3 * CHUNK: 1}
    reader.close()


def test_a_missing_chunk_and_a_dead_peer_are_what_they_would_be_without_sharing(
    agents: list[Agent], url: str, reads: Reads
) -> None:
    part, stream = saved()
    source = put(url, part, stream)
    source.store.delete(chunk_key(JOB, part.chunks[2]))
    gone = PeerReader("127.0.0.1:1", TOKEN).source(VERSION, 0)
    ranks = read_all(agents[0], part, lambda: [gone, source, MemorySource(memoryview(stream))])
    assert all(rank.holds(part, stream) for rank in ranks)
    assert [rank.counted["memory"] for rank in ranks] == [CHUNK] * LOCALS
    with pytest.raises(CheckpointError, match=r"no good copy") as caught:
        read_all(agents[0], part, lambda: [gone, source], name="2")
    assert all(words in str(caught.value) for words in ("no such object", "cannot reach 127.0.0.1:1"))


def test_memory_is_bounded_and_given_back(
    agents: list[Agent], url: str, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_fetch, "POOL_BYTES", 32 * shared_fetch.PAGE_BYTES)
    most = 0
    create = shared_fetch.Pool.create

    def watch(size: int) -> Any:
        nonlocal most
        most += size
        return create(size)

    monkeypatch.setattr(shared_fetch.Pool, "create", staticmethod(watch))
    part, stream = saved(200 * CHUNK)
    source = put(url, part, stream)
    for attempt in range(3):
        reads.store.clear()
        ranks = read_all(agents[0], part, lambda: [source], name=str(attempt))
        assert all(rank.holds(part, stream) for rank in ranks)
        assert reads.store == {chunk.id: 1 for chunk in part.chunks}
        wait_until(lambda: descriptors() == [] and mapped() == 0)
    assert most == 3 * 32 * shared_fetch.PAGE_BYTES


def test_memory_is_given_back_after_errors_too(agents: list[Agent], url: str) -> None:
    part, stream = saved()
    stream[5] ^= 1
    source = put(url, part, stream)
    with pytest.raises(CheckpointError):
        read_all(agents[0], part, lambda: [source])
    gc.disable()  # what only the collector frees might stay for long
    try:
        wait_until(lambda: descriptors() == [] and mapped() == 0)
    finally:
        gc.enable()


HOLDER = """
import sys
from ray_dr.checkpoint.copies import StoredCopy
from ray_dr.model import codec
from ray_dr.model.checkpoint import Chunk
from ray_dr.stores.wire import connect
address, token, url = sys.argv[1:4]
chunks = [Chunk(id, 0, int(size)) for id, size in (text.split(":") for text in sys.argv[4:-2])]
keys = sys.argv[-2].split(",")
wish = connect(address, token.encode())
print("begin", flush=True)
wish.request({"op": "share", "restore": "1", "local": 1, "of": 2, "largest": 1000},
             b"".join(bytes.fromhex(chunk.id) for chunk in chunks))
held = []
for chunk, key in list(zip(chunks, keys))[: int(sys.argv[-1])]:
    held.append(connect(address, token.encode()))
    answer, _ = held[-1].request({"op": "take", "restore": "1", "local": 1, "chunk": codec.to_json(chunk),
                                  "copy": codec.to_json(StoredCopy(url, key), tagged=True)})
    assert "place" in answer, answer
print("held", flush=True)
sys.stdin.read()
"""
"""A rank that takes every place and reads none of them."""


def test_a_rank_that_is_killed_gives_up_the_places_it_held(
    agents: list[Agent], url: str, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_fetch, "POOL_BYTES", 3 * shared_fetch.PAGE_BYTES)
    monkeypatch.setattr(shared_fetch, "PATIENCE_S", 10.0)  # a place that stays held would be waited for in vain, each time
    monkeypatch.setattr(shared_fetch, "GATHER_S", WAIT_S)
    part, stream = saved()
    source = put(url, part, stream)
    named = [f"{chunk.id}:{chunk.size}" for chunk in part.chunks]
    keys = ",".join(chunk_key(JOB, chunk) for chunk in part.chunks)
    command = [sys.executable, "-c", HOLDER, agents[0].address, TOKEN.decode(), url, *named, keys, "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "begin\n"
        buffers = {shard.box: memoryview(bytearray(shard.box.size)) for shard in part.shards}
        with Sharing(agents[0].address, TOKEN, restore="1", local=0, of=2) as sharing:
            found = sharing.join([part], buffers, {0: [source]})
            assert holder.stdout.readline() == "held\n"
            with ThreadPoolExecutor(1) as pool:
                reading = pool.submit(read_state, [part], buffers, found, on_corrupt=pytest.fail)
                wait_until(lambda: reads.store.total() == 3)
                holder.send_signal(signal.SIGKILL)
                assert reading.result(WAIT_S) == {"store": part.size}
            assert Rank(buffers, {}, []).holds(part, stream)
            assert reads.store.total() >= len(part.chunks)
            assert sharing.recount({"store": part.size})["shared"] == 3 * CHUNK
    wait_until(lambda: descriptors() == [] and mapped() == 0)


def test_a_rank_that_lags_behind_does_not_stop_the_others(
    agents: list[Agent], url: str, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_fetch, "POOL_BYTES", 4 * shared_fetch.PAGE_BYTES)
    monkeypatch.setattr(shared_fetch, "PATIENCE_S", 0.01)
    part, stream = saved()
    source = put(url, part, stream)
    first_through = threading.Event()

    def one(local: int) -> dict[str, int]:
        buffers = {shard.box: memoryview(bytearray(shard.box.size)) for shard in part.shards}
        with Sharing(agents[0].address, TOKEN, restore="1", local=local, of=2) as sharing:
            found = sharing.join([part], buffers, {0: [source]})
            if local:
                assert first_through.wait(WAIT_S)
            counted = read_state([part], buffers, found, on_corrupt=pytest.fail)
            if not local:
                first_through.set()
            assert Rank(buffers, {}, []).holds(part, stream)
            return sharing.recount(counted)

    with ThreadPoolExecutor(2) as pool:
        quick, lagging = pool.map(one, range(2))
    assert quick == {"store": part.size}
    assert lagging.get("shared", 0) <= 4 * CHUNK


def test_a_rank_that_never_comes_is_not_waited_for_long(
    agents: list[Agent], url: str, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_fetch, "GATHER_S", 0.01)
    part, stream = saved()
    source = put(url, part, stream)
    ranks = read_all(agents[0], part, lambda: [source], locals_=1)
    assert ranks[0].counted == {"store": part.size}
    with Sharing(agents[0].address, TOKEN, restore="2", local=0, of=2) as sharing:
        assert sharing.join([part], [shard.box for shard in part.shards], {0: [source]}) == {0: (source,)}
    with Sharing(agents[0].address, TOKEN, restore="2", local=1, of=2) as sharing:  # the others are through
        assert sharing.join([part], [shard.box for shard in part.shards], {0: [source]}) == {0: (source,)}


def test_without_its_agent_a_rank_reads_for_itself(agents: list[Agent], url: str, reads: Reads) -> None:
    part, stream = saved()
    source = put(url, part, stream)
    joined = threading.Barrier(2)

    def one(local: int) -> dict[str, int]:
        buffers = {shard.box: memoryview(bytearray(shard.box.size)) for shard in part.shards}
        with Sharing(agents[0].address, TOKEN, restore="1", local=local, of=2) as sharing:
            found = sharing.join([part], buffers, {0: [source]})
            assert found != {0: (source,)}
            if joined.wait(WAIT_S) == 0:
                agents[0].close()
            joined.wait(WAIT_S)
            counted = read_state([part], buffers, found, on_corrupt=pytest.fail)
            assert Rank(buffers, {}, []).holds(part, stream)
            return sharing.recount(counted)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, range(2))) == [{"store": part.size}] * 2


# ------------------------------------------------------------------------------------------------ with `train.restore`


class Records:
    """What a restore tells the supervisor."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def record(self, record: Record) -> None:
        self.records.append(record)

    def mapped(self, path: str, size: int) -> None:
        """It has mapped nothing to stage into."""


@pytest.mark.parametrize("kind", ["peer", "store"])
def test_a_data_parallel_state_of_which_half_lies_elsewhere_crosses_the_network_once(
    agents: list[Agent], url: str, reads: Reads, kind: str
) -> None:
    parts = saved_network(2)
    (mine, stream), (theirs, other) = parts
    stage_own(agents[0], mine, stream)
    holders = {"0": (agents[0].address,)}
    refs = ()
    if kind == "peer":
        hold(agents[1], theirs, other)
        holders["1"] = (agents[1].address,)
    else:
        put(url, theirs, other)
        refs = tuple(write_part(open_store(url), JOB, part, term=1) for part, _ in parts)
    link = Records()
    expected = network(1).state_dict()

    def one(local: int) -> Restored:
        model = network(2)
        a = Assignment(
            JOB, 7, f"w{local}", local, LOCALS, local, "", agents[0].address, (), Origin(VERSION, 2, holders, refs),
            Cadence(0, 1, 0), "gloo", False, 0, LOCALS, url, local_world=LOCALS,
        )  # fmt: skip
        restored = restore(a, {"model": model}, TOKEN, open_store(url), link)
        for name, tensor in expected.items():
            assert torch.equal(model.state_dict()[name], tensor)
        return restored

    with ThreadPoolExecutor(LOCALS) as pool:
        restored = list(pool.map(one, range(LOCALS)))
    total: Counter[str] = Counter()
    for each in restored:
        total.update(each.sources)
    assert link.records == []
    assert total == {"memory": LOCALS * mine.size, kind: theirs.size, "shared": (LOCALS - 1) * theirs.size}
    chunks = len(theirs.chunks)
    assert (reads.peer.total(), reads.store.total()) == ((chunks, 0) if kind == "peer" else (0, chunks))
