"""The host of one job's machine, in real time.

    watches, outcomes, timers --events--> mailbox > step(state, event, policy) > journal > perform --> effects

One thread consumes the mailbox and is the only one to touch the state. Everything else only enqueues: actor methods, the
threads that listen to node agents, the outcomes of actions. A decision is in the journal before its actions start;
the journal's copy in the store may lag by FLUSH_S when the store is slow, so that a slow store never delays a recovery.
A restarted supervisor takes the next term, finds the agents and workers that live on, and takes the group over.
"""

from __future__ import annotations

import os
import platform
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from ray_dr.actors.forming import disk_place
from ray_dr.actors.keeping import Keeping
from ray_dr.actors.machines import Machines
from ray_dr.actors.measuring import Measuring
from ray_dr.actors.notices import Notices
from ray_dr.actors.perform import Performer
from ray_dr.actors.progress import Progress
from ray_dr.actors.saves import Committed, Saves
from ray_dr.actors.sensing import Senses
from ray_dr.actors.tuning import Tuning
from ray_dr.actors.watch import Message
from ray_dr.checkpoint.depot import Depot
from ray_dr.checkpoint.pace import Pace
from ray_dr.model import codec
from ray_dr.model.actions import CloseJob, KillWorker, ReleaseNode
from ray_dr.model.checkpoint import PartRef, StepRecord, VersionId
from ray_dr.model.events import (
    Adopted,
    Event,
    FirstStep,
    NodeJoined,
    NodeLost,
    Opened,
    Tick,
    WorkerLost,
    WorkerRaised,
)
from ray_dr.model.job import Job
from ray_dr.model.journal import (
    DataOpened,
    Decided,
    JobOpened,
    Noted,
    PartSaved,
    Record,
    Stepped,
)
from ray_dr.model.recovery import Failed, Finished, Group
from ray_dr.model.signal import Notice
from ray_dr.model.upload import Upload
from ray_dr.recovery.fleet import idle_workers
from ray_dr.recovery.groups import group_of
from ray_dr.recovery.inquest import Inquest
from ray_dr.recovery.machine import initial, step
from ray_dr.recovery.policy import policy_of
from ray_dr.stores.unconditional import GUARANTEE
from ray_dr.telemetry.journal import Journal, last_known
from ray_dr.telemetry.live import Live

TICK_S = 0.1
FLUSH_S = 0.05
PACE_S = 0.5
MAILBOX_MAX = 200_000
MACHINES_S = 2.0


@dataclass(frozen=True, slots=True)
class Heard:
    """A report of a node agent. `at`: when it was received, monotonic seconds."""

    node: str
    messages: list[Message]
    last: int
    at: float


