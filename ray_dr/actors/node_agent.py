"""The agent of one node: owns its shared memory, carries staged parts away, and speaks for its workers.

It is a process of its own, so a snapshot outlives the worker that took it. Workers, peers and the supervisor reach it
through one authenticated server (`stores.wire`); a closed connection is the fastest news of a death there is.

    worker      "worker" then "pool", "staged", "step", "record", "event", "heal"; the agent answers "pool" and "free"
    restore     "part", "where", "place", "read" (from anywhere); "share", "take" (by ranks of this node: `shared_fetch`)
    peer        "hold" (a copy arrives), "mend" (a chunk of one once more); "here" (is this agent there?), "take in" (how
                fast is the line?)
    supervisor  "watch": from then on reports flow, each with a number; "ack" lets the agent forget them
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from blake3 import blake3

from ray_dr.actors import peers
from ray_dr.actors.beacons import Beacons
from ray_dr.actors.clouds import Lookout
from ray_dr.actors.examination import take_in
from ray_dr.actors.witness import Witness
from ray_dr.checkpoint.described import describe, parse
from ray_dr.checkpoint.healing import Healer
from ray_dr.checkpoint.local_disk import LocalDisk
from ray_dr.checkpoint.memory import copy_into
from ray_dr.checkpoint.reader import StoreSource
from ray_dr.checkpoint.sealing import Same
from ray_dr.checkpoint.shared_fetch import SharedFetch
from ray_dr.checkpoint.throttle import Throttle
from ray_dr.checkpoint.uploads import Uploads
from ray_dr.checkpoint.vault import Holding, Vault
from ray_dr.checkpoint.verified import Verified
from ray_dr.checkpoint.writer import Places, Task, Writer
from ray_dr.errors import ConfigError, CorruptChunk, NotFound, StoreError
from ray_dr.model import codec
from ray_dr.model.checkpoint import Chunk, Held, Part, PartRef, VersionId
from ray_dr.model.journal import Noted, Record, Stepped, Where
from ray_dr.stores.base import Store
from ray_dr.stores.open import open_store
from ray_dr.stores.wire import Connection, Header, Server

BEAT_S = 0.25
"""A watched agent reports at least this often."""
GATHER_S = 0.02
"""News that is not urgent waits this long for more, so that one report carries many steps."""
ORPHAN_S = 600.0
"""Without a supervisor for so long, an agent ends, and its workers with it."""
OUTBOX_MAX = 100_000
REPORT_MAX = 2000
"""Messages per report, so that a long backlog stays below the limit of a frame."""
READ_MAX_BYTES = 64 * 2**20


class Outbox:
    """Numbered messages for the supervisor, kept until it has written them down. Bounded: then the oldest steps go.

    What is `live` goes along with a report as it is then, without a number, and is not kept: `live` gives for each who
    watches what tells the news since it was last asked.
    """

    def __init__(self, live: Callable[[], Callable[[], list[Header]]] = lambda: list) -> None:
        self._live = live
        self._messages: deque[tuple[int, Header]] = deque()
        self._changed = threading.Condition()
        self._next = 1
        self._urgent = False
        self._watcher: Connection | None = None
        self.watched_at = time.monotonic()

    def put(self, message: Header, *, urgent: bool = False) -> None:
        """Queue a message; an urgent one is sent at once."""
        with self._changed:
            self._messages.append((self._next, message))
            self._next += 1
            self._urgent |= urgent
            if len(self._messages) > OUTBOX_MAX:
                self._messages.popleft()
            self._changed.notify_all()

    def serve(self, connection: Connection) -> None:
        """Stream to a supervisor until its connection breaks or another one takes over."""
        with self._changed:
            self._watcher = connection
            self._changed.notify_all()
        threading.Thread(target=self._acks, args=(connection,), name="acks", daemon=True).start()
        sent, live = 0, self._live()
        while self._watcher is connection:
            batch = self._gather(sent)
            messages = [*(message for _, message in batch), *live()]
            connection.send({"last": batch[-1][0] if batch else sent, "messages": messages})
            sent = batch[-1][0] if batch else sent
            self.watched_at = time.monotonic()

    def _gather(self, sent: int) -> list[tuple[int, Header]]:
        with self._changed:
            self._changed.wait_for(lambda: self._next - 1 > sent, BEAT_S)
            if not self._urgent and self._next - 1 > sent:
                self._changed.wait_for(lambda: self._urgent, GATHER_S)
            self._urgent = False
            fresh = (pair for pair in self._messages if pair[0] > sent)
            return list(itertools.islice(fresh, REPORT_MAX))

    def _acks(self, connection: Connection) -> None:
        with contextlib.suppress(StoreError):
            while True:
                header, _ = connection.receive()
                with self._changed:
                    while self._messages and self._messages[0][0] <= header["ack"]:
                        self._messages.popleft()


class Agent:
    """The agent without Ray: what the actor below hosts."""

    def __init__(
        self, node: str, host: str, store_url: str, token: bytes, *, disk: Sequence[str] = (), second_url: str = "",
        notices: Sequence[str] = (),
    ) -> None:
        """disk: URL of the node's own directory and the job's name there; without such a tier empty. `notices`: see `clouds`."""
        self.node = node
        self.throttle, self.uploads, self.beacons = Throttle(), Uploads(), Beacons()
        self.witness = Witness(node, token, disk, lambda: store)
        self.outbox = Outbox(self._live)
        self.lookout = Lookout(notices, self._note)
        store = self.witness.seen(open_store(store_url), Where.STORE)
        places: dict[Where, Callable[[], Store]] = {Where.STORE: lambda: store}
        if second_url:
            # An error is not kept.
            places[Where.SECOND] = functools.cache(lambda: self.witness.seen(open_store(second_url), Where.SECOND))
        self.disk = LocalDisk(lambda: self.witness.seen(open_store(disk[0]), Where.DISK), disk[1], node) if disk else None
        if self.disk is not None:
            on_disk = self.disk
            places[Where.DISK] = lambda: on_disk.store
        self.vault = Vault(node, self._give_back, slots=1 + len(places))
        self.verified = Verified(self.vault)
        self.writer = Writer(
            self.vault, places, token, self._report, throttle=self.throttle, uploads=self.uploads
        )
        self.shared = SharedFetch(token, places.values())
        self.healer = Healer(token, places.values(), self._note)
        self._links: dict[str, Connection] = {}
        self._closing = False
        self._server = Server(host, token, self._serve)
        self.address = self._server.address

    def close(self) -> None:
        """End the server and give the memory back."""
        self._closing = True
        self.witness.close()
        self.lookout.close()
        self.throttle.hurry()
        self._server.close()
        self.shared.close()
        self.verified.stop()
        self.healer.close()
        self.writer.close()
        self.vault.close()

    # -- outwards

    def _report(self, record: Record, ref: PartRef | None) -> None:
        message: Header = {"record": codec.to_json(record, tagged=True)}
        if ref is not None:  # of a part on disk nobody needs it: there is no commit
            message["ref"] = codec.to_json(ref)
        self.outbox.put(message, urgent=ref is not None)  # a commit waits for it

    def _live(self) -> Callable[[], list[Header]]:
        news, beat, notices = self.uploads.listener(), self.beacons.listener(), self.lookout.listener()
        return lambda: [
            *map(self.witness.add_to, beat()), *notices(), *({"upload": codec.to_json(upload)} for upload in news())
        ]  # fmt: skip

    def _note(self, name: str, fields: dict[str, Any]) -> None:
        self._report(Noted(time.time(), name, {"node": self.node, **fields}), None)

    def _give_back(self, worker: str, slot: int, path: str) -> None:
        link = self._links.get(worker)
        if link is not None:
            with contextlib.suppress(StoreError):
                link.send({"op": "free", "slot": slot, "path": path})

    # -- inwards

    def _serve(self, connection: Connection) -> None:
        header, size = connection.receive()
        if header["op"] == "worker":
            self.beacons.add(header["worker"], header["beacon"], header["pid"])
            self.witness.endings.watch(header["worker"], header["pid"])
            self._serve_worker(connection, header["worker"])
        elif header["op"] == "watch":
            if "overhead" in header:
                self.throttle.allow(header["overhead"], header["wait_most_s"] or math.inf)
            self.outbox.serve(connection)
        elif header["op"] in ("share", "take"):
            self.shared.serve(connection, header, size)
        elif header["op"] == "here":
            peers.answer(connection)
        elif header["op"] == "take in":
            take_in(connection, size)
        else:
            self._serve_peer(connection, header, size)

    def _serve_worker(self, connection: Connection, worker: str) -> None:
        self._links[worker] = connection
        try:
            while True:
                header, _ = connection.receive()
                self._from_worker(connection, worker, header)
        finally:
            self._links.pop(worker, None)
            self.beacons.drop(worker)
            self.vault.forget_worker(worker)
            if not self._closing:
                ending = self.witness.endings.of(worker)
                self.outbox.put({"lost": worker, "how": ending.how, "oom": ending.oom}, urgent=True)

    def _from_worker(self, connection: Connection, worker: str, header: Header) -> None:
        match header["op"]:
            case "step":
                self.throttle.stepped(worker, header["record"]["took_s"])
                self.outbox.put({"record": {"type": Stepped.__name__, "at": header["at"], "record": header["record"]}})
            case "staged":
                self._staged(worker, header)
            case "record":
                self.outbox.put({"record": header["record"]})
            case "heal":
                self.healer.submit(header["rank"], header["damages"])
            case "lend":
                connection.send({"op": "answer", "question": header["question"], **self._lend(worker, header["size"])})
            case "agree":
                connection.send({"op": "answer", "question": header["question"]})
            case "event":
                self.outbox.put({"event": header["event"]}, urgent=True)
            case "want":
                self.vault.want(worker, waiting=header["skipped"] is None)
                if header["skipped"] is not None:
                    self.outbox.put({"skipped": header["skipped"]})
            case "pool":
                threading.Thread(target=self._pool, args=(connection, worker, header), daemon=True).start()

    def _pool(self, connection: Connection, worker: str, asked: Header) -> None:
        ask = asked["ask"]
        try:
            path, per_slot, count, free = self.vault.open_pool(worker, asked["size"])
        except ConfigError as error:
            with contextlib.suppress(StoreError):
                connection.send({"op": "no pool", "ask": ask, "what": error.what, "key": error.key, "remedy": error.remedy})
            return
        if self._links.get(worker) is not connection:
            self.vault.forget_worker(worker)  # it died while its pool was being made
            return
        with contextlib.suppress(StoreError):
            connection.send({"op": "pool", "ask": ask, "path": path, "size": per_slot, "slots": count, "free": list(free)})

    def _lend(self, worker: str, size: int) -> Header:
        try:
            return {"path": self.vault.lend(worker, size)}
        except ConfigError as error:
            return {"what": error.what, "key": error.key, "remedy": error.remedy}

    def _staged(self, worker: str, header: Header) -> None:
        part, slot = parse(header["part"]), header["slot"] if header["slot"] >= 0 else None
        try:
            holding = self.vault.stage(
                worker, slot, version=part.version, rank=part.rank, world=part.world, size=part.size, path=header["path"],
            )  # fmt: skip
        except NotFound as error:
            self._note("save.lost", {"step": part.version.step, "rank": part.rank, "error": str(error)})
            return
        if slot is None:  # of a rank that is gone, perhaps with its agent
            for record in part.records:
                self.outbox.put({"witness": codec.to_json(record)})
        same: Same = codec.from_json(Same, header["same"])
        self.writer.submit(
            Task(holding, part, header["staged_at"], header["stall_s"], tuple(header["copy_to"]), _places(header["to"]),
                 forced=header["forced"], same=same)
        )  # fmt: skip

    def _serve_peer(self, connection: Connection, header: Header, size: int) -> None:
        while True:
            try:
                if header["op"] == "hold":
                    self._hold(connection, header["size"])
                elif header["op"] == "mend":
                    self._mend(connection, header, size)
                else:
                    self._answer(connection, header)
            except (NotFound, CorruptChunk) as error:
                connection.send({"error": str(error)})
            header, size = connection.receive()

    def _answer(self, connection: Connection, header: Header) -> None:
        version, rank = codec.from_json(VersionId, header["version"]), header["rank"]
        try:
            holding = self.vault.read(version, rank)
        except NotFound:
            if self.disk is None:
                raise
            return self._answer_from_disk(connection, header, self.disk, self.disk.part(version, rank))
        try:
            if header["op"] == "part":
                assert holding.part is not None, "only sealed parts are read"
                connection.send({"part": describe(holding.part)})
            elif header["op"] == "place":
                connection.send({**_place(holding), "good": list(self.verified.good(holding).items())})
            elif header["op"] == "where":
                connection.send({**_place(holding), "good": []})
            elif header["op"] == "read":
                size = min(header["size"], READ_MAX_BYTES)
                connection.send({"size": size}, holding.view[header["start"] : header["start"] + size])
        finally:
            self.vault.done(holding)

    def _answer_from_disk(self, connection: Connection, header: Header, disk: LocalDisk, part: Part) -> None:
        if header["op"] == "part":
            connection.send({"part": describe(part)})
        elif header["op"] in ("where", "place"):
            connection.send({"path": ""})
        elif header["op"] == "read":
            piece = memoryview(bytearray(min(header["size"], READ_MAX_BYTES)))
            try:
                StoreSource(disk.store, disk.job, part, "disk").read(part.rank, header["start"], piece)
            except StoreError as error:
                raise NotFound(f"node {self.node} does not hold it any more on its disk ({error})") from error
            connection.send({"size": len(piece)}, piece)

    def held(self) -> tuple[Held, ...]:
        """The sealed parts in memory, and those on disk."""
        on_disk: tuple[Held, ...] = ()
        try:
            on_disk = self.disk.held() if self.disk else ()
        except StoreError as error:
            self._disk_trouble(error)
        return (*self.vault.held(), *on_disk)

    def begin(self, keep: VersionId | None, behind: VersionId | None = None) -> None:
        """A new attempt starts from version `keep`: all else goes, and what is held of it is looked through ahead. `behind`: as
        long as `keep` lacks copies, that older one stays. What its parts on disk say of the steps before it may never have
        reached the journal: the supervisor that was told is gone."""
        self.vault.begin(keep, behind)
        self.verified.begin(keep)
        self.throttle.restart()
        try:
            for record in self.disk.records(keep) if self.disk and keep else ():
                self.outbox.put({"witness": codec.to_json(record)})
        except StoreError as error:
            self._disk_trouble(error)

    def _disk_trouble(self, error: StoreError) -> None:
        self._note("disk.unavailable", {"error": str(error)})

    def keep_on_disk(self, versions: Iterable[VersionId]) -> None:
        """Only these versions, and newer ones, stay on disk."""
        try:
            if self.disk is not None:
                self.disk.keep(versions)
        except StoreError as error:
            self._disk_trouble(error)

    def _mend(self, connection: Connection, header: Header, size: int) -> None:
        """Write a chunk of a part that is held here over itself, once its bytes are verified."""
        chunk = codec.from_json(Chunk, header["chunk"])
        data = memoryview(bytearray(size))
        connection.read_into(data)
        if size != chunk.size or blake3(data, max_threads=1).hexdigest() != chunk.id:
            raise CorruptChunk(chunk.id, source=connection.peer)
        holding = self.vault.read(codec.from_json(VersionId, header["version"]), header["rank"])
        try:
            assert holding.part is not None, "only sealed parts are read"
            if (chunk.id, chunk.at, size) not in ((own.id, own.at, own.size) for own in holding.part.chunks):
                raise NotFound(f"node {self.node} does not hold chunk {chunk.id[:16]} there")
            copy_into(holding.view[chunk.at : chunk.at + size], data)
        finally:
            self.vault.done(holding)
        connection.send({"ok": True})

    def _hold(self, connection: Connection, size: int) -> None:
        """Take a peer's part in, chunk by chunk, each verified before it counts."""
        pool = self.vault.buffer(size)
        arrived: set[Chunk] = set()
        while True:
            header, length = connection.receive()
            if "part" in header:
                break
            if not 0 <= header["at"] <= size - length:
                raise StoreError(f"{connection.peer} sent bytes beyond the {size} it had announced")
            piece = pool.view[header["at"] : header["at"] + length]
            connection.read_into(piece)
            arrived.add(Chunk(blake3(piece, max_threads=1).hexdigest(), header["at"], length))
        part = parse(header["part"])
        bad = next((chunk for chunk in part.chunks if chunk not in arrived), None)
        if bad is not None or part.size != size:
            self.vault.recycle(pool)
            raise CorruptChunk(bad.id if bad else "", source=connection.peer)
        self.vault.keep_copy(part, pool)
        for record in part.records:
            self.outbox.put({"witness": codec.to_json(record)})
        connection.send({"node": self.node})


