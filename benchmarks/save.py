"""How long does training stand still for a checkpoint, when is it on disk, and what does it take from training in all?

`python -m benchmarks.save [--quick] [--json]`. Every way to save gets a process of its own with the same state, one after
the other, round after round; training (matrix products on all cores) goes on while a save is under way. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figures import environment, median, p95, say, table
from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.memory import Pool, copy_many
from ray_dr.model import codec
from ray_dr.model.checkpoint import Manifest, Part, PartRef, VersionId
from ray_dr.repository.commit import CommitLog
from ray_dr.stores.open import open_store
from ray_dr.stores.wire import connect
from ray_dr.train.link import Link
from ray_dr.train.staging import Planner, stage
from ray_dr.train.state import bytes_of, flatten

TOKEN = b"benchmark"
THREADS = 2
SMALLEST, LARGEST = 2**10, 100 * 2**20
CALM_STEPS = 20
WIDTH = 1024
"""A step of training is one product of two WIDTH x WIDTH matrices, per save repeated until the save is durable."""
WAIT_S = 300.0
RAW_BYTES = 8 * 2**20
KEY = "5a" * 32


def make_state(size: int) -> dict[str, torch.Tensor]:
    """Float32 tensors of 1 KB to 100 MB, as many small as large ones, `size` bytes in all; the same everywhere."""
    numbers = np.random.default_rng(0)
    state: dict[str, torch.Tensor] = {}
    left = size
    while left > 0:
        each = min(left, int(SMALLEST * (LARGEST / SMALLEST) ** numbers.random()))
        state[f"t{len(state):04d}"] = torch.from_numpy(numbers.random(-(-each // 4), np.float32))
        left -= each
    return state


class Held:
    """Tensors as an object that ray_dr saves."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state


class Disk:
    """A folder for one way to save; emptied before every save, so that all of them write into memory used before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fresh(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder


class Ours:
    """Staged into the slots of a node agent, a process of its own, which hashes and writes; then the commit."""

    def __init__(self, disk: Disk, state: dict[str, torch.Tensor], *, encrypted: bool = False) -> None:
        os.environ["SAVE_KEY"] = KEY
        self._disk = disk
        self._url = f"file://{disk.fresh()}{'?key=env:SAVE_KEY' if encrypted else ''}"
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve_agent, args=(self._url, there), daemon=True)
        self._process.start()
        self._watch = connect(self._pipe.recv(), TOKEN)
        self._watch.send({"op": "watch"})
        self._link = Link(self._watch.peer, TOKEN, "w0", os.getpid())
        self._planner, self._objects = Planner(0, 1), {"state": Held(state)}
        self._log = CommitLog(open_store(self._url), "save")
        self._term = self._log.take_term("benchmark", time.time())
        self._step = 0
        flat = flatten(self._objects, rank=0, world=1)
        size = self._planner.plan(flat).size
        self._link.open_pool(size)
        taken = self._link.take_slot(size, WAIT_S)  # the pool is made at a job's start
        assert taken is not None
        self._link._free.add(taken[0])

    def prepare(self) -> None:
        """Remove the older checkpoint's chunks, as retention does."""
        self._step += 1
        for folder in (self._disk.folder / "jobs/save/chunks").glob("*"):
            shutil.rmtree(folder)

    def save(self) -> None:
        flat = flatten(self._objects, rank=0, world=1)
        plan = self._planner.plan(flat)
        taken = self._link.take_slot(plan.size, WAIT_S)
        assert taken is not None
        index, slot = taken
        stage(plan, flat, slot)
        part = Part(VersionId(1, self._step), 0, 1, plan.size, plan.shards, (), flat.scalars)
        self._link.staged(index, part, staged_at=time.time(), stall_s=0.0, copy_to=(), to={"store": ("save", self._term)})

    def wait(self) -> None:
        while True:
            report, _ = self._watch.receive()
            self._watch.send({"ack": report["last"]})
            for message in report["messages"]:
                if "ref" in message:
                    ref = codec.from_json(PartRef, message["ref"])
                    version = VersionId(1, self._step)
                    self._log.commit(Manifest(1, "save", self._term, version, 1, 0, (ref,), time.time()))
                    self._pipe.send(self._step)
                    return

    def close(self) -> float:
        """End the agent; the processor seconds it took."""
        self._pipe.send(None)
        cpu_s: float = self._pipe.recv()
        self._process.join()
        return cpu_s


