"""One job under one fault: what an injector may look at, wait for and break. See `faults` for the kinds."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import In, NodeLabelSchedulingStrategy, NotIn

from benchmarks.campaign_program import train
from benchmarks.kills import PYTHONPATH
from ray_dr.actors import cluster as names
from ray_dr.actors import launch
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.errors import StoreError
from ray_dr.model import beacon, codec
from ray_dr.model.actions import FormGroup
from ray_dr.model.events import FirstStep
from ray_dr.model.job import Job
from ray_dr.model.journal import Decided, Noted, Record
from ray_dr.model.signal import WorkerPhase
from ray_dr.stores.open import open_store
from ray_dr.telemetry.journal import Reader
from tests.ray import jobs
from tests.s3_server import Fault, S3Server

STRIKE_AT = 20
"""The step after which a fault comes."""
WAIT_S = 60.0
POLL_S = 0.02


class Unseen(Exception):
    """The fault was not seen to take effect: whatever came of the job says nothing."""


class NotOver(Exception):
    """The job did not get over what it met."""


@dataclass
class Scene:
    """`running` is the job; `struck_at` the time of the first fault, UTC seconds."""

    cluster: LocalCluster
    server: S3Server
    folder: Path
    spec: Job
    chance: random.Random
    running: jobs.Running = field(init=False)
    struck_at: float = 0.0
    proof: list[str] = field(default_factory=list)
    """What was seen of the fault taking effect."""
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What was made of the machine for this case; undone last."""
    _read: list[Record] = field(default_factory=list)
    _reader: Reader | None = None
    _doomed: list[int] = field(default_factory=list)

    # -- running

    def start(self, *, off_head: bool = False) -> None:
        """Submit the job, or follow it again. Its supervisor is on the head; `off_head`: always on another node."""
        head = self.cluster.head_id  # by label: of an affinity that is soft Ray takes no notice for an actor without resources
        where = NodeLabelSchedulingStrategy({"ray.io/node-id": NotIn(head) if off_head else In(head)})
        self.running = jobs.start(train, self.spec, where=where)

    def start_by_driver(self) -> subprocess.Popen[bytes]:
        """The same, by a process of its own, which follows it too."""
        environment = {**os.environ, **self.cluster.env, "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, "-m", __name__, json.dumps(codec.to_json(self.spec))]
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._doomed.append(driver.pid)
        name = names.supervisor_name(self.spec.name)
        self.until(lambda: driver.poll() is not None or names.actor(name) is not None, "the other driver's supervisor")
        if driver.poll() is not None:
            raise Unseen(f"the driver ended by itself ({driver.returncode})")
        self.start()
        return driver

    def records(self) -> list[Record]:
        """The journal, as far as it can be read now."""
        with contextlib.suppress(StoreError):
            self._reader = self._reader or Reader(open_store(self.spec.store.url), self.spec.name)
            self._read.extend(self._reader.more())
        return self._read

    def until(self, holds: Callable[[], Any], what: str, otherwise: type[Exception] = Unseen) -> Any:
        """The first true answer. Raises `otherwise` when there is none in time."""
        deadline = time.monotonic() + WAIT_S
        while not (answer := holds()):
            if time.monotonic() > deadline:
                raise otherwise(f"waited {WAIT_S:g} s for {what}")
            time.sleep(POLL_S)
        return answer

    def until_ready(self) -> dict[str, Any]:
        """Both workers are at it, STRIKE_AT steps are done."""
        return self.running.wait_for_world(2, STRIKE_AT)

    def until_event(self, kind: type | tuple[type, ...], count: int = 1) -> None:
        """The supervisor has decided on so many events of a kind since the fault."""
        self.until(lambda: len(self.events(kind)) >= count, f"{count} of {kind}", NotOver)

    def until_recovered(self, after: int | None = None) -> int:
        """A group newer than attempt `after` (the one at the fault) has done its first step; which attempt that is."""
        broken = self.attempt_at_strike() if after is None else after

        def found() -> int:
            begun = [e.attempt for e in self.events(FirstStep) if e.attempt > broken]
            return begun[0] if begun else 0

        attempt: int = self.until(found, f"a first step after attempt {broken}", NotOver)
        return attempt

    def until_formed(self, after: int) -> None:
        """The journal says that a group newer than attempt `after` is formed."""
        self.until(lambda: any(a.group.attempt > after for r in self.decided() for a in r.actions if isinstance(a, FormGroup)),
                   f"a group after attempt {after}")  # fmt: skip

    def until_phase(self, name: str) -> None:
        """The supervisor is in a phase now; for short ones, looked at as often as it answers."""
        deadline = time.monotonic() + WAIT_S
        while self.running.snapshot()["phase"] != name:
            if time.monotonic() > deadline:
                raise Unseen(f"no phase {name} within {WAIT_S:g} s")

    def until_step(self, more: int) -> None:
        """So many steps more than now are done."""
        self.running.wait_for_step(int(self.running.snapshot()["step"]) + more)

    def decided(self) -> list[Decided]:
        return [record for record in self.records() if isinstance(record, Decided)]

    def events(self, kind: type | tuple[type, ...]) -> list[Any]:
        """Events of a kind since the fault."""
        return [r.event for r in self.decided() if isinstance(r.event, kind) and r.at >= self.struck_at]

    def notes(self, *wanted: str) -> list[Noted]:
        """Notes of these names, of any time."""
        return [record for record in self.records() if isinstance(record, Noted) and record.name in wanted]

    def attempt_at_strike(self) -> int:
        """The attempt at work when the fault came."""
        return max((r.state.attempt for r in self.decided() if r.at < self.struck_at), default=0)

    # -- whom

    def worker(self, rank: int) -> dict[str, Any]:
        """What a member says of itself: pid, node, ..."""
        return next(said for said in self.running.workers() if said["rank"] == rank)

    def agent(self, node: str) -> tuple[Any, dict[str, Any]]:
        """The agent of a node: its handle, and what it says of itself."""
        for name in names.actors_of(self.spec.name):
            if name.startswith("agent:") and (handle := names.actor(name)) is not None:
                said = ray.get(handle.describe.remote(), timeout=WAIT_S)
                if said["node"] == node:
                    return handle, said
        raise Unseen(f"node {node} has no agent")

    # -- breaking, each time with a look at whether it is broken

    def strike(self, proof: str = "", at: float = 0.0) -> None:
        """The fault comes now (or came `at`)."""
        self.struck_at = self.struck_at or at or time.time()
        if proof:
            self.proof.append(proof)

    def kill(self, *pids: int) -> None:
        """SIGKILL, one right after the other."""
        self.strike()
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        self.until(lambda: all(_state(pid) in ("", "Z", "X") for pid in pids), f"the end of {pids}")
        self.strike(f"gone: {len(pids)} process(es)")

    def stop(self, *pids: int) -> None:
        """SIGSTOP. What is still stopped at the end of the case is killed then."""
        self.strike()
        self._doomed.extend(pids)
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        self.until(lambda: all(_state(pid) == "T" for pid in pids), f"the halt of {pids}")
        self.strike(f"stopped: {len(pids)} process(es)")

    def go_on(self, *pids: int) -> None:
        """SIGCONT."""
        for pid in pids:
            _signal(pid, signal.SIGCONT)

    def kill_node(self, node: str) -> None:
        """Every process of a node."""
        self.strike()
        pids = next(n.pids for n in self.cluster.nodes() if n.node_id == node)
        self.cluster.kill_node(node)
        self.until(lambda: all(_state(pid) in ("", "Z", "X") for pid in pids), "the end of a node")
        self.strike(f"gone: a node of {len(pids)} processes")

    def arm(self) -> None:
        """Let the program do what the settings plan."""
        Path(str(self.spec.settings["armed"])).touch()

    def until_taken(self) -> None:
        """The program is at it."""
        taken = Path(f"{self.spec.settings['armed']}.taken")
        self.until(taken.is_file, "the program to come to its fault")
        told = json.loads(taken.read_text())
        self.strike(f"rank {told['rank']} at step {told['step']}", told["at"])

    @contextlib.contextmanager
    def refusing(self, kind: str, *, times: int = 10**9, seen: int = 1, method: str = "PUT", **how: Any) -> Iterator[Fault]:
        """The S3 server misbehaves; at the end, that it did so `seen` times is proof."""
        fault = Fault(kind, method, times, how.get("amount", 0.0), how.get("contains", ""))
        self.strike()
        self.server._faults.append(fault)
        try:
            yield fault
            self.until(lambda: times - fault.times >= seen, f"{seen} requests to meet {kind!r}")
        finally:
            self.server.forgive()
        self.strike(f"{times - fault.times} requests met it")

    def kill_in_phase(self, pid: int, phase: WorkerPhase) -> None:
        """SIGKILL to a worker that its beacon says to be in a phase: it is stopped there first, and looked at again."""
        with _beacon(pid) as view:
            deadline = time.monotonic() + WAIT_S
            while time.monotonic() < deadline:
                if (seen := beacon.read(view)) is None or seen.phase is not phase:
                    continue
                _signal(pid, signal.SIGSTOP)
                self.until(lambda: _state(pid) == "T", f"the halt of {pid}")
                seen = beacon.read(view)
                if seen is not None and seen.phase is phase:
                    self.kill(pid)
                    self.strike(f"in phase {phase} of step {seen.step}")
                    return
                _signal(pid, signal.SIGCONT)
        raise Unseen(f"worker {pid} was never met in phase {phase}")

    def clean_stopped(self) -> None:
        """End what was stopped, or started beside."""
        for pid in self._doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._doomed.clear()

    def clean(self) -> None:
        """End all that, and the job, if it is not over."""
        self.clean_stopped()
        Path(str(self.spec.settings["gate"])).touch()
        supervisor = names.actor(names.supervisor_name(self.spec.name))
        for handle in (supervisor, *map(names.actor, names.actors_of(self.spec.name))):
            if handle is not None:
                names.kill(handle)
        if "running" in vars(self):
            self.running.thread.join(WAIT_S)
        self.undo.close()


@contextlib.contextmanager
def _beacon(pid: int) -> Iterator[memoryview]:
    """What a worker says of itself to its node's agent; outlives it."""
    for entry in os.scandir(f"/proc/{pid}/fd"):
        if os.readlink(entry.path).startswith(f"/memfd:{beacon.MEMFD_NAME} "):
            with (open(entry.path, "rb") as file, mmap.mmap(file.fileno(), beacon.SIZE, prot=mmap.PROT_READ) as held,
                  memoryview(held) as view):  # fmt: skip
                yield view
            return
    raise Unseen(f"worker {pid} has no beacon")


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise Unseen(f"process {pid} was gone before the fault came") from None


def _state(pid: int) -> str:
    """The kernel's letter for a process; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _drive(spec: str) -> None:
    ray.init(namespace=names.NAMESPACE, log_to_driver=False)
    launch.run(train, codec.from_json(Job, json.loads(spec)), quiet=True)


if __name__ == "__main__":
    _drive(sys.argv[1])
