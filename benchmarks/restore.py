"""How fast does a state come back: from memory, a peer, disk and S3, on another world size, and from a long manifest?

`python -m benchmarks.restore [--quick] [--json]`. Every way reads the same bytes into the same tensors, which are there
already, in turns, beside the copy, the sockets, the ranged gets that are its floor, and torch.load and DCP. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from benchmarks import restore_peers
from benchmarks.alone import run_alone, said
from benchmarks.figures import environment, median, p95, say, table
from benchmarks.restore_plans import Manifests, World, manifest_rows, world_rows
from benchmarks.restore_worlds import node_rows
from benchmarks.save import TOKEN, WAIT_S
from benchmarks.state import SPARE_BYTES, THREADS, installed, make_state, no_room, size_in_bytes
from benchmarks.stores import BUCKET, s3_endpoint, tuned_client
from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.direct import find_version
from ray_dr.checkpoint.memory import Pool, attach, available_bytes, copy_many
from ray_dr.errors import NotFound
from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.model.checkpoint import CHUNK_BYTES, Part, VersionId
from ray_dr.stores.open import open_store
from ray_dr.stores.peer import PeerReader
from ray_dr.stores.s3 import Bucket, S3Store
from ray_dr.train.link import Link
from ray_dr.train.restore import restore
from ray_dr.train.staging import Planner, stage
from ray_dr.train.standalone import save
from ray_dr.train.state import bytes_of, flatten

STREAMS = (1, 2, 4)
"""Sockets of the raw TCP floor; the fastest counts."""
GETS = (2, 4, 8)
"""Threads of the raw ranged get; the fastest counts."""
PARTS = ("ways", "worlds", "manifests")
WORLDS_BYTES = 512 * 2**20
"""The most that is read on other world sizes."""
MEMORY, AT_ONCE, UNVERIFIED = "ray_dr, own memory", "ray_dr, own memory, asked at once", "ray_dr, own memory, all hashed then"
ANEW, COLD = "ray_dr, own memory, a new process", "ray_dr, own memory, a new process, mapped then"
PEER, DISK, S3 = "ray_dr, peer", "ray_dr, disk", "ray_dr, S3"
TORCH, DCP, DCP_S3, CONNECTOR = "torch.load", "DCP, disk", "DCP, S3", "DCP, S3, s3torchconnector"
LOAD_FILE, SAFE_OPEN, SNAPSHOT, NVRX = "safetensors load_file", "safetensors safe_open", "torchsnapshot", "NVRx"
MEMCPY, TCP, RAW_GET = "memcpy", "loopback TCP", "raw ranged get"
OWN_GET, HASHED_GET = "ranged get by our store", "hashed ranged get by our store"
FLOORS = {
    **dict.fromkeys((MEMORY, ANEW, COLD, AT_ONCE, UNVERIFIED, DISK, TORCH, LOAD_FILE, SAFE_OPEN, SNAPSHOT, DCP, NVRX), MEMCPY),
    PEER: TCP, **dict.fromkeys((S3, OWN_GET, HASHED_GET, DCP_S3, CONNECTOR), RAW_GET),
}  # fmt: skip
SEVERAL = {
    MEMCPY: [MEMCPY], TCP: [f"{TCP}, {n} streams" for n in STREAMS], RAW_GET: [f"{RAW_GET}, {n} threads" for n in GETS],
}  # fmt: skip
"""A floor, and the ways of which the fastest is it."""
MODULES = {
    LOAD_FILE: "safetensors", SAFE_OPEN: "safetensors", SNAPSHOT: "torchsnapshot", NVRX: "nvidia_resiliency_ext",
    CONNECTOR: "s3torchconnector",
}  # fmt: skip
"""What has to be installed for a way."""
KEEPS: dict[str, tuple[str, float]] = {
    **dict.fromkeys((MEMORY, ANEW, COLD, AT_ONCE, UNVERIFIED, PEER), ("slots", 2.0)), DISK: ("our chunks", 1.0),
    S3: ("our objects", 1.0), **dict.fromkeys((*SEVERAL[RAW_GET], OWN_GET, HASHED_GET), ("raw object", 1.0)),
    DCP_S3: ("DCP's objects", 1.0),
    CONNECTOR: ("the connector's objects", 1.0), TORCH: ("state.pt", 1.0), DCP: ("DCP's files", 1.0), NVRX: ("NVRx' files", 1.0),
    LOAD_FILE: ("state.safetensors", 1.0), SAFE_OPEN: ("state.safetensors", 1.0), SNAPSHOT: ("the snapshot", 1.0),
}  # fmt: skip
"""What a way keeps in memory, the page cache included, from its making on: of the same thing once; in times the state."""
BASE = 2.0
"""The tensors and the copy that they are compared with."""
WHILE = dict.fromkeys((*SEVERAL[RAW_GET], TORCH, SNAPSHOT, NVRX, DCP_S3, CONNECTOR), 1.0)
"""What a way takes while it is made or runs, at most; others half the state."""


class Model(torch.nn.Module):
    """The tensors of a state as a module's buffers."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name, tensor)