def _serve_agent(url: str, pipe: Any) -> None:
    agent = Agent("node", "127.0.0.1", url, TOKEN)
    pipe.send(agent.address)
    while (step := pipe.recv()) is not None:
        agent.vault.completed(VersionId(1, step))
    pipe.send(_cpu_s())
    agent.close()


class TorchSave:
    """torch.save into a file, synced."""

    def __init__(self, disk: Disk, state: dict[str, torch.Tensor]) -> None:
        self._disk, self._state = disk, state

    def prepare(self) -> None:
        """Make room."""
        self._disk.fresh()

    def save(self) -> None:
        with (self._disk.folder / "state.pt").open("wb") as sink:
            torch.save(self._state, sink)
            sink.flush()
            os.fsync(sink.fileno())

    def wait(self) -> None:
        """It is there."""

    def close(self) -> float:
        return 0.0


class Dcp(TorchSave):
    """torch.distributed.checkpoint.save, two threads, synced."""

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self._disk.folder, thread_count=THREADS)
        dcp.save(self._state, storage_writer=writer, no_dist=True)


class DcpAsync(TorchSave):
    """torch.distributed.checkpoint.async_save in a thread, with torch's default stager or one that keeps its copy."""

    def __init__(self, disk: Disk, state: dict[str, torch.Tensor], *, cached: bool = True) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(disk, state)
        store = dist.FileStore(str(disk.folder) + ".rendezvous", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._stager: Any = CachedStager() if cached else DefaultStager(StagingOptions(False, True, False, False))
        self._saved: Any = None

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self._disk.folder, thread_count=THREADS)
        answer = dcp.async_save(self._state, storage_writer=writer, async_stager=self._stager)
        staged = getattr(answer, "staging_completion", None)
        if staged is not None:
            staged.result()  # before it, the next update would tear the copy
        self._saved = getattr(answer, "upload_completion", answer)

    def wait(self) -> None:
        self._saved.result()


class CachedStager:
    """What torch's BlockingAsyncStager(cache_staged_state_dict=True) does, which itself works with an accelerator only:
    it copies into tensors that it keeps (there pinned, here shared)."""

    _synchronize_after_execute = True
    should_synchronize_after_execute = True

    def __init__(self) -> None:
        self._kept: Any = None

    def stage(self, state_dict: Any) -> Any:
        from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict

        if self._kept is None:
            self._kept = _create_cpu_state_dict(state_dict, share_memory=True)
        return _copy_state_dict(state_dict, self._kept)

    def synchronize_staging(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to give back."""


WAYS: dict[str, Callable[[Disk, dict[str, torch.Tensor]], Any]] = {
    "ray_dr": Ours,
    "ray_dr, encrypted": lambda disk, state: Ours(disk, state, encrypted=True),
    "torch.save": TorchSave,
    "DCP save": Dcp,
    "DCP async_save": DcpAsync,
    "DCP async_save, default stager": lambda disk, state: DcpAsync(disk, state, cached=False),
}


class Trainer:
    """Something that computes on all cores, in steps."""

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)
        self._a, self._b = torch.ones(WIDTH, WIDTH), torch.ones(WIDTH, WIDTH)
        self.step_s = median([self.step() for _ in range(CALM_STEPS)])

    def step(self) -> float:
        begun = time.perf_counter()
        torch.mm(self._a, self._b)
        return time.perf_counter() - begun


def _measure(name: str, folder: str, size: int, saves: int, pipe: Any) -> None:
    """In a process of its own: save `saves` times and tell what it took."""
    state = make_state(size)
    way, trainer = WAYS[name](Disk(Path(folder) / "saved"), state), Trainer()
    gc.collect()
    found = []
    with lowest_memory() as lowest:
        before, cpu = lowest(), _cpu_s()
        for _ in range(saves):
            for tensor in state.values():
                tensor += 1  # training changes everything: nothing can be left out
            found.append(_one_save(way, trainer))
        peak = before - lowest()
    cpu_s = way.close() + _cpu_s() - cpu - sum(each["trained_s"] for each in found)
    pipe.send({"saves": found, "peak_bytes": peak, "cpu_s": max(0.0, cpu_s) / saves})


def _one_save(way: Any, trainer: Trainer) -> dict[str, float]:
    way.prepare()
    begun = time.perf_counter()
    way.save()
    stall_s = time.perf_counter() - begun
    done = threading.Event()
    waiter = threading.Thread(target=lambda: (way.wait(), done.set()))
    waiter.start()
    steps, cpu = 0, time.thread_time()
    while not done.is_set():
        trainer.step()
        steps += 1
    durable_s = time.perf_counter() - begun
    waiter.join()
    lost_s = durable_s - steps * trainer.step_s
    return {"stall_s": stall_s, "durable_s": durable_s, "lost_s": lost_s, "trained_s": THREADS * (time.thread_time() - cpu)}


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
    flat = flatten({"state": Held(make_state(size))}, rank=0, world=1)
    sources = [bytes_of(local.tensor) for local in flat.tensors.values()]
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


def measure(size: int, rounds: int, saves: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Way -> what each round's process told; and the floors (medians over the rounds)."""
    context = multiprocessing.get_context("spawn")
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    seen: list[dict[str, float]] = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="rds-") as folder:
            seen.append(floors(size, Path(folder)))
        for name in WAYS:
            with tempfile.TemporaryDirectory(prefix="rds-") as folder:
                here, there = context.Pipe()
                process = context.Process(target=_measure, args=(name, folder, size, saves, there))
                process.start()
                there.close()
                told[name].append(here.recv())
                process.join()
            later = told[name][-1]["saves"][1:]
            say(f"  round {number}: {name}: stall {median([s['stall_s'] for s in later]):.3f} s, "
                f"durable {median([s['durable_s'] for s in later]):.2f} s")  # fmt: skip
    return told, {key: median([each[key] for each in seen]) for key in seen[0]}


