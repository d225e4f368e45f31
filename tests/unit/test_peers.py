"""Agents that ask each other: who asks whom, what silence looks like on real sockets, and what the supervisor makes of it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ray_dr.actors import machines as machines_module
from ray_dr.actors.cluster import RayNode
from ray_dr.actors.machines import AVOIDED_S, Machines
from ray_dr.actors.node_agent import Agent
from ray_dr.actors.peers import Peers, Ring
from ray_dr.actors.sensing import Senses, short
from ray_dr.model import codec
from ray_dr.model.job import Detecting, Health
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.wire import connect

TOKEN = b"secret"
NODES = tuple(f"{letter * 56}" for letter in "abc")


class Cable:
    """A line to an address that can be cut: then nothing passes, and nobody is told."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._whole = threading.Event()
        self._whole.set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self._whole.set()
        for end in (self._server, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                host, _, port = self._target.rpartition(":")
                far = socket.create_connection((host, int(port)))
            except OSError:
                return
            self._ends += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                self._whole.wait()
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
def agents() -> Iterator[dict[str, Agent]]:
    made = {short(node): Agent(node, "127.0.0.1", "memory://peers", TOKEN) for node in NODES}
    yield made
    for agent in made.values():
        agent.close()


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)


def test_everybody_asks_the_next_two_and_is_told_again_only_what_is_new() -> None:
    ring, told = Ring(), []
    addresses = {name: f"{name}:1" for name in "abcde"}
    ring.close_up(addresses, lambda name, asks: told.append((name, "".join(sorted(asks)))))
    assert told == [("a", "bc"), ("b", "cd"), ("c", "de"), ("d", "ae"), ("e", "ab")]
    told.clear()
    ring.close_up(addresses, lambda name, asks: told.append((name, "".join(sorted(asks)))))
    assert told == []
    del addresses["c"]
    ring.close_up(addresses, lambda name, asks: told.append((name, "".join(sorted(asks)))))
    assert told == [("a", "bd"), ("b", "de")]
    told.clear()
    ring.close_up({"a": "a:2"}, lambda name, asks: told.append((name, "".join(sorted(asks)))))
    assert told == [("a", "")]
    ring.close_up({"a": "a:2", "b": "b:2"}, lambda name, asks: told.append((name, asks["b" if name == "a" else "a"])))
    assert told[1:] == [("a", "b:2"), ("b", "a:2")]


def test_a_peer_that_is_reached_is_young_one_that_is_not_grows_old_and_comes_back(agents: dict[str, Agent]) -> None:
    one, other, third = agents.values()
    cable = Cable(other.address)
    one.witness.peers.ask({"other": cable.address, "third": third.address})
    until(lambda: all(0.0 < peer.age_s < 0.3 for peer in one.witness.peers.heard()))
    cable.cut()
    until(lambda: one.witness.peers.heard()[0].age_s > 2.0)
    assert one.witness.peers.heard()[1].age_s < 2.0, "the silence of one is no silence of the other"
    cable.mend()
    until(lambda: one.witness.peers.heard()[0].age_s < 0.6)
    one.witness.peers.ask({"third": third.address})
    assert [peer.node for peer in one.witness.peers.heard()] == ["third"]
    cable.close()


def test_an_agent_that_knows_no_token_is_no_peer(agents: dict[str, Agent]) -> None:
    stranger = Peers(b"another")
    stranger.ask({"one": next(iter(agents.values())).address})
    until(lambda: stranger.heard()[0].age_s > 1.2)
    stranger.close()
    assert stranger.heard() == ()