class Host:
    """The machine's real-time host. `start` returns at once; `wait` gives the outcome."""

    def __init__(self, job: Job, train: bytes, token: bytes) -> None:
        self.job, self.policy = job, policy_of(job)
        self.state = initial()
        self.progress, self.pace = Progress(), Pace()
        self.outcome: Finished | Failed | None = None
        self._mailbox: queue.Queue[Event | Heard | Committed | Noted] = queue.Queue(MAILBOX_MAX)
        self._acks: dict[str, int] = {}
        self._seq = 0
        self._over = threading.Event()
        self.head_heard_at = time.monotonic()
        self._paced_at = 0.0
        owner = f"{platform.node()}:{os.getpid()}"
        first = Depot(job.store, job.name, owner)
        self.store, self.term = first.store, first.term
        self.disk = disk_place(job.name, job.disk.url, first.log.life()) if job.disk else ()
        self.journal = Journal(self.store, job.name, self.term, clock=time.time)
        self.machines = Machines(self)
        self.notices = Notices(self)
        self.perform = Performer(self, train, token)
        self._measuring = Measuring(self)
        self._tuning = Tuning(self, self._measuring)
        self._inquest = Inquest()
        self._senses = Senses(self)
        self.vigil = self._senses.vigil
        self._live = Live(self.store, job.name, self.term, clock=time.time)
        self._keeping = Keeping(self, train)
        self.saves = Saves(self, first, owner)
        self.saves.doubt(first)
        if job.second is not None:
            self.saves.open_second(job.second)

    def start(self) -> None:
        """Begin: journal, adoption of what lives, the loop."""
        threading.Thread(target=self._run, name="host", daemon=True).start()

    @property
    def group(self) -> Group | None:
        """The workers at work."""
        return group_of(self.state)

    def post(self, event: Event) -> None:
        """Enqueue an event; from any thread."""
        self._mailbox.put(event)

    def heard(self, node: str, messages: list[Message], last: int) -> None:
        """Enqueue a report; from a watch's thread."""
        if messages:
            self._mailbox.put(Heard(node, messages, last, time.monotonic()))

    def committed(self, done: Committed) -> None:
        """Enqueue the outcome of a commit; from the committing thread."""
        self._mailbox.put(done)

    def lost(self, node: str, how: str) -> None:
        """A node's agent is gone, and what it held; from a watch's thread."""
        self.post(NodeLost(time.time(), node, how, self.progress.step))

    def note(self, name: str, **fields: object) -> None:
        """Something worth knowing that is no decision."""
        record = Noted(time.time(), name, fields)
        self.journal.append(record)
        if name == "finding":  # of any thread
            self._mailbox.put(record)

    def wait(self, timeout_s: float) -> bool:
        """Whether the job is over and closed, within `timeout_s`."""
        return self._over.wait(timeout_s)

    def snapshot(self) -> dict[str, Any]:
        """What is going on, for a live display (JSON)."""
        group = group_of(self.state)
        return {
            "phase": type(self.state.phase).__name__, "attempt": self.state.attempt, "step": self.progress.step,
            "world": len(group.members) if group else 0, "nodes": [node.id for node in self.state.nodes],
            "standbys": idle_workers(self.state, group) if group else (),
            "leaving": [departure.node for departure in self.state.departures],
            "incidents": self.state.incidents, "term": self.term, "tiers": self.saves.tiers(),
            "journal_lag_s": self.journal.lag_s, "over": self._over.is_set(), **codec.to_json(self._live.view()),
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
                self.saves.committed(item)
            case Noted():
                self._learn(item)
            case _:
                self.decide(item)
        for node, notice in self.notices.news():
            self._senses.noticed(node, (notice,))
        if self._mailbox.empty():  # else what it has heard may only not have been looked at
            self._senses.look()
            self._diagnose()
        if time.monotonic() - self._paced_at > PACE_S:
            self._paced_at = time.monotonic()
            self.decide(Tick(time.time()))
            self._housekeep()

    def decide(self, event: Event) -> None:
        """An event for the machine, from the loop's own thread."""
        if isinstance(event, NodeLost):
            self.saves.complete = self.saves.complete.without(event.node)
            self._senses.closed(event.node)
        elif isinstance(event, WorkerRaised):
            self._senses.raised(event)
        decision = step(self.state, event, self.policy)
        if decision.state is self.state and not decision.actions and isinstance(event, Tick):
            return
        self._seq += 1
        record = Decided(time.time(), self.term, self._seq, event, decision.state, decision.actions, decision.reason)
        self.journal.append(record)
        self._tuning.heard(record)
        self._learn(record)
        self.notices.heard(record)
        if isinstance(event, NodeJoined):
            self.notices.joined(event.node)
        if decision.actions:
            self.journal.flush(FLUSH_S)
        broken = group_of(self.state) is not None and group_of(decision.state) is None
        self.state = decision.state
        if broken:
            self._senses.broken(decision.state.attempt)
        self.perform.know(decision.state)
        self.machines.decided(decision.state)
        for action in decision.actions:
            if isinstance(action, CloseJob):
                self.outcome = self.state.phase if isinstance(self.state.phase, Finished | Failed) else None
            elif isinstance(action, KillWorker):
                self._senses.released(action.worker)
            elif isinstance(action, ReleaseNode):
                self._senses.released(action.node, node=True)
            self.perform.perform(action)

    def _learn(self, record: Record) -> None:
        self._measuring.heard(record)
        self._inquest.hear(record)

    def _diagnose(self) -> None:
        try:
            diagnosed = self._inquest.verdict(self.state, time.time())
        except Exception as error:  # a supervisor that ended of it would meet the same again, and end again
            self.note("diagnosis.failed", error=repr(error))
            return
        if diagnosed is not None:
            self.decide(diagnosed)

    def _housekeep(self) -> None:
        for node, last in self._acks.items():
            if self.journal.lag_s == 0.0:
                self.perform.ack(node, last)
        self._tuning.tune(group_of(self.state))
        self._measuring.look()

    # -- opening and closing

    def _open(self) -> None:
        spec = codec.to_json(self.job)
        self.journal.append(
            JobOpened(time.time(), self.term, self.job.name, spec, platform.python_version(), ray.__version__)
        )
        self._keeping.start()
        if not self.store.traits.conditional_put:
            self.note("store.weaker", store=self.store.url, guarantee=GUARANTEE)
        attempt, rollbacks = last_known(self.store, self.job.name)
        attempt = max([attempt, *(manifest.version.attempt for manifest in self.saves.stored)])
        self._tuning.recall()
        found = self.perform.find_living()
        self.decide(Opened(time.time(), self.term, max(attempt, found.attempt), rollbacks))
        for event in found.events:
            self.decide(event)
        if found.group is not None:
            self.progress.begin(found.group.attempt, len(found.group.members), found.step)
            if not found.left:
                self._senses.formed(found.group)
            self.decide(Adopted(time.time(), found.group, found.step, found.left))
        self.perform.discover()

    def _close(self) -> None:
        self.perform.close()
        self.machines.close(MACHINES_S)
        self.journal.close()
        self._live.close()
        self._keeping.close()
        self._over.set()

    def begin(self, group: Group) -> None:
        """A group forms: what is measured begins anew."""
        self.progress.begin(group.attempt, len(group.members), group.restore.step if group.restore else 0)
        self._senses.formed(group)
        self.pace.restart()
        self.saves.complete = self.saves.complete.begin(group.restore)
        self._live.begin()

    # -- what agents report

    def _report(self, report: Heard) -> None:
        self._senses.receive(report.at)
        for message in report.messages:
            if "record" in message:
                self._record(codec.from_json(Record, message["record"]), message.get("ref"))
            elif "witness" in message:
                self._stepped(Stepped(time.time(), codec.from_json(StepRecord, message["witness"])))
            elif "beat" in message:
                if self.perform.has(report.node):  # not of one that was given up meanwhile
                    self._senses.beat(report.node, message)
            elif "notices" in message:
                self._senses.noticed(report.node, codec.from_json(tuple[Notice, ...], message["notices"]))
            elif "upload" in message:
                self._live.heard(codec.from_json(Upload, message["upload"]))
            elif "event" in message:
                event: Event = codec.from_json(Event, message["event"])
                if isinstance(event, WorkerRaised) and event.unreadable:
                    self._unreadable(event)
                self.decide(event)
            elif "skipped" in message:
                self.saves.skip(codec.from_json(VersionId, message["skipped"]))
            elif "lost" in message and (node := self.perform.node_of(message["lost"])) is not None:
                # Else it was told to end, or belonged to a supervisor before this one: no news of those that start now.
                how = message.get("how", "its connection closed")
                self._senses.exited(node, message["lost"], how, oom=message.get("oom", False))
                self.perform.ended(message["lost"])
                self.decide(WorkerLost(time.time(), message["lost"], node, how, self.progress.step))
        self._acks[report.node] = report.last

    def _unreadable(self, event: WorkerRaised) -> None:
        """No copy of the version an attempt began from can be read: the next one begins from an older version."""
        group = group_of(self.state)
        if group is not None and group.attempt == event.attempt and group.restore is not None:
            self.perform.give_up(group.restore)
            self.note("version.unreadable", step=group.restore.step, attempt=group.restore.attempt, error=event.error)

    def _record(self, record: Record, ref: Any) -> None:
        self.notices.heard(record)
        match record:
            case Stepped():
                self._stepped(record)
            case PartSaved():
                self.journal.append(record)
                self.saves.part_saved(record, codec.from_json(PartRef, ref) if ref else None)
            case DataOpened():
                self.saves.global_batch = record.global_batch
                self.journal.append(record)
            case _:
                self.journal.append(record)
                self._tuning.heard(record)
                self._measuring.heard(record)

    def _stepped(self, stepped: Stepped) -> None:
        record = stepped.record
        if not self.progress.add(record):
            return
        self.journal.append(stepped)
        if record.attempt != self.progress.attempt:
            return
        self._senses.stepped(record)
        if record.rank == 0:
            self.pace.stepped(record, stepped.at)
        first = self.progress.began + 1
        if record.step == first and self.progress.step >= first:
            self.decide(FirstStep(stepped.at, record.attempt, first))
