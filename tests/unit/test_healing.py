"""A copy that a restore found damaged is good again soon after, and nothing else was written over."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.copies import HeldCopy
from ray_dr.checkpoint.healing import Damages
from ray_dr.checkpoint.reader import MemorySource, Source, read_state
from ray_dr.errors import NotFound, StoreError
from ray_dr.model import codec
from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.model.checkpoint import Part
from ray_dr.repository.chunks import chunk_id, get_chunk
from ray_dr.repository.layout import chunk_key
from ray_dr.repository.parts import write_part
from ray_dr.stores import memory
from ray_dr.stores.base import Store
from ray_dr.stores.open import open_store
from ray_dr.stores.peer import PeerReader
from ray_dr.train.link import Link
from ray_dr.train.restore import restore
from tests.unit.laid_out import (
    CHUNK,
    JOB,
    TOKEN,
    VERSION,
    hold,
    network,
    put,
    saved,
    saved_network,
    stage_own,
    wait_until,
)

BAD = 3
"""The chunk that is damaged."""


@pytest.fixture
def url() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    memory.forget(name)


@pytest.fixture
def agents(url: str) -> Iterator[list[Agent]]:
    """The rank's own node, and another one."""
    made = [Agent(name, "127.0.0.1", url, TOKEN) for name in ("node-a", "node-b")]
    yield made
    for agent in made:
        agent.close()


def told(agent: Agent, name: str) -> list[dict[str, Any]]:
    """The fields of the notes of one name that an agent has for the supervisor."""
    records = [message.get("record", {}) for _, message in tuple(agent.outbox._messages)]
    return [record["fields"] for record in records if record.get("name") == name]


def wait_for_note(agent: Agent, name: str) -> dict[str, Any]:
    wait_until(lambda: bool(told(agent, name)))
    (fields,) = told(agent, name)
    return fields


def held(agent: Agent, part: Part) -> bytes:
    """A part as an agent gives it to others."""
    into = bytearray(part.size)
    reader = PeerReader(agent.address, TOKEN)
    reader.read(part.version, part.rank, 0, [memoryview(into)])
    reader.close()
    return bytes(into)


def restore_network(agents: Sequence[Agent], url: str, origin: Origin) -> None:
    link = Link(agents[0].address, TOKEN, "w0", 1)
    a = Assignment(JOB, 7, "w0", 0, 1, 0, "", agents[0].address, (), origin, Cadence(0, 1, 0), "gloo", False, 0, 1, url)
    model = network(2)
    restore(a, {"model": model}, TOKEN, open_store(url), link)
    for name, tensor in network(1).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    link.close()


@pytest.mark.parametrize("where", ["own", "peer"])
def test_a_chunk_that_is_damaged_in_memory_is_repaired_from_the_store(
    agents: list[Agent], url: str, where: str
) -> None:
    ((part, stream),) = saved_network(1)
    put(url, part, stream)
    refs = (write_part(open_store(url), JOB, part, term=1),)
    good = bytes(stream)
    stream[BAD * CHUNK + 9] ^= 1
    holder = agents[0] if where == "own" else agents[1]
    if where == "own":
        stage_own(holder, part, stream)
    else:
        hold(holder, part, stream)
    restore_network(agents, url, Origin(VERSION, 1, {"0": (holder.address,)}, refs))
    note = wait_for_note(agents[0], "chunk.healed")
    source = "own memory" if where == "own" else f"peer {holder.address}"
    assert note == {"node": "node-a", "chunk": part.chunks[BAD].id, "source": source, "rank": 0}
    assert held(holder, part) == good
    assert told(agents[0], "chunk.not_healed") == []