@dataclass(frozen=True)
class Way:
    """One way to fill the tensors. `prepare` is not timed; of `after`, only the processor time counts."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    took: dict[str, list[float]] = field(default_factory=lambda: {"wall_s": [], "cpu_s": []})


class Ahead(defaultdict[str, list[float]]):
    """Seconds that what precedes a restore took in each round, by the last line's names: hashing in the agent, mapping in the
    worker."""

    def __init__(self) -> None:
        super().__init__(list)


def unmapped() -> None:
    """Wait until what a restore had mapped is let go, which happens in a thread."""
    for thread in threading.enumerate():
        if thread.name == "unmap":
            thread.join()


class Agents:
    """A node agent in a process of its own, that holds the state in memory, as after a save, when `version` was asked for."""

    def __init__(self, url: str, model: Model) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve_agent, args=(url, there), daemon=True)
        self._process.start()
        self.address = self._pipe.recv()
        self.link = Link(self.address, TOKEN, "w0", os.getpid())
        self.other = Link(self.address, TOKEN, "w1", os.getpid())  # that of a worker that has staged nothing yet
        self._model = model

    @cached_property
    def version(self) -> VersionId:
        version = _stage(self.link, self._model)
        _until_sealed(self.address, version)
        return version

    def ask(self, what: str) -> float:
        """Begin an attempt ("ahead": and wait until all is looked through; "none": look at nothing); the seconds it took."""
        self._pipe.send(what)
        took_s: float = self._pipe.recv()
        return took_s

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _stage(link: Link, model: Model) -> VersionId:
    """What a worker does for a save to memory."""
    flat = flatten({"model": model}, rank=0, world=1)
    plan = Planner(0, 1).plan(flat)
    link.open_pool(plan.size)
    taken = link.take_slot(plan.size, WAIT_S)
    assert taken is not None
    stage(plan, flat, taken[1])
    part = Part(VersionId(1, 1), 0, 1, plan.size, plan.shards, (), flat.scalars)
    link.staged(taken[0], part, staged_at=time.time(), stall_s=0.0, copy_to=(), to={})
    return part.version


def _until_sealed(address: str, version: VersionId) -> None:
    reader = PeerReader(address, TOKEN)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            reader.part(version, 0)
            break
        except NotFound:
            time.sleep(0.05)
    reader.close()


def _serve_agent(url: str, pipe: Any) -> None:
    agent = Agent("node", "127.0.0.1", url, TOKEN)
    pipe.send(agent.address)
    while (what := pipe.recv()) is not None:
        begun = time.perf_counter()
        agent.begin(VersionId(1, 1))
        if what == "none":
            agent.verified.stop()
        if what == "ahead":
            while any(look.todo or look.under_way for look in agent.verified._looks):
                time.sleep(0.001)
        pipe.send(time.perf_counter() - begun)
    agent.close()


class RawPeer:
    """A process that sends a pool of this one over plain sockets: the floor of a restore from a peer."""

    def __init__(self, pool: Pool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve_raw, args=(pool.path, pool.size, there), daemon=True)
        self._process.start()
        self._port = self._pipe.recv()

    def fetch(self, runs: list[memoryview], streams: int) -> None:
        """Fill the runs, dealt to as many streams in turn."""
        with ThreadPoolExecutor(streams) as pool:
            list(pool.map(lambda number: self._fetch(runs[number::streams]), range(streams)))

    def _fetch(self, runs: list[memoryview]) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as sock:
            sock.sendall(sum(run.nbytes for run in runs).to_bytes(8, "big"))
            for run in runs:
                done = 0
                while done < run.nbytes:
                    count = sock.recv_into(run[done:])
                    assert count, "the sender ended early"
                    done += count

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve_raw(path: str, size: int, pipe: Any) -> None:
    data = attach(path, size)
    server = socket.create_server(("127.0.0.1", 0))

    def serve(sock: socket.socket) -> None:
        with sock:
            sock.sendall(data[: int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "big")])

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    pipe.send(server.getsockname()[1])
    pipe.recv()


def cut(views: list[memoryview], size: int = CHUNK_BYTES) -> list[memoryview]:
    """The views in runs of at most `size` bytes."""
    return [view[at : at + size] for view in views for at in range(0, view.nbytes, size)]


def assignment(agent: str, origin: Origin) -> Assignment:
    """What a lone worker beside `agent` is told that restores from `origin`."""
    return Assignment("restore", 2, "w0", 0, 1, 0, "", agent, (), origin, Cadence(0, 0, 0), "gloo", False, 0, 1, "")


class Setting:
    """What the ways share, made when the first of them asks for it. `copies` has what the tensors held at first."""

    def __init__(self, endpoint: str, folder: Path, size: int, stack: ExitStack) -> None:
        self.endpoint, self.folder, self.size, self._stack = endpoint, folder, size, stack
        self.model = model = Model(make_state(size))
        self.state = dict(model.named_buffers())
        self.targets = [bytes_of(tensor) for tensor in self.state.values()]
        self.kept = Pool.create(sum(view.nbytes for view in self.targets))
        self.pairs, self.copies, at = list[tuple[memoryview, memoryview]](), dict[str, torch.Tensor](), 0
        for (name, tensor), view in zip(self.state.items(), self.targets, strict=True):
            self.pairs.append((view, self.kept.view[at : at + view.nbytes]))
            self.copies[name] = torch.frombuffer(self.pairs[-1][1], dtype=tensor.dtype)
            at += view.nbytes
        copy_many([(copy, view) for view, copy in self.pairs], threads=THREADS)
        self.ahead = Ahead()

    @cached_property
    def agents(self) -> Agents:
        agents = Agents(f"file://{self.folder}/agent", self.model)
        self._stack.callback(agents.close)
        return agents

    @cached_property
    def peer(self) -> RawPeer:
        peer = RawPeer(self.kept)
        self._stack.callback(peer.close)
        return peer

    @cached_property
    def gets(self) -> dict[str, Callable[[int], None]]:
        return gets(self.endpoint, self.kept, self.targets)

    def begin(self, what: str) -> Callable[[], object]:
        return lambda: self.agents.ask(what)

    def begin_ahead(self) -> None:
        self.ahead["hashed_ahead_s"].append(self.agents.ask("ahead"))

    def map_ahead(self) -> None:
        self.begin_ahead()
        begun = time.perf_counter()
        self.agents.other.map_ahead(assignment(self.agents.address, self._held), TOKEN).join()
        self.ahead["mapped_ahead_s"].append(time.perf_counter() - begun)

    @property
    def _held(self) -> Origin:
        return Origin(self.agents.version, 1, {"0": (self.agents.address,)})

    def from_memory(self, agent: str = "", link: Link | None = None) -> Callable[[], object]:
        """Restore from the agent's memory: as the worker beside it, or as one somewhere else (no `agent`)."""
        return self._restore(agent, self._held, f"file://{self.folder}/agent", link or self.agents.link)

    def from_store(self, url: str) -> Callable[[], object]:
        return self._restore("", stored(self.model, url), url, self.agents.link)

    def _restore(self, agent: str, origin: Origin, url: str, link: Link) -> Callable[[], object]:
        store = open_store(url)
        return lambda: restore(assignment(agent, origin), {"model": self.model}, TOKEN, store, link)