class Supervisor:
    """What the senses use of a host, and a line to each agent as `Watch` has it. On a machine that is short of time a node that
    is cut off from the head may be taken for frozen before a peer's word arrives: that detector is off here."""

    def __init__(self, agents: dict[str, Agent], lines: dict[str, Cable]) -> None:
        self.notes: list[dict[str, Any]] = []
        self.lost: list[tuple[str, str]] = []
        self.avoided: list[str] = []
        self.job = SimpleNamespace(recovery=SimpleNamespace(hang_s=300.0), detection=Detecting(off=("node_frozen",)),
                                   health=Health())  # fmt: skip
        self.perform = SimpleNamespace(lose_node=self._lose)
        self.machines = SimpleNamespace(condemn=lambda node, kind, how: self.avoided.append(node))
        self.senses = Senses(self)  # type: ignore[arg-type]
        self._heard: list[tuple[float, str, dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._watched = []
        for node in NODES:
            line = connect(lines[short(node)].address, TOKEN)
            line.send({"op": "watch"})
            self._watched.append(line)
            threading.Thread(target=self._listen, args=(node, line), daemon=True).start()

    def note(self, name: str, **fields: Any) -> None:
        self.notes.append({"name": name, **fields})

    def look(self) -> None:
        """What the host's loop does."""
        with self._lock:
            heard, self._heard = self._heard, []
        for at, node, message in heard:
            self.senses.receive(at)
            self.senses.beat(node, message)
        self.senses.look()

    def close(self) -> None:
        for line in self._watched:
            line.close()

    def _lose(self, node: str, how: str) -> None:
        self.lost.append((node, how))
        self.senses.closed(node)

    def _listen(self, node: str, line: Any) -> None:
        try:
            while True:
                header, _ = line.receive()
                with self._lock:
                    self._heard += [(time.monotonic(), node, message) for message in header["messages"]]
        except Exception:
            return


@pytest.mark.parametrize("side", ["peers", "head"])
def test_a_node_that_is_cut_off_is_given_up_and_the_others_stay(agents: dict[str, Agent], side: str) -> None:
    """Real agents, real sockets; between them cables that are cut for one node: to its peers, or to the head."""
    to_head = {name: Cable(agent.address) for name, agent in agents.items()}
    to_peers = {name: Cable(agent.address) for name, agent in agents.items()}
    from_bad = {name: Cable(agent.address) for name, agent in agents.items()}
    bad = short(NODES[1])
    for name, agent in agents.items():
        lines = from_bad if name == bad else to_peers
        agent.witness.peers.ask({other: lines[other].address for other in agents if other != name})
    head = Supervisor(agents, to_head)
    calm = time.monotonic() + 2.0
    while time.monotonic() < calm:
        head.look()
        time.sleep(0.02)
    assert head.notes == []
    for cable in [to_peers[bad], *from_bad.values()] if side == "peers" else [to_head[bad]]:
        cable.cut()

    def seen() -> bool:
        head.look()
        return bool(head.lost)

    until(seen)
    assert [node for node, _ in head.lost] == head.avoided == [NODES[1]]
    assert head.notes[0]["kind"] == "network_cut"
    assert ("cut off from 2 others" if side == "peers" else "answers 2 peers") in head.lost[0][1]
    assert codec.to_json(head.notes)
    head.close()
    for cable in [*to_head.values(), *to_peers.values(), *from_bad.values()]:
        cable.close()


def test_a_machine_that_is_of_no_use_is_not_taken_again_for_a_while_and_longer_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    host = SimpleNamespace(
        store=MemoryStore("memory://avoid"), job=SimpleNamespace(name="j"), term=1, policy=SimpleNamespace(min_nodes_to_run=1),
        note=lambda name, **fields: None,
    )  # fmt: skip
    kept = Machines(host)  # type: ignore[arg-type]
    nodes = [RayNode("n1", "", 1, 0, "one"), RayNode("n2", "", 1, 0, "two")]
    assert kept.usable(nodes, nodes) == ["n1", "n2"]
    monkeypatch.setattr(machines_module, "time", clock)
    for times in (1, 2):
        kept.avoid("n1")
        assert (kept.usable(nodes, nodes), kept.left_out) == (["n2"], 1)
        now[0] += times * AVOIDED_S - 1
        assert kept.usable(nodes, nodes) == ["n2"]
        now[0] += 2
        assert (kept.usable(nodes, nodes), kept.left_out) == (["n1", "n2"], 0)
    kept.close(2.0)
