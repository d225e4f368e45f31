"""Several ranks of a node restore together: what more than one wants is fetched once, and memory for it ends with it."""

from __future__ import annotations

import contextlib
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

import numpy as np
import pytest
import torch

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint import copies, reader, shared_fetch
from ray_dr.checkpoint.copies import Copies, StoredCopy
from ray_dr.checkpoint.memory import Pool
from ray_dr.checkpoint.reader import Lending, MemorySource, Source, read_state
from ray_dr.checkpoint.save_plan import plan_save, replicated
from ray_dr.checkpoint.shared_source import Sharing
from ray_dr.errors import CheckpointError, CorruptChunk
from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.model.checkpoint import Box, Chunk, Part
from ray_dr.model.journal import Record, Restored
from ray_dr.repository.chunks import chunk_id
from ray_dr.repository.layout import chunk_key
from ray_dr.repository.parts import write_part
from ray_dr.stores import memory
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.open import open_store
from ray_dr.stores.peer import PeerReader
from ray_dr.stores.wire import Connection
from ray_dr.train.pools import Pools
from ray_dr.train.restore import restore
from tests.unit.laid_out import (
    CHUNK,
    FOLDER,
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
    lists: Counter[str] = field(default_factory=Counter)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is given up because this machine is busy."""
    monkeypatch.setattr(shared_fetch, "GATHER_S", WAIT_S)
    monkeypatch.setattr(shared_fetch, "PATIENCE_S", WAIT_S)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    found = Reads()
    lock = threading.Lock()
    readinto, answer, get = MemoryStore.readinto, Agent._answer, MemoryStore.get

    def count_store(self: MemoryStore, key: str, into: memoryview, *, start: int = 0) -> None:
        with lock:
            found.store[key.rpartition("/")[2]] += 1
        readinto(self, key, into, start=start)

    def count_list(self: MemoryStore, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        with lock:
            found.lists[key] += 1
        return get(self, key, start=start, size=size)

    def count_peer(self: Agent, connection: Connection, header: dict[str, Any]) -> None:
        if header["op"] == "read":
            with lock:
                found.peer[header["start"]] += 1
        answer(self, connection, header)

    monkeypatch.setattr(MemoryStore, "readinto", count_store)
    monkeypatch.setattr(MemoryStore, "get", count_list)
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
            counted = read_state([part], buffers, found, threads=threads,
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
    return sum("memfd:ray-dr " in line for line in Path("/proc/self/maps").read_text().splitlines())


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
    for each in readers:
        each.close()


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


def test_every_chunk_is_hashed_once_by_the_agent_and_not_again_by_the_ranks(
    agents: list[Agent], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, stream = saved()
    source = put(url, part, stream)
    hashed: Counter[str] = Counter()
    lock = threading.Lock()

    def count(where: Any, name: str) -> None:
        make = where.blake3

        def counting(*args: Any, **options: Any) -> Any:
            with lock:
                hashed[name] += 1
            return make(*args, **options)

        monkeypatch.setattr(where, "blake3", counting)

    count(copies, "agent")
    count(reader, "rank")
    ranks = read_all(agents[0], part, lambda: [source])
    assert all(rank.holds(part, stream) for rank in ranks)
    assert hashed == {"agent": len(part.chunks)}


@contextlib.contextmanager
def lending(agent: Agent, part: Part, source: Source, *, name: str = "1") -> Iterator[list[Lending]]:
    """The source as two ranks of a node have it that both want all of the part."""
    boxes = [shard.box for shard in part.shards]
    with (
        Sharing(agent.address, TOKEN, restore=name, local=0, of=2) as one,
        Sharing(agent.address, TOKEN, restore=name, local=1, of=2) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        joined = list(pool.map(lambda sharing: sharing.join([part], boxes, {0: [source]})[0][0], (one, other)))
        assert all(isinstance(source, Lending) for source in joined)
        yield joined  # type: ignore[misc]


def test_any_flipped_bit_is_found_before_a_rank_gets_the_chunk(agents: list[Agent], url: str) -> None:
    part, stream = saved(2 * CHUNK)
    source = put(url, part, stream)
    chunk = part.chunks[1]
    for at in range(0, chunk.size, 13):
        bad = stream[chunk.at : chunk.at + chunk.size]
        bad[at] ^= 1 << at % 8
        source.store.put(chunk_key(JOB, chunk), bad)
        with lending(agents[0], part, source, name=str(at)) as ranks:
            for rank in ranks:
                with pytest.raises(CorruptChunk), rank.lend(0, chunk) as lent:
                    pytest.fail(f"lent {lent!r}")


def test_the_ranks_map_what_the_agent_verified_to_read_only(agents: list[Agent], url: str) -> None:
    part, stream = saved()
    with lending(agents[0], part, put(url, part, stream)) as ranks, ranks[0].lend(0, part.chunks[3]) as lent:
        assert lent is not None
        assert lent.readonly
        assert bytes(lent) == bytes(stream[3 * CHUNK : 4 * CHUNK])


def test_ranks_that_each_need_a_part_of_a_chunk_share_it(agents: list[Agent], url: str, reads: Reads) -> None:
    shape = (50, 400)
    plan = plan_save([replicated("w", "int8", shape, rank=0, world=1)], rank=0, world=1)
    stream = bytearray(os.urandom(plan.size))
    runs = [(at, stream[at : at + CHUNK]) for at in range(0, plan.size, CHUNK)]
    chunks = tuple(Chunk(chunk_id(run), at, len(run), FOLDER) for at, run in runs)
    part = Part(VERSION, 0, 1, plan.size, plan.shards, chunks)
    source = put(url, part, stream)

    def mine(local: int) -> list[Box]:
        return [Box("w", "int8", shape, (0, 100 * local), (50, 100))]

    ranks = read_all(agents[0], part, lambda: [source], wanted=mine)
    whole = np.frombuffer(stream, np.int8).reshape(shape)
    for local, rank in enumerate(ranks):
        columns = whole[:, 100 * local : 100 * local + 100]
        assert bytes(next(iter(rank.buffers.values()))) == columns.tobytes()
    assert reads.store == {chunk.id: 1 for chunk in part.chunks}


@pytest.mark.parametrize("kind", ["disk", "second"])
def test_a_nodes_own_disk_and_a_second_store_are_read_once_too(
    agents: list[Agent], url: str, reads: Reads, kind: Any
) -> None:
    part, stream = saved()
    source = replace(put(url, part, stream), kind=kind)
    ranks = read_all(agents[0], part, lambda: [source])
    assert all(rank.holds(part, stream) for rank in ranks)
    assert reads.store == {chunk.id: 1 for chunk in part.chunks}
    assert sum(rank.counted.get(kind, 0) for rank in ranks) == part.size


def test_without_memory_for_places_each_rank_reads_for_itself(
    agents: list[Agent], url: str, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Pool, start: int, size: int) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(Pool, "reserve", refuse)
    part, stream = saved()
    source = put(url, part, stream)
    ranks = read_all(agents[0], part, lambda: [source])
    assert all(rank.holds(part, stream) for rank in ranks)
    assert [rank.counted for rank in ranks] == [{"store": part.size}] * LOCALS


def test_ranks_in_step_make_do_with_one_place(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    reserve = Pool.reserve

    def note(self: Pool, start: int, size: int) -> None:
        reserved.append(start)
        reserve(self, start, size)

    monkeypatch.setattr(Pool, "reserve", note)
    part, stream = saved()
    source = put(url, part, stream)
    gathering = shared_fetch._Gathering(2, Copies(TOKEN, [lambda: source.store]), kept := [])
    for local in range(2):
        gathering.come(local, [chunk.id for chunk in part.chunks], CHUNK)
    gathering.form()
    for chunk in part.chunks:
        for local in range(2):
            taken = gathering.take(local, chunk, StoredCopy(url, chunk_key(JOB, chunk)))
            assert isinstance(taken, tuple)
            assert bytes(taken[0].view[: chunk.size]) == bytes(stream[chunk.at : chunk.at + chunk.size])
            gathering.release(taken[0])
    gathering.close()
    assert len(reserved) == 1
    kept.pop().close()


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


def held_bytes() -> int:
    """Memory of all pools of this process."""
    found: dict[int, int] = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:ray-dr" in os.readlink(entry):
                found[entry.stat().st_ino] = entry.stat().st_blocks * 512
    return sum(found.values())


def test_memory_is_bounded_and_what_is_not_kept_for_the_next_restore_is_given_back(
    agents: list[Agent], url: str, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_fetch, "POOL_BYTES", 32 * shared_fetch.PAGE_BYTES)
    monkeypatch.setattr(shared_fetch, "KEPT_BYTES", 2 * shared_fetch.PAGE_BYTES)
    monkeypatch.setattr(shared_fetch, "GROW_S", 0.0)
    most: list[int] = []
    sparse = Pool.sparse

    def watch(size: int) -> Any:
        most.append(size)
        return sparse(size)

    monkeypatch.setattr(Pool, "sparse", staticmethod(watch))
    part, stream = saved(200 * CHUNK)
    source = put(url, part, stream)
    for attempt in range(3):
        reads.store.clear()
        ranks = read_all(agents[0], part, lambda: [source], name=str(attempt))
        assert all(rank.holds(part, stream) for rank in ranks)
        assert reads.store == {chunk.id: 1 for chunk in part.chunks}
        wait_until(lambda: held_bytes() <= 2 * shared_fetch.PAGE_BYTES and mapped() == 1)
    assert most == [32 * shared_fetch.PAGE_BYTES]
    agents[0].close()
    assert (descriptors(), mapped()) == ([], 0)


def test_memory_is_given_back_after_errors_too(agents: list[Agent], url: str) -> None:
    part, stream = saved()
    stream[5] ^= 1
    source = put(url, part, stream)
    with pytest.raises(CheckpointError):
        read_all(agents[0], part, lambda: [source])
    gc.disable()  # what only the collector frees might stay for long
    try:
        wait_until(lambda: mapped() <= 1)
        agents[0].close()
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
    agents[0].close()
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
        self.pools = Pools()

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
    wanted = {ref.key: LOCALS for ref in refs if ref.rank == theirs.rank}
    assert reads.lists == wanted, "each rank reads each list once, and none of what memory has"
    assert (reads.peer.total(), reads.store.total()) == ((chunks, 0) if kind == "peer" else (0, chunks))