WAYS: dict[str, Callable[[Setting], Way]] = {
    MEMORY: lambda s: Way(s.from_memory(s.agents.address), s.begin_ahead),
    ANEW: lambda s: Way(s.from_memory(s.agents.address, s.agents.other), s.map_ahead, unmapped),
    COLD: lambda s: Way(s.from_memory(s.agents.address, s.agents.other), s.begin_ahead, unmapped),
    AT_ONCE: lambda s: Way(s.from_memory(s.agents.address), s.begin("at once")),
    UNVERIFIED: lambda s: Way(s.from_memory(s.agents.address), s.begin("none")),
    PEER: lambda s: Way(s.from_memory(), s.begin("none")),
    DISK: lambda s: Way(s.from_store(f"file://{s.folder}/ours")),
    S3: lambda s: Way(s.from_store(f"s3://{BUCKET}/ours?endpoint={s.endpoint}&region=us-east-1")),
    MEMCPY: lambda s: Way(lambda: copy_many(s.pairs, threads=THREADS)),
    **{f"{TCP}, {n} streams": lambda s, n=n: Way(lambda: s.peer.fetch(cut(s.targets), n)) for n in STREAMS},
    **{f"{RAW_GET}, {n} threads": lambda s, n=n: Way(partial(s.gets[RAW_GET], n)) for n in GETS},
    OWN_GET: lambda s: Way(partial(s.gets[OWN_GET], max(GETS))),
    HASHED_GET: lambda s: Way(partial(s.gets[HASHED_GET], max(GETS))),
    TORCH: lambda s: Way(restore_peers.torch_load(s.folder, s.state)),
    LOAD_FILE: lambda s: Way(restore_peers.safetensors_load_file(s.folder, s.state)),
    SAFE_OPEN: lambda s: Way(restore_peers.safetensors_safe_open(s.folder, s.state)),
    SNAPSHOT: lambda s: Way(restore_peers.torchsnapshot(s.folder, s.state)),
    DCP: lambda s: Way(restore_peers.dcp_disk(s.folder / "dcp", s.state)),
    NVRX: lambda s: Way(restore_peers.nvrx(s.folder, s.state, s.size)),
    DCP_S3: lambda s: Way(restore_peers.dcp_s3(s.endpoint, s.folder / "dcp_s3", s.state, max(GETS))),
    CONNECTOR: lambda s: Way(restore_peers.s3torchconnector(s.endpoint, s.state)),
}


