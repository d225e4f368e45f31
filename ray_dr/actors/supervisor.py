"""The supervisor of one job: hosts the job's machine.

    watches, outcomes, timers --events--> mailbox > step(state, event, policy) > journal > perform --> effects

One thread consumes the mailbox and is the only one to touch the state. Everything else only enqueues: actor methods, the
threads that listen to node agents, the outcomes of actions. A decision is in the journal before its actions start;
the journal's copy in the store may lag by FLUSH_S when the store is slow, so that a slow store never delays a recovery.
A restarted supervisor takes the next term, finds the agents and workers that live on, and takes the group over.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from ray_dr.actors import cluster
from ray_dr.actors.perform import Performer
from ray_dr.actors.progress import Progress
from ray_dr.actors.watch import Message
from ray_dr.checkpoint.pace import Pace
from ray_dr.telemetry.tiers import Completeness
from ray_dr.errors import Fenced, StoreError
from ray_dr.model import codec
from ray_dr.model.checkpoint import Manifest, PartRef, StepRecord, VersionId
from ray_dr.model.job import Job
from ray_dr.model.journal import (
    DataOpened,
    Decided,
    JobOpened,
    Noted,
    PartSaved,
    Record,
    Stepped,
    VersionSaved,
    Where,
)
from ray_dr.model.recovery import (
    Adopted,
    CloseJob,
    Event,
    Failed,
    FencedOff,
    Finished,
    FirstStep,
    Group,
    NodeLost,
    Opened,
    Saved,
    StopRequested,
    Tick,
    WorkerLost,
    WorkerRaised,
)
from ray_dr.recovery.groups import group_of
from ray_dr.recovery.machine import initial, step
from ray_dr.recovery.policy import policy_of
from ray_dr.repository.commit import CommitLog
from ray_dr.stores.open import open_store, proven
from ray_dr.stores.unconditional import GUARANTEE
from ray_dr.telemetry.journal import Journal, last_attempt

TICK_S = 0.1
FLUSH_S = 0.05
PACE_S = 0.5
MAILBOX_MAX = 200_000
SIZES_KEPT = 16
LINGER_S = 20.0
"""After the end the supervisor stays this long for those who wait for the outcome."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A report of a node agent."""

    node: str
    messages: list[Message]
    last: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The committing thread is through with a version."""

    manifest: Manifest


class Host:
    """The machine's real-time host. `start` returns at once; `wait` gives the outcome."""

    def __init__(self, job: Job, train: bytes, token: bytes) -> None:
        self.job, self.policy = job, policy_of(job)
        self.state = initial()
        self.progress, self.pace, self.complete = Progress(), Pace(), Completeness()
        self.refs: dict[VersionId, dict[int, PartRef]] = {}
        self.sizes: dict[VersionId, int] = {}
        self.global_batch = 0
        self.outcome: Finished | Failed | None = None
        self._mailbox: queue.Queue[Event | Heard | Committed] = queue.Queue(MAILBOX_MAX)
        self._acks: dict[str, int] = {}
        self._seq = 0
        self._over = threading.Event()
        self._paced_at = 0.0
        self.store = proven(open_store(job.store.url))
        self.log = CommitLog(self.store, job.name)
        self.term = self.log.take_term(f"{platform.node()}:{os.getpid()}", time.time())
        self.log.mark()
        seen = self.log.refresh()
        self.stored = seen.checkpoints
        self.journal = Journal(self.store, job.name, self.term, clock=time.time)
        self.perform = Performer(self, train, token)
        if seen.doubtful:
            self.note("log.damaged", entries=list(seen.doubtful), store=self.store.url)

    def start(self) -> None:
        """Begin: journal, adoption of what lives, the loop."""
        threading.Thread(target=self._run, name="host", daemon=True).start()

    @property
    def committed(self) -> Manifest | None:
        """The newest committed checkpoint, as far as this supervisor knows: a recovery must not wait for the store."""
        return self.stored[-1] if self.stored else None

    def post(self, event: Event) -> None:
        """Enqueue an event; from any thread."""
        self._mailbox.put(event)

    def heard(self, node: str, messages: list[Message], last: int) -> None:
        """Enqueue a report; from a watch's thread."""
        if messages:
            self._mailbox.put(Heard(node, messages, last))

    def lost(self, node: str, how: str) -> None:
        """A node's agent is gone; from a watch's thread."""
        self.post(NodeLost(time.time(), node, how, self.progress.step))

    def note(self, name: str, **fields: object) -> None:
        """Something worth knowing that is no decision."""
        self.journal.append(Noted(time.time(), name, fields))

    def wait(self, timeout_s: float) -> bool:
        """Whether the job is over and closed, within `timeout_s`."""
        return self._over.wait(timeout_s)

    def snapshot(self) -> dict[str, Any]:
        """What is going on, for a live display (JSON)."""
        group = group_of(self.state)
        return {
            "phase": type(self.state.phase).__name__, "attempt": self.state.attempt, "step": self.progress.step,
            "world": len(group.members) if group else 0, "nodes": [node.id for node in self.state.nodes],
            "incidents": self.state.incidents, "term": self.term, "journal_lag_s": self.journal.lag_s,
            "over": self._over.is_set(),
        }  # fmt: skip

    # -- the loop

    def _run(self) -> None:
        try:
            self._open()
            while self.outcome is None:
                self._consume()
            self._close()
        except BaseException as error:
            self.note("supervisor.crashed", error=repr(error))
            self.journal.flush(5.0)
            os._exit(1)  # Ray restarts this actor; the next term takes over what lives

    def _consume(self) -> None:
        try:
            item = self._mailbox.get(timeout=TICK_S)
        except queue.Empty:
            item = Tick(time.time())
        match item:
            case Heard():
                self._report(item)
            case Committed():
                self._version_committed(item.manifest)
            case _:
                self._decide(item)
        if time.monotonic() - self._paced_at > PACE_S:
            self._paced_at = time.monotonic()
            self._decide(Tick(time.time()))
            self._housekeep()

    def _decide(self, event: Event) -> None:
        decision = step(self.state, event, self.policy)
        if decision.state is self.state and not decision.actions and isinstance(event, Tick):
            return
        self._seq += 1
        self.journal.append(
            Decided(time.time(), self.term, self._seq, event, decision.state, decision.actions, decision.reason)
        )
        if decision.actions:
            self.journal.flush(FLUSH_S)
        self.state = decision.state
        self.perform.know(decision.state)
        for action in decision.actions:
            if isinstance(action, CloseJob):
                self.outcome = self.state.phase if isinstance(self.state.phase, Finished | Failed) else None
            self.perform.perform(action)

    def _housekeep(self) -> None:
        for node, last in self._acks.items():
            if self.journal.lag_s == 0.0:
                self.perform.ack(node, last)
        group = group_of(self.state)
        if group is not None and self.progress.attempt == group.attempt:
            cadence = self.pace.next(self.job, self.perform.cadence, self.progress.newest)
            if cadence is not None:
                self.note("cadence.changed", memory_every=cadence.memory_every, store_every=cadence.store_every,
                          from_step=cadence.from_step, step_s=self.pace.step_s, cost_s=self.pace.cost_s,
                          reason=self.pace.reason(self.job, cadence))  # fmt: skip
                if (exposed_s := self.pace.exposed_s(cadence)) > self.job.rpo_s:
                    self.note("rpo.unreachable", rpo_s=self.job.rpo_s, exposed_s=exposed_s, write_s=self.pace.write_s)
                self.perform.set_cadence(group, cadence)

    # -- opening and closing

    def _open(self) -> None:
        spec = codec.to_json(self.job)
        self.journal.append(
            JobOpened(time.time(), self.term, self.job.name, spec, platform.python_version(), ray.__version__)
        )
        if not self.store.traits.conditional_put:
            self.note("store.weaker", store=self.store.url, guarantee=GUARANTEE)
        attempt = last_attempt(self.store, self.job.name)
        attempt = max([attempt, *(manifest.version.attempt for manifest in self.stored)])
        found = self.perform.find_living()
        self._decide(Opened(time.time(), self.term, max([attempt, *(w.attempt for w in found.workers)])))
        for event in found.events:
            self._decide(event)
        if found.group is not None:
            self.progress.begin(found.group.attempt, len(found.group.members), found.step)
            self._decide(Adopted(time.time(), found.group, found.step))
        self.perform.discover()

    def _close(self) -> None:
        self.perform.close()
        self.journal.close()
        self._over.set()

    def begin(self, group: Group) -> None:
        """A group forms: what is measured begins anew."""
        self.progress.begin(group.attempt, len(group.members), group.restore.step if group.restore else 0)
        self.pace.restart()

    # -- what agents report

    def _report(self, report: Heard) -> None:
        for message in report.messages:
            if "record" in message:
                self._record(codec.from_json(Record, message["record"]), message.get("ref"))
            elif "witness" in message:
                self._stepped(Stepped(time.time(), codec.from_json(StepRecord, message["witness"])))
            elif "event" in message:
                event: Event = codec.from_json(Event, message["event"])
                if isinstance(event, WorkerRaised) and event.unreadable:
                    self._unreadable(event)
                self._decide(event)
            elif "lost" in message:
                node = self.perform.node_of(message["lost"]) or report.node
                self._decide(
                    WorkerLost(time.time(), message["lost"], node, "its connection closed", self.progress.step)
                )
        self._acks[report.node] = report.last

    def _unreadable(self, event: WorkerRaised) -> None:
        """No copy of the version an attempt began from can be read: the next one begins from an older version."""
        group = group_of(self.state)
        if group is not None and group.attempt == event.attempt and group.restore is not None:
            self.perform.give_up(group.restore)
            self.note("version.unreadable", step=group.restore.step, attempt=group.restore.attempt, error=event.error)

    def _record(self, record: Record, ref: Any) -> None:
        match record:
            case Stepped():
                self._stepped(record)
            case PartSaved():
                self.journal.append(record)
                self._part_saved(record, codec.from_json(PartRef, ref) if ref else None)
            case DataOpened():
                self.global_batch = record.global_batch
                self.journal.append(record)
            case _:
                self.journal.append(record)

    def _stepped(self, stepped: Stepped) -> None:
        record = stepped.record
        if not self.progress.add(record):
            return
        self.journal.append(stepped)
        if record.attempt != self.progress.attempt:
            return
        if record.rank == 0:
            self.pace.stepped(record)
        first = self.progress.began + 1
        if record.step == first and self.progress.step >= first:
            self._decide(FirstStep(stepped.at, record.attempt, first))

    def _part_saved(self, record: PartSaved, ref: PartRef | None) -> None:
        if record.rank == 0:
            self.pace.saved(record)
        if record.where is Where.MEMORY:
            self.sizes[record.version] = self.sizes.pop(record.version, 0) + record.size
            while len(self.sizes) > SIZES_KEPT:
                del self.sizes[next(iter(self.sizes))]
        if ref is not None:
            self.refs.setdefault(record.version, {})[record.rank] = ref
        with contextlib.suppress(ValueError):
            self.complete, new = self.complete.add(
                record.version, record.rank, record.world, record.where, record.node
            )
            for version, where in new:
                self._version_complete(version, Where(where), record.world)

    def _version_complete(self, version: VersionId, where: Where, world: int) -> None:
        if where is Where.STORE:
            self._commit(version, world)
            return
        size = self.sizes.get(version, 0)
        self.journal.append(VersionSaved(time.time(), version, where, size))
        if where is Where.PEER or not self.perform.copying:
            self.perform.tell_completed(version)

    # -- commits

    def _commit(self, version: VersionId, world: int) -> None:
        parts = self.refs.pop(version)
        self.refs = {v: r for v, r in self.refs.items() if (v.attempt, v.step) > (version.attempt, version.step)}
        manifest = Manifest(
            1, self.job.name, self.term, version, world, version.step * self.global_batch,
            tuple(parts[rank] for rank in sorted(parts)), time.time(),
        )  # fmt: skip
        threading.Thread(target=self._commit_now, args=(manifest,), name="commit", daemon=True).start()

    def _commit_now(self, manifest: Manifest) -> None:
        try:
            manifest = self.log.commit(manifest)
        except Fenced as error:
            self.post(FencedOff(time.time(), error.newest))
        except StoreError as error:
            self.note("store.unavailable", error=str(error), step=manifest.version.step, store=self.store.url)
        else:
            self._mailbox.put(Committed(manifest))
            self.log.mark()
            self.perform.prune()

    def _version_committed(self, manifest: Manifest) -> None:
        version = manifest.version
        self.stored = (*self.stored, manifest)[-self.job.store.keep_last :]
        self.journal.append(VersionSaved(time.time(), version, Where.STORE, self.sizes.get(version, 0)))
        if self.perform.final == version:
            self._decide(Saved(time.time(), version.attempt, version.step))


class Supervisor:
    """The Ray actor: detached, named by its job, restarted by Ray on another node when its own dies."""

    def __init__(self, job: Any, token: bytes, *train: bytes) -> None:
        self._host = Host(codec.from_json(Job, job), b"".join(train), token)
        self._host.start()
        threading.Thread(target=self._end, name="end", daemon=True).start()

    def snapshot(self) -> dict[str, Any]:
        """What is going on."""
        context = ray.get_runtime_context()
        return {**self._host.snapshot(), "supervisor": {"node": context.get_node_id(), "pid": os.getpid()}}

    def stop(self, within_s: float, why: str) -> None:
        """Ask the job to stop, keeping its state."""
        self._host.post(StopRequested(time.time(), within_s, why))

    def wait(self, timeout_s: float) -> Any:
        """The outcome as tagged JSON, or None when the job goes on."""
        if not self._host.wait(timeout_s):
            return None
        return codec.to_json(self._host.outcome, tagged=True)

    def _end(self) -> None:
        self._host.wait(float(threading.TIMEOUT_MAX))
        time.sleep(LINGER_S)
        mine = cluster.actor(cluster.supervisor_name(self._host.job.name))
        if mine is not None:
            cluster.kill(mine)

