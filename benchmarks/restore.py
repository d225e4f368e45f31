"""How fast does a state come back: from memory, a peer, disk and S3, on another world size, and from a long manifest?

`python -m benchmarks.restore [--quick] [--json]`. Every way reads the same bytes into the same tensors, which are there
already, in turns, beside the copy, the sockets, the ranged gets that are its floor, and torch.load and DCP. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import environment, median, p95, say, table
from benchmarks.restore_dcp import dcp_from_disk, dcp_from_s3, dcp_save
from benchmarks.restore_plans import manifest_rows, world_rows
from benchmarks.save import THREADS, TOKEN, WAIT_S, make_state
from benchmarks.stores import BUCKET, s3_endpoint
from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.direct import find_version
from ray_dr.checkpoint.memory import Pool, copy_many
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
WORLDS_BYTES = 512 * 2**20
"""The most that is read on other world sizes."""
MEMORY, AT_ONCE, UNVERIFIED = "ray_dr, own memory", "ray_dr, own memory, asked at once", "ray_dr, own memory, all hashed then"
ANEW = "ray_dr, own memory, a new process"
PEER, DISK, S3 = "ray_dr, peer", "ray_dr, disk", "ray_dr, S3"
TORCH, SAFETENSORS, DCP, DCP_S3 = "torch.load", "safetensors", "DCP, disk", "DCP, S3"
MEMCPY, TCP, RAW_GET = "memcpy", "loopback TCP", "raw ranged get"
FLOORS = {
    **dict.fromkeys((MEMORY, ANEW, AT_ONCE, UNVERIFIED, DISK, TORCH, SAFETENSORS, DCP), MEMCPY),
    PEER: TCP, S3: RAW_GET, DCP_S3: RAW_GET,
}  # fmt: skip


class Model(torch.nn.Module):
    """The tensors of a state as a module's buffers."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name, tensor)


@dataclass(frozen=True)
class Way:
    """One way to fill the tensors. `prepare` is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    took: dict[str, list[float]] = field(default_factory=lambda: {"wall_s": [], "cpu_s": []})


class Agents:
    """A node agent in a process of its own that holds the state in memory, as after a save."""

    def __init__(self, url: str, model: Model, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve_agent, args=(url, there), daemon=True)
        self._process.start()
        self.address = self._pipe.recv()
        self.link = Link(self.address, TOKEN, "w0", os.getpid())
        self.other = Link(self.address, TOKEN, "w1", os.getpid())  # that of a worker that has mapped nothing yet
        self.version = _stage(self.link, model)
        _until_sealed(self.address, self.version)

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
    """A process that sends its memory over plain sockets: the floor of a restore from a peer."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve_raw, args=(size, there), daemon=True)
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


def _serve_raw(size: int, pipe: Any) -> None:
    data = Pool.create(size).view
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


@contextmanager
def contestants(endpoint: str, folder: Path, model: Model) -> Iterator[tuple[dict[str, Way], list[float]]]:
    """Every way to fill the model's tensors with what they hold now; and the seconds that hashing ahead took."""
    state = dict(model.named_buffers())
    targets = [bytes_of(tensor) for tensor in state.values()]
    kept = Pool.create(sum(view.nbytes for view in targets))
    pairs, at = [], 0
    for view in targets:
        pairs.append((view, kept.view[at : at + view.nbytes]))
        at += view.nbytes
    copy_many([(copy, view) for view, copy in pairs], threads=THREADS)
    s3_url, disk_url = f"s3://{BUCKET}/ours?endpoint={endpoint}&region=us-east-1", f"file://{folder}/ours"
    with ExitStack() as stack:
        agents = Agents(f"file://{folder}/agent", model, folder)
        stack.callback(agents.close)
        raw = RawPeer(kept.size)
        stack.callback(raw.close)
        ahead: list[float] = []

        def begin(what: str) -> Callable[[], object]:
            return lambda: agents.ask(what)

        def begin_ahead() -> None:
            ahead.append(agents.ask("ahead"))

        def ours(agent: str, origin: Origin, url: str = "", link: Link = agents.link) -> Callable[[], object]:
            store = open_store(url or f"file://{folder}/agent")
            return lambda: restore(assignment(agent, origin), {"model": model}, TOKEN, store, link)

        held = Origin(agents.version, 1, {"0": (agents.address,)})
        ways = {
            MEMORY: Way(ours(agents.address, held), begin_ahead),
            ANEW: Way(ours(agents.address, held, link=agents.other), begin_ahead),
            AT_ONCE: Way(ours(agents.address, held), begin("at once")),
            UNVERIFIED: Way(ours(agents.address, held), begin("none")),
            PEER: Way(ours("", held), begin("none")),
            DISK: Way(ours("", stored(model, disk_url), disk_url)),
            S3: Way(ours("", stored(model, s3_url), s3_url)),
            MEMCPY: Way(lambda: copy_many(pairs, threads=THREADS)),
        }
        ways |= {f"{TCP}, {n} streams": Way(lambda n=n: raw.fetch(cut(targets), n)) for n in STREAMS}
        get = raw_get(endpoint, kept, targets)
        ways |= {f"{RAW_GET}, {n} threads": Way(lambda n=n: get(n)) for n in GETS}
        ways |= peers(folder, endpoint, state)
        yield ways, ahead