def divide(names: Sequence[str], most: float) -> tuple[list[list[str]], dict[str, float]]:
    """The ways in groups that are in memory together, each with its floors, and those that are too large even alone with
    what they take. `most`: times the state that there is memory for."""
    groups, large = list[list[str]](), dict[str, float]()
    for name in names:
        wanted = dict.fromkeys([name, MEMCPY, *SEVERAL.get(FLOORS.get(name, ""), [])])
        if (times := takes(wanted)) > most:
            large[name] = times
        elif groups and takes(both := dict.fromkeys([*groups[-1], *wanted])) <= most:
            groups[-1] = list(both)
        else:
            groups.append(list(wanted))
    return groups, large


def takes(names: Collection[str]) -> float:
    """Times the state that the ways take in memory together."""
    return BASE + sum(dict(KEEPS[name] for name in names if name in KEEPS).values()) + max(WHILE.get(name, 0.5) for name in names)


def stored(model: Model, url: str) -> Origin:
    """Where a checkpoint of the model lies that was just saved to a store."""
    save({"model": model}, url, job="restore")
    found = find_version(open_store(url), "restore", None)
    return Origin(found.version, found.world, parts=found.parts)


def gets(endpoint: str, kept: Pool, targets: list[memoryview]) -> dict[str, Callable[[int], None]]:
    """Ranged gets of one object into the targets, which are in place, in pieces of a chunk, by so many threads: with boto3 as
    quick as it is without changing it, by our store, and by our store with a hash of each piece in the same thread."""
    store = S3Store(Bucket(BUCKET, "raw", endpoint, "us-east-1"))
    store.put("whole", kept.view)
    client = tuned_client(endpoint)
    pieces, at = [], 0
    for view in targets:
        for run in cut([view]):
            pieces.append((at, run))
            at += run.nbytes

    def raw(start: int, run: memoryview) -> None:
        body = client.get_object(Bucket=BUCKET, Key="raw/whole", Range=f"bytes={start}-{start + run.nbytes - 1}")["Body"]
        while run.nbytes and (count := body._raw_stream._fp.readinto(run)):
            run = run[count:]
        body._raw_stream.release_conn()

    def own(start: int, run: memoryview) -> None:
        store.readinto("whole", run, start=start)

    def hashed(start: int, run: memoryview) -> None:
        own(start, run)
        blake3(run, max_threads=1).digest()

    def by_threads(one: Callable[[int, memoryview], None]) -> Callable[[int], None]:
        def get(threads: int) -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda piece: one(*piece), pieces))

        return get

    return {RAW_GET: by_threads(raw), OWN_GET: by_threads(own), HASHED_GET: by_threads(hashed)}


