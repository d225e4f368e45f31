"""A job's life as it lies in a store: two workers, a node lost at step 5, on with one from step 3, finished at step 8.

The decisions are the machine's own; the checkpoints at steps 4 and 8 are put and committed as a worker's node would.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_dr.checkpoint.save_plan import plan_save, replicated
from ray_dr.model.checkpoint import CHUNK_BYTES, Chunk, Manifest, Part, StepRecord, VersionId
from ray_dr.model.codec import to_json
from ray_dr.model.data import Order, digest, share
from ray_dr.model.events import (
    Event,
    FirstStep,
    InventoryTaken,
    NodeJoined,
    NodeLost,
    Opened,
    Saved,
    WorkerReady,
    WorkerReturned,
    WorkerStopped,
)
from ray_dr.model.job import Job, StoreTier, Workers
from ray_dr.model.journal import (
    DataOpened,
    Decided,
    JobOpened,
    PartSaved,
    Record,
    Restored,
    Stepped,
    VersionSaved,
    Where,
)
from ray_dr.model.recovery import Policy
from ray_dr.recovery.machine import initial, step
from ray_dr.recovery.policy import policy_of
from ray_dr.repository.chunks import KnownChunks, chunk_id
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.saving import save_part
from ray_dr.stores.base import Store
from ray_dr.telemetry.journal import segment_key

NAME = "night"
SPEC = Job(NAME, StoreTier("memory://unused"), Workers(2, 2, 1))
BATCH, SAMPLES, SEED = 8, 20, 5
ORDER = Order(SAMPLES, SEED)
TENSORS = {"model/a": (5, 3), "model/b": (), "optimizer/c": (200,)}
KILLED_AT = 105.0


@dataclass(slots=True)
class Life:
    """Records as they come about."""

    spec: Job = SPEC
    records: list[Record] = field(default_factory=list)
    state: object = field(default_factory=initial)
    policy: Policy | None = None
    """Of the machine; None: as the spec says."""

    def open(self) -> None:
        self.records.append(JobOpened(99.0, 1, self.spec.name, to_json(self.spec), "3.11.7", "2.60.0"))

    def meet(self, *events: Event) -> None:
        for event in events:
            decision = step(self.state, event, self.policy or policy_of(self.spec))
            seq = 1 + sum(isinstance(record, Decided) for record in self.records)
            self.records.append(
                Decided(event.at + 0.01, 1, seq, event, decision.state, decision.actions, decision.reason)
            )
            self.state = decision.state

    def reasons(self) -> str:
        """Of all decisions so far."""
        return "\n".join(record.reason for record in self.records if isinstance(record, Decided))

    def do(self, attempt: int, steps: range, world: int, *, since: float) -> None:
        for number in steps:
            self.records += [did(attempt, number, rank, world, since + number) for rank in range(world)]


def did(attempt: int, number: int, rank: int, world: int, at: float) -> Stepped:
    """One rank's word on one step; the loss falls with the steps and is the same for all ranks."""
    part = share(number - 1, global_batch=BATCH, rank=rank, world=world)
    indices = (ORDER.index(position) for position in range(part.first, part.last))
    ranges, logs = ((part.first, part.last),), {"loss": 5.0 / number}
    return Stepped(at, StepRecord(attempt, number, rank, world, ranges, digest(indices), 0.5, logs))


def undisturbed() -> list[Record]:
    """The same job when nothing happens to it."""
    life = begun()
    life.do(1, range(2, 9), 2, since=100.0)
    _end(life, "a/0.1", "b/0.1", attempt=1, at=109.0)
    return life.records


def disturbed() -> list[Record]:
    """The job as told above."""
    life = begun()
    life.do(1, range(2, 6), 2, since=99.9)
    life.records += [
        *(PartSaved(103.5, VersionId(1, 3), rank, 2, Where.MEMORY, "a", 10, 0.1) for rank in range(2)),
        *(PartSaved(103.6, VersionId(1, 3), rank, 2, Where.PEER, "b", 10, 0.1, sent=10) for rank in range(2)),
        VersionSaved(103.7, VersionId(1, 3), Where.PEER, 20),
    ]
    life.meet(
        NodeLost(105.1, "b", "connection closed", 5),
        WorkerStopped(105.3, "a/0.1", 1, 5),
        InventoryTaken(105.4, 1, VersionId(1, 3)),
    )
    life.records.append(Restored(106.0, 2, 0, VersionId(1, 3), {"memory": 10, "peer": 7}, 0.3, 0.1))
    life.do(2, range(4, 5), 1, since=102.5)
    life.meet(FirstStep(106.5, 2, 4))
    life.do(2, range(5, 9), 1, since=102.5)
    _end(life, "a/0.1", attempt=2, at=111.0)
    return life.records


def write_journal(store: Store, records: Sequence[Record], job: str = NAME) -> None:
    """The records as a job's first two segments."""
    lines = [json.dumps(to_json(record, tagged=True)).encode() + b"\n" for record in records]
    half = len(lines) // 2
    for segment, part in enumerate((lines[:half], lines[half:])):
        store.put(segment_key(job, 1, segment), b"".join(part), if_absent=True)


def contents(number: int) -> bytes:
    """The bytes of the checkpoint at a step, in order of place."""
    size = plan_save(_leaves(), rank=0, world=1).size
    return bytes((at * 7 + number) % 251 for at in range(size))


def save_checkpoint(store: Store, number: int, *, attempt: int = 1, data: bytes = b"", job: str = NAME) -> Part:
    """A committed checkpoint of TENSORS; `data` are its bytes, without it `contents` of its step."""
    log = CommitLog(store, job)
    term = log.term() or log.take_term("test", 99.0)
    stream = data or contents(number)
    plan = plan_save(_leaves(), rank=0, world=1)
    runs = [(at, stream[at : at + CHUNK_BYTES]) for at in range(0, plan.size, CHUNK_BYTES)]
    chunks = tuple(Chunk(chunk_id(run), at, len(run)) for at, run in runs)
    version = VersionId(attempt, number)
    part = Part(version, 0, 1, plan.size, plan.shards, chunks, {"lr": 0.5})
    saved = save_part(store, log, job, part, memoryview(stream), term=term, known=KnownChunks())
    log.commit(Manifest(1, job, term, version, 1, number * BATCH, (saved.ref,), 100.0 + number))
    return part


def _leaves() -> list:
    return [replicated(name, "int32", shape, rank=0, world=1) for name, shape in TENSORS.items()]


def begun(spec: Job = SPEC) -> Life:
    """Up to the first step."""
    life = Life(spec)
    life.open()
    life.meet(
        Opened(99.0, 1, 0),
        NodeJoined(99.1, "a"),
        NodeJoined(99.2, "b"),
        WorkerReady(99.3, "a/0.1", "a"),
        WorkerReady(99.4, "b/0.1", "b"),
        InventoryTaken(99.5, 0, None),
    )
    life.records.append(DataOpened(99.6, 1, SAMPLES, BATCH, 1, SEED, True))
    life.do(1, range(1, 2), 2, since=100.0)
    life.meet(FirstStep(101.0, 1, 1))
    return life


def _end(life: Life, *members: str, attempt: int, at: float) -> None:
    life.meet(*(WorkerReturned(at, member, attempt, 8) for member in members))
    life.records.append(VersionSaved(at + 0.5, VersionId(attempt, 8), Where.STORE, 20))
    life.meet(Saved(at + 0.6, attempt, 8))