def flip(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[7] ^= 1
    store.put(key, data)


def cut(store: Store, key: str) -> None:
    store.put(key, store.get(key)[:-1])


def remove(store: Store, key: str) -> None:
    store.delete(key)


def meet(part: Part, sources: Sequence[Source], stream: bytes, agent: Agent) -> list[dict[str, Any]]:
    """Read everything from the sources; what was met, for the agent."""
    buffers = {shard.box: memoryview(bytearray(shard.box.size)) for shard in part.shards}
    damages = Damages(agent.address, VERSION)
    read_state([part], buffers, {0: sources}, on_corrupt=lambda error: None, on_bad=damages.add)
    for shard in part.shards:
        assert bytes(buffers[shard.box]) == stream[shard.at : shard.at + shard.box.size]
    return damages.described({0: sources})


@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_a_chunk_that_is_damaged_in_the_store_is_repaired_from_memory(
    agents: list[Agent], url: str, damage: Callable[[Store, str], None]
) -> None:
    part, stream = saved()
    source = put(url, part, stream)
    hold(agents[1], part, stream)
    key = chunk_key(JOB, part.chunks[BAD])
    damage(source.store, key)
    reader = PeerReader(agents[1].address, TOKEN)
    found = meet(part, [source, reader.source(VERSION, 0)], bytes(stream), agents[0])
    link = Link(agents[0].address, TOKEN, "w0", 1)
    link.heal(4, found)
    note = wait_for_note(agents[0], "chunk.healed")
    assert note == {"node": "node-a", "chunk": part.chunks[BAD].id, "source": url, "rank": 4}
    assert chunk_id(get_chunk(source.store, JOB, part.chunks[BAD])) == part.chunks[BAD].id
    link.heal(5, found)
    link.heal(6, meet(part, [source], bytes(stream), agents[0]))
    link.close()
    wait_until(lambda: any("lost" in message for _, message in tuple(agents[0].outbox._messages)))
    wait_until(lambda: not agents[0].healer._running)
    assert len(told(agents[0], "chunk.healed")) == 1  # what is good already is left alone
    reader.close()


def test_a_good_restore_has_nothing_to_tell(agents: list[Agent], url: str) -> None:
    part, stream = saved()
    assert meet(part, [put(url, part, stream)], bytes(stream), agents[0]) == []


def test_a_damage_without_another_readable_copy_is_told_and_left(agents: list[Agent], url: str) -> None:
    part, stream = saved()
    source = put(url, part, stream)
    flip(source.store, chunk_key(JOB, part.chunks[BAD]))
    gone = Agent("node-c", "127.0.0.1", url, TOKEN)
    hold(gone, part, stream)
    reader = PeerReader(gone.address, TOKEN)
    found = meet(part, [source, reader.source(VERSION, 0)], bytes(stream), agents[0])
    gone.close()
    before = source.store.get(chunk_key(JOB, part.chunks[BAD]))
    agents[0].healer.submit(0, found)
    assert f"cannot reach {gone.address}" in wait_for_note(agents[0], "chunk.not_healed")["error"]
    assert source.store.get(chunk_key(JOB, part.chunks[BAD])) == before
    reader.close()


def test_the_memory_a_rank_maps_is_named_as_its_agents(agents: list[Agent]) -> None:
    part, stream = saved()
    bad = bytearray(stream)
    bad[BAD * CHUNK] ^= 1
    other = MemorySource(memoryview(stream), "a disk", "memory")
    (damage,) = meet(part, [MemorySource(memoryview(bad)), other], bytes(stream), agents[0])
    assert damage["bad"] == codec.to_json(HeldCopy(agents[0].address, VERSION, 0), tagged=True)


def test_an_agent_takes_no_bytes_but_those_its_part_names(agents: list[Agent]) -> None:
    part, stream = saved()
    hold(agents[1], part, stream)
    reader = PeerReader(agents[1].address, TOKEN)
    chunk = part.chunks[BAD]
    with pytest.raises(StoreError, match="does not match its hash"):
        reader.mend(VERSION, 0, chunk, memoryview(bytes(CHUNK)))
    elsewhere = part.chunks[BAD + 1]
    piece = memoryview(stream)[elsewhere.at : elsewhere.at + CHUNK]
    with pytest.raises(StoreError, match="does not hold chunk"):
        reader.mend(VERSION, 0, type(chunk)(elsewhere.id, chunk.at, CHUNK), piece)
    with pytest.raises(NotFound, match="does not hold rank 1"):
        reader.mend(VERSION, 1, elsewhere, piece)
    assert held(agents[1], part) == bytes(stream)
    reader.close()