def compete(ways: dict[str, Way], setting: Setting, rounds: int) -> dict[str, str]:
    """Let each way fill the tensors, in an order that changes; the first round is not timed but compared, bit for bit. Gives
    what failed, and why."""
    names, failures = list(ways), dict[str, str]()
    for number in range(rounds + 1 if names else 0):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name in failures:
                continue
            for tensor in setting.state.values():
                tensor.zero_()
            try:
                ways[name].prepare()
                gc.collect()
                wall, cpu = time.perf_counter(), time.process_time()
                ways[name].run()
                wall = time.perf_counter() - wall
                ways[name].after()
                cpu = time.process_time() - cpu
                if number:
                    ways[name].took["wall_s"].append(wall)
                    ways[name].took["cpu_s"].append(cpu)
                elif TCP not in name:  # its sender sends the same to each stream
                    same = all(torch.equal(tensor, setting.copies[key]) for key, tensor in setting.state.items())
                    assert same, "it gave other bytes"
            except BaseException as error:  # DCP's CheckpointException is no Exception
                traceback.print_exc()
                failures[name] = said(error)
        say(f"  round {number}")
    return failures


def _measure(names: list[str], size: int, rounds: int, endpoint: str, folder: str) -> dict[str, Any]:
    """In a process of its own: the ways, round after round."""
    torch.set_num_threads(THREADS)
    ways, failures = dict[str, Way](), dict[str, str]()
    with ExitStack() as stack:
        setting = Setting(endpoint, Path(folder), size, stack)
        for name in names:
            try:
                ways[name] = WAYS[name](setting)
            except BaseException as error:  # DCP's CheckpointException is no Exception
                traceback.print_exc()
                failures[name] = said(error)
        failures |= compete(ways, setting, rounds)
        return {"took": {name: ways[name].took for name in ways if name not in failures}, "failures": failures,
                "ahead": dict(setting.ahead)}  # fmt: skip


Took = dict[str, dict[str, list[float]]]


def measure(groups: list[list[str]], size: int, rounds: int) -> tuple[Took, Ahead, dict[str, str]]:
    """Way -> what each round took, floors at their fastest, and `floor_s`, that of its group; the seconds of what was
    done ahead; and what failed, and why."""
    took: Took = {}
    ahead, failures = Ahead(), dict[str, str]()
    for number, names in enumerate(groups):
        say(f"  group {number + 1} of {len(groups)}: {'; '.join(names)}")
        with tempfile.TemporaryDirectory(prefix="rdr-") as folder, s3_endpoint("small", Path(folder)) as endpoint:
            told = run_alone(_measure, names, size, rounds, endpoint, folder)
        if "failed" in told:
            failures |= dict.fromkeys((name for name in names if name not in took), told["failed"])
            continue
        for key, values in told["ahead"].items():
            ahead[key] += values
        failures |= told["failures"]
        for name, each in told["took"].items():
            beside = [told["took"][floor] for floor in SEVERAL.get(FLOORS.get(name, ""), []) if floor in told["took"]]
            if beside:
                each["floor_s"] = [min(median(floor["wall_s"]) for floor in beside)]
            for key, values in each.items():
                took.setdefault(name, {}).setdefault(key, []).extend(values)
    took = {name: took[name] for name in [*FLOORS, *WAYS] if name in took}
    for floor in (TCP, RAW_GET):
        if several := [took[name] for name in SEVERAL[floor] if name in took]:
            took[floor] = min(several, key=lambda each: median(each["wall_s"]))
    return took, ahead, failures


def rows(took: Took, size: int, failures: Mapping[str, str]) -> Iterator[tuple[object, ...]]:
    for name, each in took.items():
        if name in (TCP, RAW_GET):
            continue  # each the fastest of several, which have rows themselves
        wall, floor = median(each["wall_s"]), FLOORS.get(name, "")
        share = f"{each['floor_s'][0] / wall:.2f} of {floor}" if "floor_s" in each else ""
        yield (name, f"{wall:.3f} / {p95(each['wall_s']):.3f}", f"{size / wall / 1e9:.2f}",
               f"{median(each['cpu_s']) / size * 1e9:.2f}", share)  # fmt: skip
    yield from ((name, why, "", "", "") for name, why in failures.items())


