"""From a staged slot to a peer and to the store: hashes, copies that are verified, outages that cost nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
from blake3 import blake3

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint import writer as writing
from ray_dr.checkpoint.memory import attach
from ray_dr.checkpoint.sealing import Sealer
from ray_dr.checkpoint.throttle import Turn
from ray_dr.checkpoint.vault import GIVE_UP_S, Vault
from ray_dr.checkpoint.writer import Places, Task, Writer
from ray_dr.errors import NotFound
from ray_dr.model.checkpoint import CHUNK_BYTES, Part, PartRef, VersionId
from ray_dr.model.journal import Noted, PartSaved, Record, Where
from ray_dr.repository.parts import read_part
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.peer import PeerReader

TOKEN = b"secret"
SIZE = CHUNK_BYTES + 12_345
WAIT_S = 60.0
STORE = {Where.STORE: ("job", 1)}


@dataclass
class Bench:
    """A vault with one worker's pool, a store that can fail, and the writer between them."""

    store: FaultyStore = field(default_factory=lambda: FaultyStore(MemoryStore()))
    said: list[tuple[Record, PartRef | None]] = field(default_factory=list)
    freed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.now = 0.0
        self.vault = Vault("node-a", self._came_free, lambda: self.now)
        self.disk = FaultyStore(MemoryStore())
        places = {Where.STORE: lambda: self.store, Where.DISK: lambda: self.disk}
        self.writer = Writer(self.vault, places, TOKEN, lambda record, ref: self.said.append((record, ref)))
        path, self.per_slot, count, free = self.vault.open_pool("w0", SIZE)
        self.slots, self.free = attach(path, self.per_slot * count), set(free)

    def save(self, step: int, *, peer: str = "", to_store: bool = False, to: Places = MappingProxyType({}),
             peers: tuple[str, ...] = (), forced: bool = False) -> bytes:  # fmt: skip
        with self.freed:
            while not self.freed.wait_for(lambda: self.free, 0.05):
                self.now += GIVE_UP_S
                self.vault.want("w0")
            slot = min(self.free)
            self.free.discard(slot)
        data = (b"%06d" % step) * (SIZE // 6) + b"#" * (SIZE % 6)
        self.slots[slot * self.per_slot : slot * self.per_slot + SIZE] = data
        version = VersionId(1, step)
        holding = self.vault.stage("w0", slot, version=version, rank=0, world=1, size=SIZE)
        part = Part(version, 0, 1, SIZE, (), ())
        self.writer.submit(
            Task(holding, part, 0.0, 0.0, (peer,) if peer else peers, {**to, **STORE} if to_store else to, forced)
        )
        return data

    def places(self, step: int) -> list[Where]:
        return [r.where for r, _ in self.said if isinstance(r, PartSaved) and r.version.step == step]

    @property
    def notes(self) -> list[Noted]:
        return [record for record, _ in self.said if isinstance(record, Noted)]

    def stored(self, step: int) -> bytes:
        """The bytes of a stored version, by its part list."""
        (ref,) = (ref for r, ref in self.said if isinstance(r, PartSaved) and ref and r.version.step == step)
        part = read_part(self.store, ref)
        keys = {entry.key.rpartition("/")[2]: entry.key for entry in self.store.list("")}
        return b"".join(self.store.get(keys[chunk.id]) for chunk in part.chunks)

    def until_the_store_is_asked(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.store.calls:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def _came_free(self, worker: str, slot: int, path: str) -> None:
        with self.freed:
            self.free.add(slot)
            self.freed.notify_all()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.writer.close()
    made.vault.close()


@pytest.fixture
def peer() -> Iterator[Agent]:
    agent = Agent("node-b", "127.0.0.1", "memory://writer-peer", TOKEN)
    yield agent
    agent.close()


def test_a_sealed_part_names_every_chunk_by_its_hash(bench: Bench) -> None:
    data = bench.save(1)
    assert bench.writer.settle(WAIT_S)
    holding = bench.vault.read(VersionId(1, 1), 0)
    assert holding.part is not None
    assert [(c.at, c.size) for c in holding.part.chunks] == [(0, CHUNK_BYTES), (CHUNK_BYTES, SIZE - CHUNK_BYTES)]
    for chunk in holding.part.chunks:
        assert chunk.id == blake3(data[chunk.at : chunk.at + chunk.size]).hexdigest()
    bench.vault.done(holding)


def test_a_save_reaches_memory_the_peer_and_the_store(bench: Bench, peer: Agent) -> None:
    data = bench.save(1, peer=peer.address, to_store=True)
    assert bench.writer.drain(WAIT_S)
    assert sorted(bench.places(1)) == [Where.MEMORY, Where.PEER, Where.STORE]
    assert bench.stored(1) == data
    reader = PeerReader(peer.address, TOKEN)
    into = bytearray(SIZE)
    reader.read(VersionId(1, 1), 0, 0, [memoryview(into)])
    assert bytes(into) == data
    place = reader.place(VersionId(1, 1), 0)
    assert place is not None
    assert bytes(attach(place.path, place.offset + SIZE)[place.offset :]) == data
    with pytest.raises(NotFound):
        reader.part(VersionId(1, 2), 0)
    reader.close()


def test_a_save_to_the_store_is_seen_on_its_way_and_passes_the_throttle(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[bool] = []
    monkeypatch.setattr(Turn, "pass_chunk", lambda turn: passed.append(turn._forced))
    bench.save(1, to_store=True)
    assert bench.writer.drain(WAIT_S)
    (upload,) = bench.writer._uploads.listener()()
    assert (upload.version, upload.outcome) == (VersionId(1, 1), "stored")
    assert (upload.size, upload.done, upload.sent) == (SIZE, SIZE, SIZE)
    assert passed == [False] * 2, "for each of two chunks"
    assert bench.writer.store_again(VersionId(1, 1), STORE) == 1
    assert bench.writer.drain(WAIT_S)
    assert passed[2:] == [True] * 2, "somebody waits for it"


def test_a_save_the_store_refuses_is_seen_as_failed(bench: Bench) -> None:
    bench.store.unavailable = True
    bench.save(1, to_store=True)
    assert bench.writer.drain(WAIT_S)
    (upload,) = bench.writer._uploads.listener()()
    assert upload.outcome == "failed"


class Tamperer:
    """Stands between a writer and a peer, and flips one bit of a chosen byte on its way there."""

    def __init__(self, target: str, flip_at: int) -> None:
        self._target, self._flip_at = target, flip_at
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            host, _, port = self._target.rpartition(":")
            far = socket.create_connection((host, int(port)))
            threading.Thread(target=self._pump, args=(far, near, -1), daemon=True).start()
            threading.Thread(target=self._pump, args=(near, far, self._flip_at), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, flip_at: int) -> None:
        seen = 0
        try:
            while data := bytearray(source.recv(1 << 20)):
                if seen <= flip_at < seen + len(data):
                    data[flip_at - seen] ^= 1
                seen += len(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()


def test_a_byte_that_changed_on_the_way_to_a_peer_makes_it_refuse_the_copy(bench: Bench, peer: Agent) -> None:
    tamperer = Tamperer(peer.address, flip_at=SIZE // 2)
    bench.save(1, peer=tamperer.address)
    assert bench.writer.settle(WAIT_S)
    assert bench.places(1) == [Where.MEMORY]
    assert peer.vault.held() == ()
    (note,) = bench.notes
    assert note.name == "peer.unreachable"
    assert "does not match its hash" in str(note.fields["error"])
    tamperer.close()


def test_after_a_refused_copy_the_next_one_is_held(bench: Bench, peer: Agent) -> None:
    tamperer = Tamperer(peer.address, flip_at=SIZE // 2)
    bench.save(1, peer=tamperer.address)
    bench.save(2, peer=peer.address)
    assert bench.writer.settle(WAIT_S)
    assert [held.version.step for held in peer.vault.held()] == [2]
    tamperer.close()


def test_a_peer_that_is_gone_costs_a_note_and_no_save(bench: Bench, peer: Agent) -> None:
    peer.close()
    data = bench.save(1, peer=peer.address, to_store=True)
    assert bench.writer.drain(WAIT_S)
    assert bench.places(1) == [Where.MEMORY, Where.STORE]
    assert [note.name for note in bench.notes] == ["peer.unreachable"]
    assert bench.stored(1) == data


def test_a_peer_that_is_frozen_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PEER_S", 0.2)
    frozen = threading.Event()

    def listen(connection: Any) -> None:
        connection.receive()
        frozen.wait(WAIT_S)

    server = writing_server(listen)
    bench.save(1, peer=server.address)
    assert bench.writer.settle(WAIT_S)
    assert [note.name for note in bench.notes] == ["peer.unreachable"]
    frozen.set()
    server.close()


def writing_server(serve: Any) -> Any:
    from ray_dr.stores.wire import Server

    return Server("127.0.0.1", TOKEN, serve)


@pytest.mark.parametrize("fault", ["unavailable", "full"])
def test_training_saves_to_memory_while_the_store_is_away_and_the_next_save_catches_up(
    bench: Bench, fault: str
) -> None:
    setattr(bench.store, fault, True)
    for step in range(1, 6):
        bench.save(step, to_store=True)
        assert bench.writer.drain(WAIT_S)
    assert [note.name for note in bench.notes] == ["store.unavailable"] * 5
    assert all(bench.places(step) == [Where.MEMORY] for step in range(1, 6))
    setattr(bench.store, fault, False)
    data = bench.save(6, to_store=True)
    assert bench.writer.drain(WAIT_S)
    assert bench.stored(6) == data


def test_a_store_that_hangs_does_not_hold_up_copies_in_memory(bench: Bench, peer: Agent) -> None:
    released = bench.store.hang("put")
    bench.save(1, to_store=True)
    bench.save(2, peer=peer.address)
    assert bench.writer.settle(WAIT_S)
    assert bench.places(2) == [Where.MEMORY, Where.PEER]
    assert not bench.writer.drain(0.01)
    released.set()
    assert bench.writer.drain(WAIT_S)
    assert Where.STORE in bench.places(1)


def test_saves_that_come_while_the_store_is_busy_are_given_up_and_hold_no_slot(bench: Bench, peer: Agent) -> None:
    released = bench.store.hang("put")
    first = bench.save(1, to_store=True)
    for step in range(2, 9):
        bench.save(step, peer=peer.address, to_store=True)
        assert bench.writer.settle(WAIT_S)
        assert bench.places(step) == [Where.MEMORY, Where.PEER]
    released.set()
    assert bench.writer.drain(WAIT_S)
    assert [(note.name, note.fields["step"]) for note in bench.notes] == [("store.behind", n) for n in range(2, 9)]
    assert bench.stored(1) == first
    last = bench.save(9, to_store=True)
    assert bench.writer.drain(WAIT_S)
    assert bench.stored(9) == last


def test_a_save_that_the_job_waits_for_lines_up_behind_the_one_the_store_is_taking_and_gives_way_to_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[bool] = []
    monkeypatch.setattr(Turn, "pass_chunk", lambda turn: passed.append(turn._forced))
    released = bench.store.hang("put")
    bench.save(1, to_store=True)
    bench.until_the_store_is_asked()
    last = bench.save(2, to_store=True, forced=True)
    assert bench.writer.settle(WAIT_S)
    released.set()
    assert bench.writer.drain(WAIT_S)
    assert bench.notes == []
    assert bench.stored(2) == last
    assert passed == [False, False, True, True]


def test_a_chunk_is_in_the_store_before_the_last_one_is_hashed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = threading.Event()

    def slow_seal(part: Part, stream: memoryview, **_: Any) -> Iterator[Any]:
        first, *rest = Sealer().seal(part, stream)
        yield first
        assert stored.wait(WAIT_S), "its chunk is put while the next one is not sealed yet"
        yield from rest

    monkeypatch.setattr(bench.writer._sealer, "seal", slow_seal)
    put = bench.store.put

    def noted_put(key: str, data: Any, *, if_absent: bool = False) -> None:
        put(key, data, if_absent=if_absent)
        if "/chunks/" in key:
            stored.set()

    monkeypatch.setattr(bench.store, "put", noted_put)
    data = bench.save(1, to_store=True)
    assert bench.writer.drain(WAIT_S)
    assert bench.notes == []
    assert bench.stored(1) == data


def test_a_part_that_could_not_be_sealed_reaches_no_place(
    bench: Bench, peer: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(part: Part, stream: memoryview) -> Iterator[Any]:
        yield next(iter(Sealer().seal(part, stream)))
        raise RuntimeError("a bad day")

    monkeypatch.setattr(bench.writer._sealer, "seal", broken)
    bench.save(1, peer=peer.address, to_store=True)
    assert bench.writer.drain(WAIT_S)
    assert bench.places(1) == []
    assert peer.vault.held() == ()
    assert bench.vault.held() == ()
    assert {note.name for note in bench.notes} == {"writer.failed"}
    assert len(bench.free) == 2
    assert [entry for entry in bench.store.list("") if "/parts/" in entry.key] == []


@pytest.mark.parametrize("broken", [Where.STORE, Where.DISK])
def test_a_place_in_trouble_keeps_nothing_from_the_others(bench: Bench, broken: Where) -> None:
    places = {Where.STORE: bench.store, Where.DISK: bench.disk}
    places[broken].unavailable = True
    bench.save(1, to={**STORE, Where.DISK: ("job.life", 1)})
    assert bench.writer.drain(WAIT_S)
    (other,) = set(places) - {broken}
    assert bench.places(1) == [Where.MEMORY, other]
    assert [note.name for note in bench.notes] == [f"{broken}.unavailable"]
    folder = "jobs/job.life/" if other is Where.DISK else "jobs/job/"
    assert any(entry.key.startswith(f"{folder}parts/") for entry in places[other].list(""))


def test_copies_go_to_every_peer_and_say_on_which_node_they_are(bench: Bench, peer: Agent) -> None:
    third = Agent("node-c", "127.0.0.1", "memory://writer-third", TOKEN)
    bench.save(1, to={}, peers=(peer.address, third.address))
    assert bench.writer.settle(WAIT_S)
    saved = [r for r, _ in bench.said if isinstance(r, PartSaved)]
    assert {(r.where, r.node) for r in saved} == {
        (Where.MEMORY, "node-a"), (Where.PEER, "node-b"), (Where.PEER, "node-c"),
    }  # fmt: skip
    assert [held.version.step for agent in (peer, third) for held in agent.vault.held()] == [1, 1]
    third.close()


def test_the_ranks_of_a_node_line_up_for_the_store_with_one_version(bench: Bench) -> None:
    released = bench.store.hang("put")
    version = VersionId(1, 1)
    for rank in range(2):
        slot = bench.free.pop()
        bench.slots[slot * bench.per_slot : slot * bench.per_slot + SIZE] = bytes([rank]) * SIZE
        holding = bench.vault.stage("w0", slot, version=version, rank=rank, world=2, size=SIZE)
        bench.writer.submit(Task(holding, Part(version, rank, 2, SIZE, (), ()), 0.0, 0.0, (), STORE))
    assert bench.writer.settle(WAIT_S)
    assert bench.writer.store_again(version, STORE) == 0, "both are on their way already"
    released.set()
    assert bench.writer.drain(WAIT_S)
    stored = [r.rank for r, _ in bench.said if isinstance(r, PartSaved) and r.where is Where.STORE]
    assert stored == [0, 1]
    assert bench.notes == []


def test_a_copy_is_put_for_a_rank_whose_node_is_gone(bench: Bench, peer: Agent) -> None:
    bench.save(1, peer=peer.address)
    assert bench.writer.settle(WAIT_S)
    assert peer.writer.store_again(VersionId(1, 1), STORE) == 0, "it is somebody else's"
    assert peer.writer.store_again(VersionId(1, 1), STORE, [0]) == 1
    assert peer.writer.drain(WAIT_S)


def test_a_final_save_waits_behind_the_one_the_store_is_taking(bench: Bench) -> None:
    released = bench.store.hang("put")
    bench.save(1, to_store=True)
    bench.until_the_store_is_asked()
    last = bench.save(2, to_store=True)
    assert bench.writer.settle(WAIT_S)
    assert bench.writer.store_again(VersionId(1, 2), STORE) == 1
    released.set()
    assert bench.writer.drain(WAIT_S)
    assert bench.stored(2) == last


def test_a_version_the_store_refused_can_be_put_again(bench: Bench) -> None:
    bench.store.unavailable = True
    data = bench.save(1, to_store=True)
    assert bench.writer.drain(WAIT_S)
    bench.store.unavailable = False
    assert bench.writer.store_again(VersionId(1, 1), STORE) == 1
    assert bench.writer.drain(WAIT_S)
    assert bench.stored(1) == data
    assert bench.writer.store_again(VersionId(1, 9), STORE) == 0


def test_a_save_that_broke_off_sends_only_what_is_missing(bench: Bench) -> None:
    bench.save(1, to_store=True)
    assert bench.writer.drain(WAIT_S)
    bench.said.clear()
    assert bench.writer.store_again(VersionId(1, 1), STORE) == 1
    assert bench.writer.drain(WAIT_S)
    ((record, _),) = bench.said
    assert isinstance(record, PartSaved)
    assert record.sent == 0


def test_slots_come_back_after_every_save_however_it_ended(bench: Bench) -> None:
    bench.store.unavailable = True
    for step in range(1, 9):
        bench.save(step, peer="127.0.0.1:1", to_store=True)
    assert bench.writer.drain(WAIT_S)
    assert {held.version.step for held in bench.vault.held()} == {7, 8}
    bench.now += GIVE_UP_S
    bench.vault.want("w0")
    assert len(bench.free) == 1


def test_closing_ends_both_threads_even_with_saves_waiting(bench: Bench) -> None:
    released = bench.store.hang("put")
    bench.save(1, to_store=True)
    bench.until_the_store_is_asked()
    bench.save(2)
    assert bench.writer.settle(WAIT_S)
    assert bench.writer.store_again(VersionId(1, 2), STORE) == 1
    bench.writer.close()
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith("writer-"):
            thread.join(WAIT_S)
            assert not thread.is_alive()
