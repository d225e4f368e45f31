"""The node agent without Ray: its outbox, its workers' slots, and what peers may ask of it."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ray_dr.actors import node_agent
from ray_dr.actors.node_agent import Agent, Outbox
from ray_dr.checkpoint.described import describe, parse
from ray_dr.checkpoint.memory import available_bytes
from ray_dr.errors import ConfigError, NotFound, StoreError, StoreUnavailable
from ray_dr.model import beacon, codec
from ray_dr.model.checkpoint import Box, Part, Shard, StepRecord, VersionId
from ray_dr.model.signal import Beacon, WorkerPhase
from ray_dr.stores.peer import PeerReader
from ray_dr.stores.wire import Connection, connect
from ray_dr.train.link import Link

TOKEN = b"secret"
WAIT_S = 60.0


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent("node-a", "127.0.0.1", "memory://agent", TOKEN)
    yield made
    made.close()


def watch(agent: Agent) -> Connection:
    connection = connect(agent.address, TOKEN)
    connection.timeout(WAIT_S)
    connection.send({"op": "watch"})
    return connection


def numbers(connection: Connection, count: int) -> list[Any]:
    """The next `count` messages of a watched outbox that carry a number."""
    found: list[Any] = []
    while len(found) < count:
        report, _ = connection.receive()
        found.extend(message["n"] for message in report["messages"] if "n" in message)
    return found


def test_messages_arrive_in_order_and_once_per_watcher(agent: Agent) -> None:
    watcher = watch(agent)
    for number in range(50):
        agent.outbox.put({"n": number}, urgent=number % 7 == 0)
    assert numbers(watcher, 50) == list(range(50))
    watcher.close()


def test_what_was_not_acknowledged_is_sent_to_the_next_supervisor(agent: Agent) -> None:
    for number in range(5):
        agent.outbox.put({"n": number})
    first = watch(agent)
    assert numbers(first, 5) == [0, 1, 2, 3, 4]
    first.send({"ack": 3})
    while len(agent.outbox._messages) > 2:
        first.receive()
    first.close()
    second = watch(agent)
    assert numbers(second, 2) == [3, 4]
    second.close()


def test_a_long_backlog_comes_in_several_reports(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_agent, "REPORT_MAX", 10)
    for number in range(35):
        agent.outbox.put({"n": number})
    watcher = watch(agent)
    report, _ = watcher.receive()
    assert len([message for message in report["messages"] if "n" in message]) == 10
    assert numbers(watcher, 25) == list(range(10, 35))
    watcher.close()


def test_an_outbox_nobody_reads_drops_its_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_agent, "OUTBOX_MAX", 10)
    outbox = Outbox()
    for number in range(25):
        outbox.put({"n": number})
    assert [message["n"] for _, message in outbox._messages] == list(range(15, 25))


def test_a_silent_agent_still_reports_that_it_lives(agent: Agent) -> None:
    watcher = watch(agent)
    beats = [message["beat"] for _ in range(3) for message in watcher.receive()[0]["messages"]]
    assert beats == sorted(set(beats))
    assert len(beats) >= 2
    watcher.close()


def beacons(connection: Connection) -> tuple[Beacon, ...]:
    """What the next report with a sign of life says of the workers."""
    while True:
        for message in connection.receive()[0]["messages"]:
            if "beat" in message:
                return codec.from_json(tuple[Beacon, ...], message["beacons"])


def test_an_agent_tells_where_its_workers_are_without_their_help(agent: Agent) -> None:
    watcher, link = watch(agent), Link(agent.address, TOKEN, "w0", os.getpid())
    link.beacon.begin(3, 1)
    link.beacon.enter(WorkerPhase.COMPUTE, 7)
    while not (found := beacons(watcher)) or found[0].phase is not WorkerPhase.COMPUTE:
        pass
    assert (found[0].attempt, found[0].rank, found[0].step) == (3, 1, 7)
    assert found[0].since <= time.monotonic()
    with link.beacon.within(WorkerPhase.EVAL):
        while beacons(watcher)[0].phase is not WorkerPhase.EVAL:
            pass
    while beacons(watcher)[0].phase is not WorkerPhase.COMPUTE:
        pass
    link.close()
    while beacons(watcher):
        pass
    watcher.close()


def test_a_stopped_worker_is_told_of(agent: Agent) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        watcher, link = watch(agent), Link(agent.address, TOKEN, "w0", process.pid)
        link.beacon.enter(WorkerPhase.COMPUTE, 7)
        while not (found := beacons(watcher)) or found[0].stopped:
            pass
        process.send_signal(signal.SIGSTOP)
        while not beacons(watcher)[0].stopped:
            pass
        process.send_signal(signal.SIGCONT)
        process.communicate(b"\n")
    link.close()
    watcher.close()


def test_a_beacon_that_is_being_written_is_not_read() -> None:
    view = memoryview(bytearray(beacon.SIZE))
    assert beacon.read(view) is None
    beacon.pack_into(view, 2, 1, 0, 5, 1, 9, 2_500_000_000)
    assert beacon.read(view) == Beacon(0, 1, 5, beacon.PHASES[1], 9, 2.5)
    view[0] ^= 1  # half written
    assert beacon.read(view) is None


def stage(link: Link, step: int, data: bytes) -> VersionId:
    taken = link.take_slot(len(data), WAIT_S)
    assert taken is not None
    index, slot = taken
    slot[: len(data)] = data
    version = VersionId(1, step)
    record = StepRecord(1, step, 0, 1, ((0, 4),), "d", 0.1)
    link.staged(index, Part(version, 0, 1, len(data), (), (), {}, (record,)), staged_at=0.0, stall_s=0.0, copy_to=(),
                to={})  # fmt: skip
    return version


def held(agent: Agent, version: VersionId) -> bytes:
    reader = PeerReader(agent.address, TOKEN)
    while True:
        try:
            size = parse(reader.part(version, 0)).size
            break
        except NotFound:
            agent.writer.settle(WAIT_S)
    into = bytearray(size)
    reader.read(version, 0, 0, [memoryview(into)])
    reader.close()
    return bytes(into)


def test_what_a_worker_stages_can_be_read_by_a_peer_after_the_worker_is_gone(agent: Agent) -> None:
    link = Link(agent.address, TOKEN, "w0", 1)
    link.open_pool(1000)
    version = stage(link, 1, b"abc" * 300)
    watcher = watch(agent)
    link.close()
    while not any(message.get("lost") == "w0" for message in watcher.receive()[0]["messages"]):
        pass
    assert held(agent, version) == b"abc" * 300
    watcher.close()


def told(agent: Agent, link: Link, part: Part) -> Part:
    """What a peer is told of a part that a worker stages."""
    taken = link.take_slot(part.size, WAIT_S)
    assert taken is not None
    link.staged(taken[0], part, staged_at=0.0, stall_s=0.0, copy_to=(), to={})
    held(agent, part.version)
    reader = PeerReader(agent.address, TOKEN)
    found = parse(reader.part(part.version, part.rank))
    reader.close()
    agent.vault.completed(part.version)
    return found


def test_a_peer_is_told_of_a_part_all_that_its_worker_said_at_every_save(agent: Agent) -> None:
    link = Link(agent.address, TOKEN, "w0", 1)
    link.open_pool(1000)
    for step in range(1, 40):  # more different plans than are kept as text, and each of them twice
        shards = tuple(
            Shard(Box(f'möd"el/{n}', "float32", (8, 2), (step // 2, 0), (4, 2)), 32 * n) for n in range(step // 2)
        )
        records = (StepRecord(1, step, 0, 1, ((0, 4), (9, 12)), "d", 0.1, {"loss": 0.5 + step}),)
        part = Part(VersionId(1, step), 0, 1, 1000, shards, (), {"lr": 0.1, "n": [step, {"ü": None}]}, records)
        found = told(agent, link, part)
        assert [(chunk.at, chunk.size) for chunk in found.chunks] == [(0, 1000)]
        assert replace(found, chunks=()) == part
    link.close()


CUT_OFF = base64.b64encode(zlib.compress(b"[]")[:-1]).decode()


@pytest.mark.parametrize("shards", [[], None, 3, "[{}]", "nonsense", "bm9uc2Vuc2U=", "", CUT_OFF])
def test_a_description_that_does_not_fit_is_a_value_error(shards: Any) -> None:
    with pytest.raises(ValueError):
        parse({**describe(Part(VersionId(1, 1), 0, 1, 0, (), ())), "shards": shards})


def test_a_worker_stages_for_ever_in_the_slots_it_was_given(agent: Agent) -> None:
    link = Link(agent.address, TOKEN, "w0", 1)
    link.open_pool(1000)
    for step in range(1, 40):
        if step % 10 == 0:  # a new attempt asks for its slots again
            link.reset()
            link.open_pool(1000)
        version = stage(link, step, bytes([step]) * 1000)
        assert held(agent, version) == bytes([step]) * 1000
        agent.vault.completed(version)
    link.close()


def test_a_worker_whose_state_grew_waits_for_larger_slots(agent: Agent) -> None:
    link = Link(agent.address, TOKEN, "w0", 1)
    link.open_pool(1000)
    stage(link, 1, b"x" * 1000)
    assert link.take_slot(100_000, 0.0) is None
    link.open_pool(100_000)
    assert held(agent, stage(link, 2, b"y" * 100_000)) == b"y" * 100_000
    link.close()


def test_a_state_that_the_nodes_memory_cannot_hold_is_refused_with_the_numbers(agent: Agent) -> None:
    link = Link(agent.address, TOKEN, "w0", 1)
    size = available_bytes()  # a pool takes twice as much
    link.open_pool(size)
    with pytest.raises(ConfigError, match=r"no room for 2 copies .* GiB each \(only .* GiB are free\)"):
        link.take_slot(size, WAIT_S)
    link.reset()
    link.open_pool(1000)
    assert held(agent, stage(link, 1, b"x" * 1000)) == b"x" * 1000
    link.close()


def test_a_copy_that_does_not_fit_its_announcement_is_refused(agent: Agent) -> None:
    peer = connect(agent.address, TOKEN)
    peer.send({"op": "hold", "size": 10})
    peer.send({"id": "0" * 64, "at": 5}, b"x" * 10)
    with pytest.raises(StoreUnavailable):
        peer.receive()
    assert agent.vault.held() == ()
    peer.close()


def test_a_copy_that_broke_off_is_no_copy(agent: Agent) -> None:
    peer = connect(agent.address, TOKEN)
    peer.send({"op": "hold", "size": 10})
    part = Part(VersionId(1, 1), 0, 1, 11, (), ())
    with pytest.raises(StoreError, match="does not match"):
        peer.request({"part": describe(part)})
    assert agent.vault.held() == ()
    peer.close()


def test_asking_for_what_is_not_there_says_so_and_the_connection_stays(agent: Agent) -> None:
    reader = PeerReader(agent.address, TOKEN)
    for _ in range(3):
        with pytest.raises(NotFound, match="does not hold rank 4 of step 9"):
            reader.part(VersionId(1, 9), 4)
    reader.close()


def test_what_arrives_while_the_agent_closes_is_lost_with_a_word(agent: Agent) -> None:
    link = Link(agent.address, TOKEN, "w0", 1)
    link.open_pool(1000)
    taken = link.take_slot(1000, WAIT_S)
    assert taken is not None
    link.give_back(taken[0])
    watcher = watch(agent)
    agent.vault.close()  # between the end of the server's sockets and that of the threads that serve them
    stage(link, 1, b"late" * 250)
    told: list[Any] = []
    while not told:
        told = [message["record"] for message in watcher.receive()[0]["messages"] if "record" in message]
    assert (told[0]["name"], told[0]["fields"]["step"]) == ("save.lost", 1)
    link.step(StepRecord(1, 2, 0, 1, ((0, 4),), "d", 0.1), 0.0)
    while not any("Stepped" in str(message) for message in watcher.receive()[0]["messages"]):
        pass
    link.close()
    watcher.close()


def test_a_closed_agent_leaves_no_thread_that_serves(agent: Agent) -> None:
    link = Link(agent.address, TOKEN, "w0", 1)
    agent.close()
    for thread in threading.enumerate():
        if thread.name in ("wire-accept", "wire-serve", "link"):
            thread.join(WAIT_S)
            assert not thread.is_alive()
    link.close()
