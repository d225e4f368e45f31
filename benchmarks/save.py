"""How long does training stand still for a checkpoint, when is it on disk, and what does it take from training in all?

`python -m benchmarks.save [--quick] [--json]`. Every way to save gets a process of its own with the same state, one after
the other, round after round; training (matrix products, then an update of the whole state) goes on while a save is under
way. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.alone import run_alone
from benchmarks.figures import environment, median, p95, say, table
from benchmarks.save_peers import DCP_ASYNC, MODULES, PEERS, RAW_BYTES, Disk, raw_put_s
from benchmarks.state import THREADS, fits, installed, make_state, no_room, size_in_bytes
from benchmarks.stores import BUCKET, s3_endpoint
from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.memory import Pool, copy_many
from ray_dr.model import codec
from ray_dr.model.attempt import Assignment, Cadence
from ray_dr.model.checkpoint import Manifest, PartRef, VersionId
from ray_dr.model.journal import Where
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.layout import chunks_prefix
from ray_dr.stores.open import open_store
from ray_dr.stores.wire import connect
from ray_dr.train.context import Context, Control
from ray_dr.train.link import Link
from ray_dr.train.staging import Planner
from ray_dr.train.state import bytes_of, flatten

TOKEN = b"benchmark"
CALM_STEPS = 3
"""Before each save; the median is what a step takes undisturbed."""
WIDTH = 1024
BYTES_PER_PRODUCT = 40 * 2**20
"""What stands for forward and backward is one product of two WIDTH x WIDTH matrices per so many bytes of state: as long as
the model of `overhead`, with Adam's moments, takes for its own."""
WAIT_S = 300.0
ALONE = 3
"""Saves at the end, while nothing trains."""
KEY = "5a" * 32


class Model(torch.nn.ParameterDict):
    """The state as a model's parameters, with the optimizer that updates all of it: each gradient is -1 everywhere."""

    def __init__(self, size: int, count: int = 0) -> None:
        super().__init__(make_state(size, count))
        for parameter in self.parameters():
            parameter.grad = torch.full((1,), -1.0).expand_as(parameter)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1.0)

    @property
    def objects(self) -> dict[str, Any]:
        """What a program names in `ctx.restore`."""
        return {"model": self, "optimizer": self.optimizer}


class Ours:
    """Staged into the slots of a node agent, a process of its own, which hashes and writes; then the commit."""

    def __init__(self, disk: Disk, objects: Mapping[str, Any], *, encrypted: bool = False, url: str = "") -> None:
        os.environ["SAVE_KEY"] = KEY
        self._url = url or f"file://{disk.fresh()}{'?key=env:SAVE_KEY' if encrypted else ''}"
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve_agent, args=(self._url, there), daemon=True)
        self._process.start()
        self._watch = connect(self._pipe.recv(), TOKEN)
        self._watch.send({"op": "watch"})
        self._log = CommitLog(open_store(self._url), "save")
        self._term = self._log.take_term("benchmark", time.time())
        a = Assignment("save", 1, "w0", 0, 1, 0, "", self._watch.peer, (), None, Cadence(0, 0, 0), "gloo",
                       False, 0, 1, self._url, {}, {Where.STORE: self._term})  # fmt: skip
        self._link = Link(self._watch.peer, TOKEN, "w0", os.getpid())
        self._ctx = Context(a, self._link, Control(1), TOKEN, open_store(self._url))
        self._state = self._ctx.restore(**objects)
        size = Planner(0, 1).plan(flatten(objects, rank=0, world=1)).size
        self._link.open_pool(size)
        taken = self._link.take_slot(size, WAIT_S)  # the pool is made at a job's start
        assert taken is not None
        self._link.give_back(taken[0])

    def prepare(self) -> None:
        """Remove the older checkpoint's chunks, as retention does."""
        self._state.step += 1
        store = open_store(self._url)
        for entry in list(store.list(chunks_prefix("save"))):
            store.delete(entry.key)

    def save(self) -> None:
        self._ctx._save(self._state, frozenset({Where.STORE}), wait_s=0.0)

    def fence(self) -> None:
        """What the next step of the optimizer does first."""
        self._ctx._fence.wait()

    def wait(self) -> None:
        while True:
            report, _ = self._watch.receive()
            self._watch.send({"ack": report["last"]})
            for message in report["messages"]:
                if "ref" in message:
                    ref = codec.from_json(PartRef, message["ref"])
                    version = VersionId(1, self._state.step)
                    self._log.commit(Manifest(1, "save", self._term, version, 1, 0, (ref,), time.time()))
                    self._pipe.send(self._state.step)
                    return

    def close(self) -> float:
        """End the agent; the processor seconds it took."""
        self._ctx.close()
        self._pipe.send(None)
        cpu_s: float = self._pipe.recv()
        self._process.join()
        return cpu_s


