"""The cadence of a running job as its journal tells it: every change with its reason, an objective out of reach, losses."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from ray_dr.actors import tuning
from ray_dr.actors.progress import Progress
from ray_dr.actors.tuning import Tuning
from ray_dr.checkpoint.failures import COUNTED, count_losses
from ray_dr.checkpoint.pace import Pace, first_cadence
from ray_dr.model.actions import FormGroup
from ray_dr.model.attempt import Cadence
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.events import FirstStep, Tick
from ray_dr.model.job import Job, StoreTier
from ray_dr.model.journal import Decided, Noted, PartSaved, Where
from ray_dr.model.recovery import Group, Node, Running, Starting, State
from ray_dr.stores.base import Store
from ray_dr.stores.memory import MemoryStore
from ray_dr.telemetry.journal import Journal, last_known, read_journal

GROUP = Group(1, ("a/0",), None)
AGAIN = Group(2, ("a/0",), VersionId(1, 3))


@dataclass
class Workers:
    """Where a cadence goes."""

    cadence: Cadence

    def set_cadence(self, group: Group, cadence: Cadence) -> None:
        self.cadence = cadence


@dataclass
class Supervisor:
    """As much of the supervisor as tuning needs."""

    job: Job
    store: Store = field(default_factory=MemoryStore)
    term: int = 1
    notes: list[Noted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = State(Running(GROUP), attempt=3)
        self.pace, self.progress = Pace(), Progress(1, 1)
        self.perform = Workers(first_cadence(self.job))
        self.tuning = Tuning(self)  # type: ignore[arg-type]

    def tune(self) -> None:
        """When every rank has begun with the last cadence."""
        self.progress.rank_steps[0] = max(self.progress.newest, self.perform.cadence.from_step)
        self.tuning.tune(GROUP)

    def note(self, name: str, **fields: object) -> None:
        self.notes.append(Noted(0.0, name, fields))

    def names(self) -> list[str]:
        return [note.name for note in self.notes]

    def train(self, steps: int, write_s: float = 0.0) -> None:
        for step in range(steps):
            self.pace.stepped(StepRecord(1, step, 0, 1, (), "", 0.1), 100.0 + step)
            self.pace.saved(PartSaved(0.0, VersionId(1, step), 0, 1, Where.MEMORY, "n", 1, 0.001, 0.004, 0))
        if write_s:
            self.pace.saved(PartSaved(0.0, VersionId(1, 4), 0, 1, Where.STORE, "n", 10**9, write_s, 0.0, 1))

    def recalled(self) -> None:
        self.tuning.recall()
        for thread in threading.enumerate():
            if thread.name == "recall":
                thread.join(30.0)


def test_every_change_is_told_to_the_workers_and_to_the_journal_with_its_reason() -> None:
    host = Supervisor(Job("job", StoreTier("memory://x")))
    host.train(20, write_s=1.0)
    before = host.perform.cadence
    host.tune()
    (note,) = host.notes
    assert note.name == "cadence.changed"
    assert (note.fields["memory_every"], note.fields["store_every"]) == (8, 300)
    assert "a save costs 4 ms" in str(note.fields["reason"])
    assert host.perform.cadence != before
    for _ in range(9):
        host.tune()
    assert host.names() == ["cadence.changed"], "settled"


def test_without_a_group_at_work_nothing_is_tuned() -> None:
    host = Supervisor(Job("job", StoreTier("memory://x")))
    host.train(20, write_s=1.0)
    host.tuning.tune(None)
    host.tuning.tune(AGAIN)
    assert host.notes == []


def test_an_objective_out_of_reach_is_told_once_and_so_is_that_it_is_met_again() -> None:
    host = Supervisor(Job("job", StoreTier("memory://x"), rpo_s=5.0))
    host.train(20, write_s=30.0)
    for _ in range(9):
        host.tune()
    (note,) = [note for note in host.notes if note.name.startswith("rpo.")]
    assert note.name == "rpo.unreachable"
    assert str(note.fields["reason"]).startswith(
        "at most 5 s of work may be lost, but a write takes 30 s (rank 0: 1 GB, 0.033 GB/s)"
    )
    for _ in range(99):
        host.train(0, write_s=1.0)
    for _ in range(9):
        host.tune()
    assert [name for name in host.names() if name.startswith("rpo.")] == ["rpo.unreachable", "rpo.reachable"]


def decided(at: float, *, group: Group, action: bool = False, term: int = 1) -> Decided:
    state = State(Starting(group, at) if action else Running(group), (Node("a"), Node("b")), attempt=1)
    event = Tick(at) if action else FirstStep(at, group.attempt, 1)
    return Decided(at, term, 1, event, state, (FormGroup(group),) if action else (), "because")


def write(store: Store, term: int, *records: Decided | Noted) -> None:
    journal = Journal(store, "job", term, clock=lambda: 0.0)
    for record in records:
        journal.append(record)
    assert journal.close()


def test_a_later_life_knows_what_the_earlier_ones_lost() -> None:
    host = Supervisor(Job("job", StoreTier("memory://x")), term=2)
    write(host.store, 1, decided(0.0, group=GROUP, action=True), decided(7200.0, group=GROUP))
    host.recalled()
    host.tuning.heard(decided(9000.0, group=AGAIN, action=True, term=2))
    tally = host.pace.losses.tally()
    assert (tally.store, tally.job_s, tally.node_s) == (1, 7200.0, 14_400.0)


def test_what_is_counted_is_noted_so_that_the_next_life_need_not_read_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "COUNT_S", -1.0)
    host = Supervisor(Job("job", StoreTier("memory://x")))
    host.tuning.heard(decided(0.0, group=GROUP, action=True))
    host.tuning.tune(None)
    assert host.notes == [], "not before it knows what the lives before lost"
    host.recalled()
    host.tuning.tune(None)
    (note,) = host.notes
    assert note.name == COUNTED
    write(host.store, 1, note)
    assert last_known(host.store, "job")[0] == 3
    assert count_losses(read_journal(host.store, "job")) == host.pace.losses.tally()


def test_a_damaged_journal_begins_the_count_anew_and_says_so() -> None:
    host = Supervisor(Job("job", StoreTier("memory://x")), term=2)
    host.store.put("jobs/job/journal/000001-00000000.jsonl", b"{}\n")
    host.recalled()
    assert host.names() == ["losses.unknown"]
    assert "line 1 is damaged" in str(host.notes[0].fields["error"])


def test_while_a_change_has_not_begun_no_other_one_is_told() -> None:
    host = Supervisor(Job("job", StoreTier("memory://x"), rpo_s=5.0))
    host.train(20, write_s=30.0)
    host.tune()
    host.train(0, write_s=0.01)
    before = host.perform.cadence
    host.tuning.tune(GROUP)
    assert host.perform.cadence is before