def _places(to: Header) -> Places:
    return {Where(where): (job, term) for where, (job, term) in to.items()}


def _place(holding: Holding) -> Header:
    """Where a process of this node can map a holding."""
    offset = holding.slot.index * len(holding.slot.view) if holding.slot else 0
    return {"path": holding.pool.path, "offset": offset, "size": len(holding.view)}


def outlive_nobody(agent: Agent) -> None:
    """End this process at once when its raylet dies (the node is gone for Ray: lingering would only delay the news),
    and after ORPHAN_S without a supervisor."""
    raylet = os.pidfd_open(os.getppid())
    poller = select.poll()
    poller.register(raylet, select.POLLIN)
    while not poller.poll(1000):
        if time.monotonic() - agent.outbox.watched_at > ORPHAN_S:
            break
    os._exit(1)


class NodeAgent:
    """The Ray actor: `num_cpus=0`, detached, one per node and job."""

    def __init__(
        self, store_url: str, token: bytes, disk: Sequence[str], second_url: str, notices: Sequence[str] = ()
    ) -> None:
        context = ray.get_runtime_context()
        self._labels = context.get_node_labels()
        host = ray.util.get_node_ip_address()
        self._agent = Agent(
            context.get_node_id(), host, store_url, token, disk=disk, second_url=second_url, notices=notices
        )
        threading.Thread(target=outlive_nobody, args=(self._agent,), name="outlive-nobody", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        """Node, its labels, address and process of this agent, and the newest attempt it has anything of."""
        return {
            "node": self._agent.node, "labels": self._labels, "address": self._agent.address, "pid": os.getpid(),
            "attempt": max((part.version.attempt for part in self._agent.vault.held()), default=0),
        }  # fmt: skip

    def held(self, settle_s: float) -> Any:
        """The sealed parts, after what was just staged is sealed too (JSON of model.checkpoint.Held)."""
        self._agent.writer.settle(settle_s)
        return codec.to_json(self._agent.held())

    def begin(self, keep: Any, behind: Any = None) -> None:
        """A new attempt starts from version `keep`, which may lack copies if there is one `behind` it (JSON, or None)."""
        first, second = (codec.from_json(VersionId, version) if version else None for version in (keep, behind))
        self._agent.begin(first, second)

    def completed(self, version: Any, copied: bool) -> None:
        """Every part of a version has its copies; `copied`: on other nodes."""
        self._agent.vault.completed(codec.from_json(VersionId, version), copied=copied)

    def abandoned(self, version: Any) -> None:
        """A version will never be whole: a rank has not saved its part."""
        self._agent.vault.abandoned(codec.from_json(VersionId, version))

    def examine(self, peer: str, long: bool) -> Any:
        """This node's figures (JSON of model.preflight.Figures); `peer`: the address of another node's agent, or empty."""
        return codec.to_json(self._agent.witness.examination.run(peer, long=long))

    def clock(self) -> float:
        """This node's wall clock, UTC seconds."""
        return time.time()

    def ask_peers(self, peers: dict[str, str]) -> None:
        """Ask these agents, by name, at their addresses, for signs of life from now on."""
        self._agent.witness.peers.ask(peers)

    def keep_on_disk(self, versions: Any) -> None:
        """Only these versions, and newer ones, stay on the node's disk."""
        self._agent.keep_on_disk([codec.from_json(VersionId, version) for version in versions])

    def store_again(self, version: Any, to: Header, orphans: Sequence[int]) -> int:
        """Put this node's own parts of a version into places once more, and its copies of the orphans' parts."""
        return self._agent.writer.store_again(codec.from_json(VersionId, version), _places(to), orphans)

    def close(self) -> None:
        """End well: nothing of this agent stays."""
        self._agent.close()