def all_worlds(size: int, rounds: int) -> list[World]:
    """One rank after the other, and all at once beside their agent."""
    with tempfile.TemporaryDirectory(prefix="rdr-") as folder, s3_endpoint("small", Path(folder)) as endpoint:
        return [*node_rows(size, rounds, Path(folder), endpoint, BUCKET), *world_rows(size, rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 MB")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--size", type=size_in_bytes, default=0, help='of the state (default "1 GB"; "256 MB" with --quick)')
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--only", action="append", choices=FLOORS, metavar="WAY",
                        help=f"with its floors, and nothing else; may be repeated; of: {'; '.join(FLOORS)}")  # fmt: skip
    parser.add_argument("--part", action="append", choices=PARTS, help="one of the tables; may be repeated")
    asked = parser.parse_args()
    seen = environment()
    say(json.dumps(seen))
    size = asked.size or (256 if asked.quick else 1024) * 2**20
    parts = asked.part or (PARTS[:1] if asked.only else PARTS)
    found: dict[str, Any] = {"environment": seen}
    if "ways" in parts:
        names, left_out = installed(asked.only or FLOORS, MODULES)
        groups, large = divide(names, (available_bytes() - SPARE_BYTES) / size)
        left_out += [no_room(name, size, times) for name, times in large.items()]
        took, ahead, failures = measure(groups, size, asked.rounds)
        print(table(["way", "s (median / p95)", "GB/s", "cpu-s/GB", "speed"], list(rows(took, size, failures))))
        print(f"{size / 2**20:.0f} MB" + "".join(f"; {key}: {median(each):.3f}" for key, each in ahead.items()))
        print("".join(f"{line}\n" for line in left_out), end="")
        found |= {**result(took, ahead, size), "failures": failures, "left_out": left_out}
    if "worlds" in parts:
        worlds = all_worlds(min(size, WORLDS_BYTES), asked.rounds)
        print(table(["written by", "read by", "from", "s of all ranks (median / p95)", "to the same world"],
                    [world.row for world in worlds]))  # fmt: skip
        found |= of_worlds(worlds)
    if "manifests" in parts:
        manifests = manifest_rows(asked.rounds)
        print(table(["part lists", "chunks", "encode, write", "read, decode", "index", "plan", "s in all (median / p95)"],
                    [manifest.row for manifest in manifests]))  # fmt: skip
        found |= of_manifests(manifests)
    if asked.json:
        print(json.dumps(found))


def of_worlds(worlds: list[World]) -> dict[str, Any]:
    """What the last line has of other world sizes: the largest ratio of each kind, and every row."""
    kinds = {"other_world_ratio": "memory", "other_world_store_ratio": "store", "other_world_s3_ratio": "S3"}
    found = {key: max(world.ratio for world in worlds if world.kind == kind) for key, kind in kinds.items()}
    return {**found, "worlds": [world.row for world in worlds]}


def of_manifests(manifests: list[Manifests]) -> dict[str, Any]:
    """What the last line has of long manifests."""
    return {"manifest_100k_s": max(each.total_s for each in manifests), "manifests": [each.row for each in manifests]}


def result(took: Took, ahead: Mapping[str, list[float]], size: int) -> dict[str, Any]:
    """What the last line has of the ways; of what is compared, as far as it was measured."""
    keys = {"memory_s": MEMORY, "memory_at_once_s": AT_ONCE, "memory_unverified_s": UNVERIFIED, "memcpy_s": MEMCPY,
            "new_process_s": ANEW, "new_process_cold_s": COLD,
            "peer_s": PEER, "tcp_s": TCP, "disk_s": DISK, "s3_s": S3, "raw_get_s": RAW_GET, "own_get_s": OWN_GET,
            "hashed_get_s": HASHED_GET, "dcp_s3_s": DCP_S3,
            "dcp_disk_s": DCP, "torch_load_s": TORCH}  # fmt: skip
    found: dict[str, Any] = {key: median(took[name]["wall_s"]) for key, name in keys.items() if name in took}
    ratios = {"memory_ratio": MEMORY, "new_process_ratio": ANEW, "new_process_cold_ratio": COLD, "peer_ratio": PEER,
              "s3_ratio": S3}  # fmt: skip
    found |= {key: took[name]["floor_s"][0] / median(took[name]["wall_s"]) for key, name in ratios.items()
              if "floor_s" in took.get(name, {})}  # fmt: skip
    if {"hashed_get_s", "s3_s"} <= found.keys():
        found["s3_hashed_ratio"] = found["hashed_get_s"] / found["s3_s"]
    if {"dcp_s3_s", "s3_s"} <= found.keys():
        found["dcp_s3_times"] = found["dcp_s3_s"] / found["s3_s"]
    return {**found, "bytes": size, "all": took, **{key: median(each) for key, each in ahead.items()}}


if __name__ == "__main__":
    main()
