"""Running jobs on a real local cluster, for tests: start, wait for a step, kill something, look at what is left."""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from ray_dr.actors import cluster as ray_side
from ray_dr.actors import launch
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.checkpoint.reader import StoreSource, read_state
from ray_dr.checkpoint.restore_plan import build_index
from ray_dr.model.job import Every, Job, StoreTier, Workers
from ray_dr.model.journal import Decided, Marked, Noted, Record, Stepped
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.parts import read_part
from ray_dr.stores.open import open_store
from ray_dr.telemetry.journal import read_journal
from ray_dr.telemetry.timeline import verify_data

WAIT_S = 60.0
PACE_S = 0.1


def job(name: str, url: str, steps: int, *, nodes: tuple[int, int, int] = (2, 2, 1), **changes: Any) -> Job:
    """A deterministic job of `programs`, PACE_S per step: `nodes` is (min, max, min_nodes_to_run)."""
    low, high, run = nodes
    spec = Job(name, StoreTier(url, Every(seconds=2.0)), Workers(low, high, run), deterministic=True,
               settings={"pace": PACE_S, "steps": steps})  # fmt: skip
    return replace(spec, **changes)


def held(name: str, url: str, steps: int, **where: Any) -> Job:
    """As `job`, but five times slower from its middle on until somebody asks for the outcome, and then as fast as it can:
    however long a replacement takes on this machine, the job does not end before it, nor long after it."""
    spec = job(name, url, steps, **where)
    gate = Path(tempfile.gettempdir()) / f"ray-dr-gate-{secrets.token_hex(8)}"
    return replace(spec, settings={**spec.settings, "gate": str(gate)})


def at_once(spec: Job) -> Job:
    """The same job without pauses: the undisturbed run that others are compared with."""
    return replace(spec, settings={**spec.settings, "pace": 0.0})


def until(said: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> Any:
    """The first true answer. Fails when there is none for `wait_s`: a hang, not a measurement."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if answer := said():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {wait_s:g} s")


@dataclass
class Running:
    """A job in progress: `handle` is its supervisor."""

    spec: Job
    handle: Any
    thread: threading.Thread
    box: dict[str, Any]

    def snapshot(self) -> dict[str, Any]:
        if not self.thread.is_alive():
            raise self.box.get("error") or AssertionError("the job ended too early")
        answer: dict[str, Any] = ray.get(self.handle.snapshot.remote(), timeout=WAIT_S)
        return answer

    def wait_for_step(self, step: int) -> dict[str, Any]:
        """Wait until all ranks have done `step` steps."""

        def reached() -> dict[str, Any] | None:
            now = self.snapshot()
            return now if now["step"] >= step else None

        found: dict[str, Any] = until(reached, f"step {step}")
        return found

    def wait_for_world(self, world: int, step: int = 0) -> dict[str, Any]:
        """Wait until `world` workers are training, beyond `step`."""

        def reached() -> dict[str, Any] | None:
            now = self.snapshot()
            return now if now["world"] == world and now["phase"] == "Running" and now["step"] > step else None

        found: dict[str, Any] = until(reached, f"a group of {world}")
        return found

    def workers(self) -> list[dict[str, Any]]:
        """What the living workers say of themselves."""
        names = [name for name in ray_side.actors_of(self.spec.name) if name.startswith("worker:")]
        handles = [handle for name in names if (handle := ray_side.actor(name)) is not None]
        return [said for said in ray_side.gather([h.describe.remote() for h in handles], 30) if isinstance(said, dict)]

    def outcome(self) -> launch.Outcome:
        """Let a job that is held go, and wait for the end. Raises what the job raised."""
        gate = Path(str(self.spec.settings.get("gate", os.devnull)))
        gate.touch()
        self.thread.join(WAIT_S)
        if gate.is_file():
            gate.unlink()
        assert not self.thread.is_alive(), "the job did not end"
        if "error" in self.box:
            raise self.box["error"]
        result: launch.Outcome = self.box["outcome"]
        return result

    def records(self) -> list[Record]:
        return list(read_journal(open_store(self.spec.store.url), self.spec.name))


def start(train: Callable[[Any], None], spec: Job, **where: Any) -> Running:
    """Submit a job and follow it in a thread."""
    launch.connect()
    handle = launch.submit(train, spec, **where)
    box: dict[str, Any] = {}

    def follow() -> None:
        try:
            box["outcome"] = launch.run(train, spec, quiet=True)
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    _followed.append(Running(spec, handle, thread, box))
    return _followed[-1]


_followed: list[Running] = []


def _let_go() -> None:
    """End what failed tests left running: a thread that still asks Ray when this process leaves the cluster is its end."""
    for running in _followed:
        if running.thread.is_alive():
            ray_side.kill(running.handle)
            running.thread.join(WAIT_S)
    _followed.clear()


def sigkill(pid: int) -> float:
    """End a process as a power cut would; the time it happened, UTC seconds."""
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    return at


def final_state(spec: Job) -> dict[str, bytes]:
    """The bytes of every tensor of the newest committed checkpoint, read back from the store, by name."""
    store = open_store(spec.store.url)
    manifest = CommitLog(store, spec.name).newest()
    assert manifest is not None, "nothing was committed"
    parts = [read_part(store, ref) for ref in manifest.parts]
    index = build_index(parts)
    buffers = {index.box(name): bytearray(index.box(name).size) for name in index.shards}
    wanted = {box: memoryview(buffer) for box, buffer in buffers.items() if buffer}
    read_state(
        parts, wanted, {p.rank: [StoreSource(store, spec.name, p)] for p in parts}, threads=2, on_corrupt=_refuse
    )
    return {box.name: bytes(buffer) for box, buffer in buffers.items()}


def decisions(directory: Path) -> Iterator[str]:
    """Every decision and note of the jobs whose store is a directory, in words."""
    if not (directory / "jobs").is_dir():
        return
    store = open_store(f"file://{directory}")
    for name in sorted(path.name for path in (directory / "jobs").iterdir()):
        for record in read_journal(store, name):
            if isinstance(record, Decided):
                phase, event = type(record.state.phase).__name__, type(record.event).__name__
                yield f"{name} {record.at:.2f} term {record.term} {event} -> {phase}: {record.reason}"
            elif isinstance(record, Noted | Marked):
                yield f"{name} {record.at:.2f} {record}"


def _refuse(error: Exception) -> None:
    raise AssertionError(f"a chunk in the store is bad: {error}")


def assert_exact_data(running: Running) -> None:
    """Every sample once, none lost, and every one witnessed."""
    report = verify_data(running.records())
    assert report.ok, report
    assert report.steps == running.spec.settings["steps"]


def recovery_s(records: list[Record], killed_at: float) -> float:
    """Seconds from a kill to the end of the first step that a later attempt did, on all ranks."""
    formed = [r for r in records if isinstance(r, Decided) and r.at > killed_at and "FormGroup" in str(r.actions)]
    attempt = formed[0].state.attempt
    steps = [r for r in records if isinstance(r, Stepped) and r.record.attempt == attempt]
    first = min(r.record.step for r in steps)
    return max(r.at for r in steps if r.record.step == first) - killed_at


@contextmanager
def connected(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """This process as a driver of the cluster."""
    ray.init(address=cluster.address, namespace=ray_side.NAMESPACE, log_to_driver=False)
    try:
        yield cluster
    finally:
        _let_go()
        ray.shutdown()