def stored(model: Model, url: str) -> Origin:
    """Where a checkpoint of the model lies that was just saved to a store."""
    save({"model": model}, url, job="restore")
    found = find_version(open_store(url), "restore", None)
    return Origin(found.version, found.world, parts=found.parts)


def raw_get(endpoint: str, kept: Pool, targets: list[memoryview]) -> Callable[[int], None]:
    """Ranged gets of one object by our client into the targets, which are in place, in pieces of a chunk."""
    store = S3Store(Bucket(BUCKET, "raw", endpoint, "us-east-1"))
    store.put("whole", kept.view)
    pieces, at = [], 0
    for view in targets:
        for run in cut([view]):
            pieces.append((at, run))
            at += run.nbytes

    def get(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: store.readinto("whole", piece[1], start=piece[0]), pieces))

    return get


def peers(folder: Path, endpoint: str, state: dict[str, torch.Tensor]) -> dict[str, Way]:
    """torch.load, safetensors where it is installed, and DCP, into the state's tensors."""
    torch.save(state, folder / "state.pt")

    def load() -> None:
        loaded = torch.load(folder / "state.pt", weights_only=True)
        for name, tensor in state.items():
            tensor.copy_(loaded[name])

    ways = {TORCH: Way(load)}
    if importlib.util.find_spec("safetensors"):
        from safetensors.torch import load_file, save_file

        save_file(state, folder / "state.safetensors")

        def load_safe() -> None:
            loaded = load_file(folder / "state.safetensors")
            for name, tensor in state.items():
                tensor.copy_(loaded[name])

        ways[SAFETENSORS] = Way(load_safe)
    dcp_save(folder / "dcp", state, endpoint)
    ways[DCP] = Way(lambda: dcp_from_disk(folder / "dcp", state))
    ways[DCP_S3] = Way(lambda: dcp_from_s3(endpoint, state, max(GETS)))
    return ways


def compete(ways: dict[str, Way], model: Model, rounds: int) -> None:
    """Let each way fill the tensors, in an order that changes; the first round is not timed but compared, bit for bit."""
    right = {name: tensor.clone() for name, tensor in model.named_buffers()}
    names = list(ways)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for tensor in model.buffers():
                tensor.zero_()
            ways[name].prepare()
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            ways[name].run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                ways[name].took["wall_s"].append(wall)
                ways[name].took["cpu_s"].append(cpu)
            elif TCP not in name:  # its sender sends zeros
                assert all(torch.equal(tensor, right[key]) for key, tensor in model.named_buffers()), f"{name}: other bytes"
        say(f"  round {number}")


def _measure(size: int, rounds: int, endpoint: str, folder: str, pipe: Any) -> None:
    """In a process of its own: all ways, round after round."""
    torch.set_num_threads(THREADS)
    model = Model(make_state(size))
    with contestants(endpoint, Path(folder), model) as (ways, ahead):
        compete(ways, model, rounds)
        pipe.send(({name: way.took for name, way in ways.items()}, ahead))