def _serve_agent(url: str, pipe: Any) -> None:
    agent = Agent("node", "127.0.0.1", url, TOKEN)
    started_s = _cpu_s()
    pipe.send(agent.address)
    while (step := pipe.recv()) is not None:
        agent.vault.completed(VersionId(1, step))
    pipe.send(_cpu_s() - started_s)
    agent.close()


class OursInS3(Ours):
    """The same to a small S3 server, a process of its own on the same cores, that keeps objects in memory."""

    def __init__(self, disk: Disk, objects: Mapping[str, Any]) -> None:
        self._server = ExitStack()
        endpoint = self._server.enter_context(s3_endpoint("small", disk.folder))
        super().__init__(disk, objects, url=f"s3://{BUCKET}/save?endpoint={endpoint}&region=us-east-1")

    def raw_put_s(self, size: int) -> float:
        """Seconds for the same bytes by the same client with as many threads, and nothing else."""
        return raw_put_s(self._url, size)

    def close(self) -> float:
        cpu_s = super().close()
        self._server.close()
        return cpu_s


IN_S3 = "ray_dr, in S3"
OURS: dict[str, Callable[[Disk, Model], Any]] = {
    "ray_dr": lambda disk, model: Ours(disk, model.objects),
    "ray_dr, encrypted": lambda disk, model: Ours(disk, model.objects, encrypted=True),
    IN_S3: lambda disk, model: OursInS3(disk, model.objects),
}
WAYS = (*OURS, *PEERS)
ROOM, ROOM_IN_S3 = 3.5, 5.0
"""Times the state that a way may take in memory: the state, slots or copies; and what a server on the same machine keeps."""


def make_way(name: str, disk: Disk, model: Model) -> Any:
    """One of WAYS."""
    return OURS[name](disk, model) if name in OURS else PEERS[name](disk, model.state_dict())


def room(name: str) -> float:
    """Times the state that it may take in memory."""
    return ROOM_IN_S3 if "in S3" in name else ROOM