def sum_up(told: list[dict[str, Any]]) -> dict[str, float]:
    """One way's figures: medians over all saves but each process's first, which has its own."""
    later = [save for each in told for save in each["saves"][1:]]
    found = {key: median([save[key] for save in later]) for key in ("stall_s", "durable_s", "lost_s")}
    found["stall_p95_s"] = p95([save["stall_s"] for save in later])
    found["first_stall_s"] = median([each["saves"][0]["stall_s"] for each in told])
    return {**found, **{key: median([each[key] for each in told]) for key in ("peak_bytes", "cpu_s")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 MB, one round")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--megabytes", type=int, default=0, help="size of the state (default 1024; 256 with --quick)")
    parser.add_argument("--rounds", type=int, default=0, help="processes per way to save (default 2; 1 with --quick)")
    asked = parser.parse_args()
    seen = environment()
    say(json.dumps(seen))
    size, rounds = (asked.megabytes or (256 if asked.quick else 1024)) * 2**20, asked.rounds or (1 if asked.quick else 2)
    told, floor = measure(size, rounds, 4 if asked.quick else 6)
    found = {name: sum_up(each) for name, each in told.items()}
    head = ["way", "stall s (median / p95)", "to memcpy", "first stall s", "durable s", "raw / durable", "lost s", "CPU s",
            "peak / state"]  # fmt: skip
    rows = [
        [name, f"{f['stall_s']:.3f} / {f['stall_p95_s']:.3f}", f"{f['stall_s'] / floor['memcpy_s']:.2f}",
         f"{f['first_stall_s']:.3f}", f"{f['durable_s']:.2f}", f"{floor['raw_put_s'] / f['durable_s']:.2f}",
         f"{f['lost_s']:.2f}", f"{f['cpu_s']:.2f}", f"{f['peak_bytes'] / size:.2f}"]
        for name, f in found.items()
    ]  # fmt: skip
    print(table(head, rows))
    print(f"floors: memcpy {floor['memcpy_s']:.3f} s, raw write and fsync {floor['raw_put_s']:.2f} s, of {size / 2**20:.0f} MB")
    if asked.json:
        ours, peers = found["ray_dr"], [found[name] for name in found if name.startswith("DCP async")]
        print(json.dumps({
            "stall_s": ours["stall_s"], "first_stall_s": ours["first_stall_s"], "durable_s": ours["durable_s"],
            "lost_s": ours["lost_s"], **floor, "dcp_async_stall_s": min(peer["stall_s"] for peer in peers),
            "dcp_async_lost_s": min(peer["lost_s"] for peer in peers), "ways": found, "environment": seen,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