def measure(size: int, rounds: int) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Way -> what each round took, floors at their fastest; and the seconds that hashing ahead took."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="rdr-") as folder, s3_endpoint("small", Path(folder)) as endpoint:
        here, there = context.Pipe()
        process = context.Process(target=_measure, args=(size, rounds, endpoint, folder, there))
        process.start()
        there.close()
        took, ahead = here.recv()
        process.join()
    for floor in (TCP, RAW_GET):
        several = [name for name in took if name.startswith(floor)]
        took[floor] = min((took[name] for name in several), key=lambda each: median(each["wall_s"]))
    return took, ahead


def rows(took: dict[str, dict[str, list[float]]], size: int) -> Iterator[tuple[object, ...]]:
    for name, each in took.items():
        if name in (TCP, RAW_GET):
            continue  # each the fastest of several, which have rows themselves
        wall = median(each["wall_s"])
        floor = next((floor for way, floor in FLOORS.items() if name == way or (name.startswith(DCP_S3) and way == DCP_S3)), "")
        share = f"{median(took[floor]['wall_s']) / wall:.2f} of {floor}" if floor else ""
        yield (name, f"{wall:.3f} / {p95(each['wall_s']):.3f}", f"{size / wall / 1e9:.2f}",
               f"{median(each['cpu_s']) / size * 1e9:.2f}", share)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 MB")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--megabytes", type=int, default=0, help="size of the state (default 1024; 256 with --quick)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    asked = parser.parse_args()
    seen = environment()
    say(json.dumps(seen))
    size = (asked.megabytes or (256 if asked.quick else 1024)) * 2**20
    took, ahead = measure(size, asked.rounds)
    print(table(["way", "s (median / p95)", "GB/s", "cpu-s/GB", "speed"], list(rows(took, size))))
    print(f"hashed ahead, in the agent: {median(ahead):.3f} s; {size / 2**20:.0f} MB")
    worlds = world_rows(min(size, WORLDS_BYTES), asked.rounds)
    print(table(["written by", "read by", "from", "s of all ranks (median / p95)", "to the same world"],
                [world.row for world in worlds]))  # fmt: skip
    manifests = manifest_rows(asked.rounds)
    print(table(["part lists", "chunks", "encode, write", "read, decode", "index", "plan", "s in all (median / p95)"],
                [manifest.row for manifest in manifests]))  # fmt: skip
    if asked.json:
        print(json.dumps(result(took, ahead, worlds, manifests, size, seen)))


def result(took: Any, ahead: list[float], worlds: Any, manifests: Any, size: int, seen: Any) -> dict[str, Any]:
    """The last line."""
    keys = {"memory_s": MEMORY, "memory_at_once_s": AT_ONCE, "memory_unverified_s": UNVERIFIED, "memcpy_s": MEMCPY,
            "peer_s": PEER, "tcp_s": TCP, "disk_s": DISK, "s3_s": S3, "raw_get_s": RAW_GET, "dcp_s3_s": DCP_S3,
            "dcp_disk_s": DCP, "torch_load_s": TORCH}  # fmt: skip
    found: dict[str, Any] = {key: median(took[name]["wall_s"]) for key, name in keys.items()}
    return {
        **found, "bytes": size, "memory_ratio": found["memcpy_s"] / found["memory_s"],
        "peer_ratio": found["tcp_s"] / found["peer_s"], "s3_ratio": found["raw_get_s"] / found["s3_s"],
        "dcp_s3_times": found["dcp_s3_s"] / found["s3_s"], "hashed_ahead_s": median(ahead),
        "other_world_ratio": max(world.ratio for world in worlds if world.kind == "memory"),
        "other_world_store_ratio": max(world.ratio for world in worlds if world.kind == "store"),
        "manifest_100k_s": max(manifest.total_s for manifest in manifests),
        "all": took, "worlds": [world.row for world in worlds], "manifests": [each.row for each in manifests],
        "environment": seen,
    }  # fmt: skip


if __name__ == "__main__":
    main()