class Trainer:
    """Training on all cores: work that leaves the state alone, as forward and backward do, then an update of all of it."""

    def __init__(self, model: Model, size: int) -> None:
        torch.set_num_threads(THREADS)
        self._a, self._b = torch.ones(WIDTH, WIDTH), torch.ones(WIDTH, WIDTH)
        self._products, self._model = max(1, size // BYTES_PER_PRODUCT), model
        self.step()

    def step(self, fence: Callable[[], None] = lambda: None) -> float:
        """One step; the seconds it took. `fence`: called before the update."""
        begun = time.perf_counter()
        for _ in range(self._products):
            torch.mm(self._a, self._b)
        fence()
        self._model.optimizer.step()
        return time.perf_counter() - begun


def _measure(name: str, folder: str, size: int, count: int, saves: int) -> dict[str, Any]:
    """In a process of its own: save `saves` times and tell what it took."""
    model = Model(size, count)
    way, trainer = make_way(name, Disk(Path(folder) / "saved"), model), Trainer(model, size)
    gc.collect()
    found = []
    with lowest_memory() as lowest:
        before, cpu = lowest(), _cpu_s()
        for _ in range(saves):
            found.append(_one_save(way, trainer))
        peak = before - lowest()
    cpu_spent_s = _cpu_s() - cpu
    alone = [_save_alone(way, trainer) for _ in range(ALONE)]
    put_s = way.raw_put_s(size) if hasattr(way, "raw_put_s") else 0.0
    cpu_s = way.close() * saves / (saves + ALONE) + cpu_spent_s - sum(each["trained_s"] for each in found)
    return {"saves": found, "peak_bytes": peak, "cpu_s": max(0.0, cpu_s) / saves, "alone_s": median(alone),
            "raw_put_s": put_s}  # fmt: skip


def _save_alone(way: Any, trainer: Trainer) -> float:
    """Seconds until a save is durable while nothing trains."""
    trainer.step()
    way.prepare()
    begun = time.perf_counter()
    way.save()
    way.fence()
    way.wait()
    return time.perf_counter() - begun


def _one_save(way: Any, trainer: Trainer) -> dict[str, float]:
    """One save and the steps until it is durable, at least one."""
    cpu = time.thread_time()
    step_s = median([trainer.step() for _ in range(CALM_STEPS)])
    calm_s = time.thread_time() - cpu
    way.prepare()
    waits: list[float] = []

    def fence() -> None:
        begun = time.perf_counter()
        way.fence()
        waits.append(time.perf_counter() - begun)

    def durable() -> float:
        way.wait()
        return time.perf_counter()

    with ThreadPoolExecutor(1) as thread:
        begun = time.perf_counter()
        way.save()
        call_s = time.perf_counter() - begun
        waiter, cpu = thread.submit(durable), time.thread_time()
        while not (waiter.done() and waits):
            trainer.step(fence)
        trained_s, passed_s = THREADS * (calm_s + time.thread_time() - cpu), time.perf_counter() - begun
    return {"stall_s": call_s + sum(waits), "durable_s": waiter.result() - begun,
            "lost_s": passed_s - len(waits) * step_s, "trained_s": trained_s}  # fmt: skip


@contextmanager
def lowest_memory() -> Iterator[Callable[[], int]]:
    """Watch the machine's available memory; the function tells the lowest so far, in bytes."""
    least, over = [_available()], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            least[0] = min(least[0], _available())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield lambda: least[0]
    over.set()
    thread.join()


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def floors(size: int, folder: Path) -> dict[str, float]:
    """Seconds for the same bytes: one copy with all threads into memory that is in place; one write with fsync."""
    sources = [bytes_of(tensor) for tensor in make_state(size).values()]
    pool = Pool.create(sum(source.nbytes for source in sources))
    pairs, at = [], 0
    for source in sources:
        pairs.append((pool.view[at : at + source.nbytes], source))
        at += source.nbytes
    copies = []
    for _ in range(5):
        begun = time.perf_counter()
        copy_many(pairs, threads=THREADS)
        copies.append(time.perf_counter() - begun)
    writes = []
    for number in range(3):
        begun = time.perf_counter()
        with (folder / f"raw{number}").open("wb", buffering=0) as sink:
            for start in range(0, at, RAW_BYTES):
                sink.write(pool.view[start : start + RAW_BYTES])
            os.fsync(sink.fileno())
        writes.append(time.perf_counter() - begun)
        (folder / f"raw{number}").unlink()
    return {"memcpy_s": median(copies), "raw_put_s": median(writes)}


def measure(
    size: int, rounds: int, saves: int, ways: Sequence[str], count: int = 0
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Way -> what each round's process told; and the floors (medians over the rounds)."""
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    seen: list[dict[str, float]] = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="rds-") as folder:
            seen.append(floors(size, Path(folder)))
        for name in ways:
            with tempfile.TemporaryDirectory(prefix="rds-") as folder:
                told[name].append(run_alone(_measure, name, folder, size, count, saves))
            if failed := told[name][-1].get("failed"):
                say(f"  round {number}: {name}: {failed}")
                continue
            later = told[name][-1]["saves"][1:]
            say(f"  round {number}: {name}: stall {median([s['stall_s'] for s in later]):.3f} s, "
                f"durable {median([s['durable_s'] for s in later]):.2f} s")  # fmt: skip
    return told, {key: median([each[key] for each in seen]) for key in seen[0]}


def sum_up(told: list[dict[str, Any]]) -> dict[str, Any]:
    """One way's figures: medians over all saves but each process's first, which has its own; or why it failed."""
    if failed := next((each["failed"] for each in told if "failed" in each), ""):
        return {"failed": failed}
    later = [save for each in told for save in each["saves"][1:]]
    found = {key: median([save[key] for save in later]) for key in ("stall_s", "durable_s", "lost_s")}
    found["stall_p95_s"] = p95([save["stall_s"] for save in later])
    found["first_stall_s"] = median([each["saves"][0]["stall_s"] for each in told])
    return {**found, **{key: median([each[key] for each in told]) for key in ("peak_bytes", "cpu_s", "alone_s", "raw_put_s")}}


HEAD = ("way", "stall s (median / p95)", "to memcpy", "first stall s", "durable s", "durable s, alone", "raw / alone",
        "lost s", "CPU s", "peak / state")  # fmt: skip


def row(name: str, f: Mapping[str, Any], floor: Mapping[str, float], size: int) -> list[str]:
    """A line of the table."""
    if "failed" in f:
        return [name, f["failed"], *[""] * (len(HEAD) - 2)]
    return [name, f"{f['stall_s']:.4f} / {f['stall_p95_s']:.4f}", f"{f['stall_s'] / floor['memcpy_s']:.2f}",
            f"{f['first_stall_s']:.4f}", f"{f['durable_s']:.2f}", f"{f['alone_s']:.2f}",
            f"{(f['raw_put_s'] or floor['raw_put_s']) / f['alone_s']:.2f}", f"{f['lost_s']:.2f}",
            f"{f['cpu_s']:.2f}", f"{f['peak_bytes'] / size:.2f}"]  # fmt: skip


def result(found: Mapping[str, Mapping[str, Any]], floor: Mapping[str, float]) -> dict[str, Any]:
    """The last line: of each way what it told, and the figures that are compared, where their ways were measured."""
    ours, in_s3 = found.get("ray_dr", {}), found.get(IN_S3, {})
    peers = [found[name] for name in found if name.startswith(DCP_ASYNC) and "failed" not in found[name]]
    compared = {key: ours[key] for key in ("stall_s", "first_stall_s", "durable_s", "lost_s", "alone_s") if key in ours}
    compared |= {f"s3_{key}": in_s3[key] for key in ("alone_s", "raw_put_s") if key in in_s3}
    compared |= {f"dcp_async_{key}": min(peer[key] for peer in peers) for key in ("stall_s", "lost_s") if peers}
    return {**compared, **floor, "ways": dict(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 MB, one round")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--size", type=size_in_bytes, default=0, help='of the state (default "1 GB"; "256 MB" with --quick)')
    parser.add_argument("--rounds", type=int, default=0, help="processes per way to save (default 2; 1 with --quick)")
    parser.add_argument("--only", action="append", choices=WAYS, metavar="WAY", help=f"may be repeated; of: {'; '.join(WAYS)}")
    parser.add_argument("--tensors", type=int, default=0, help="so many tensors of equal size")
    asked = parser.parse_args()
    seen = environment()
    say(json.dumps(seen))
    size, rounds = asked.size or (256 if asked.quick else 1024) * 2**20, asked.rounds or (1 if asked.quick else 2)
    ways, left_out = installed(asked.only or WAYS, MODULES)
    left_out += [no_room(name, size, room(name)) for name in ways if not fits(size, room(name))]
    ways = [name for name in ways if fits(size, room(name))]
    told, floor = measure(size, rounds, 4 if asked.quick else 6, ways, asked.tensors)
    found = {name: sum_up(each) for name, each in told.items()}
    print(table(HEAD, [row(name, f, floor, size) for name, f in found.items()]))
    print(f"floors: memcpy {floor['memcpy_s']:.3f} s, raw write and fsync {floor['raw_put_s']:.2f} s, of {size / 2**20:.0f} MB"
          + "".join(f"; raw put in S3, beside {name}, {f['raw_put_s']:.2f} s" for name, f in found.items() if f.get("raw_put_s")))
    print("".join(f"{line}\n" for line in left_out), end="")
    if asked.json:
        print(json.dumps({**result(found, floor), "left_out": left_out, "bytes": size, "environment": seen}))


if __name__ == "__main__":
    main()
