"""What the parts of a recovery took, learned from the journal, and how the machine's decisions come to go by it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ray_dr.actors.measuring import Measuring
from ray_dr.checkpoint.pace import Pace
from ray_dr.cli.timeline import describe
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.events import (
    FirstStep,
    InventoryTaken,
    NodeJoined,
    NodeLost,
    Tick,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)
from ray_dr.model.journal import Decided, JobOpened, Marked, Noted, Record, Restored
from ray_dr.model.ladder import UNMEASURED, Measured, Rung
from ray_dr.model.recovery import Queued, State
from ray_dr.model.signal import FaultKind, Subject
from ray_dr.recovery.policy import policy_of
from ray_dr.telemetry.phases import MEASURED, Phases, differs, note, read
from ray_dr.telemetry.timeline import incidents
from tests.unit.lives import five_steps, noted
from tests.unit.stored_life import SPEC, Life


def learned(records: list[Record]) -> Measured:
    phases = Phases()
    for record in records:
        phases.add(record)
    return phases.measured()


def lost_and_grown_again() -> Life:
    """Node b is lost, one rank goes on; 20 s later another node is there, and 2 s after it its worker."""
    life = five_steps()
    life.records.append(noted(105.0, FaultKind.NODE_GONE, Subject("b"), "node b is gone", since=104.8))
    life.meet(NodeLost(105.0, "b", "closed", 5), WorkerStopped(105.1, "a/0.1", 1, 5))
    life.meet(InventoryTaken(105.2, 1, VersionId(1, 3), 2))
    life.records += [Marked(105.3, 2, "group_joined", 0.1), Restored(105.9, 2, 0, VersionId(1, 3), {"memory": 10}, 0.3, 0.2)]
    life.meet(FirstStep(106.0, 2, 4), NodeJoined(125.0, "c"), WorkerReady(127.0, "c/0.1", "c"))
    life.meet(WorkerStopped(128.0, "a/0.1", 2, 40))
    return life


def test_each_part_is_timed_from_what_was_asked_to_what_was_answered() -> None:
    found = learned(lost_and_grown_again().records)
    names = "detect_s", "unwind_s", "inventory_s", "node_join_s", "process_start_s"
    seen = {name: round(getattr(found, name), 3) for name in names}
    # Two workers took 0.2 s each, the third two seconds; two nodes joined 0.1 s after they were asked for, the third after 20.
    assert seen == {"detect_s": 0.21, "unwind_s": 0.1, "inventory_s": 0.2, "node_join_s": 0.1, "process_start_s": 0.2}


def test_the_parts_of_a_beginning_add_up_to_the_whole() -> None:
    found = learned(lost_and_grown_again().records)
    assert (round(found.form_s, 3), round(found.restore_s, 3)) == (0.1, 0.5)
    assert round(found.begin_s, 3) == 0.8, "from 105.2, when the group was formed, to 106.0"


def test_a_planned_stop_is_timed_from_the_first_who_stops() -> None:
    life = lost_and_grown_again()
    assert learned(life.records).stop_s == UNMEASURED.stop_s, "one member stops alone"
    life = five_steps()
    life.meet(WorkerStopped(112.4, "a/0.1", 1, 9), WorkerStopped(112.7, "b/0.1", 1, 9))
    assert round(learned(life.records).stop_s, 3) == 0.3


def test_a_process_that_ends_before_it_is_ready_is_not_taken_for_the_next_one() -> None:
    life = five_steps()
    life.meet(WorkerLost(105.0, "b/0.1", "b", "killed", 5), WorkerLost(108.0, "b/0.2", "b", "no start", 5))
    life.meet(WorkerReady(110.0, "b/0.3", "b"))
    phases = Phases()
    for record in life.records:
        phases.add(record)
    assert [round(took_s, 2) for took_s in phases._seen["process_start_s"]] == [0.2, 0.2, 2.0]


def test_what_was_learned_before_counts_until_this_life_knows_better() -> None:
    before = Measured(process_start_s=7.0, node_join_s=33.0, stop_s=0.7)
    records: list[Record] = [Noted(50.0, MEASURED, note(before)), *lost_and_grown_again().records]
    found = learned(records)
    assert (found.stop_s, round(found.process_start_s, 3)) == (0.7, 0.2)
    assert read({"of": "another version"}) is None
    assert learned([Noted(50.0, MEASURED, {"of": "another version"})]) == UNMEASURED


def test_only_what_moves_is_news() -> None:
    assert not differs(UNMEASURED, UNMEASURED)
    assert not differs(replace(UNMEASURED, process_start_s=5.9), UNMEASURED)
    assert differs(replace(UNMEASURED, process_start_s=6.1), UNMEASURED)
    assert not differs(replace(UNMEASURED, inventory_s=0.06), UNMEASURED)
    assert not differs(replace(UNMEASURED, step_s=1.4), UNMEASURED)
    assert differs(replace(UNMEASURED, step_s=1.6), UNMEASURED)


@dataclass
class Supervisor:
    """As much of the supervisor as measuring needs."""

    notes: list[Noted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state, self.policy, self.pace = State(Queued()), policy_of(SPEC), Pace()
        self.measuring = Measuring(self)  # type: ignore[arg-type]

    def note(self, name: str, **fields: object) -> None:
        self.notes.append(Noted(0.0, name, fields))


def test_the_policy_is_replaced_between_failures_and_the_journal_told() -> None:
    host, life = Supervisor(), lost_and_grown_again()
    for record in life.records:
        host.measuring.heard(record)
    host.measuring.look()
    assert (host.policy, host.notes) == (policy_of(SPEC), []), "not while a group is being formed"
    life.meet(FirstStep(130.0, 3, 41))
    host.state = life.state  # type: ignore[assignment]
    host.pace.stepped(StepRecord(3, 41, 0, 1, (), "", 0.25), 130.0)
    host.measuring.look()
    assert round(host.policy.measured.begin_s, 3) == 0.8
    (said,) = host.notes
    assert (said.name, read(said.fields)) == (MEASURED, host.policy.measured)
    host.measuring.look()
    assert len(host.notes) == 1


def test_a_new_supervisor_begins_with_what_the_last_one_knew() -> None:
    host = Supervisor()
    host.measuring.recall([JobOpened(1.0, 1, "night", {}), Noted(2.0, MEASURED, note(Measured(process_start_s=9.0)))])
    life = five_steps()
    host.state = life.state  # type: ignore[assignment]
    host.measuring.look()
    assert host.policy.measured.process_start_s == 9.0


def test_a_report_compares_what_was_expected_with_what_it_took() -> None:
    (report,) = incidents(lost_and_grown_again().records)
    assert report.plan is not None
    assert (report.plan.way.rung, report.plan.way.workers, report.plan.wanted) == (Rung.SHRINK, 1, 2)
    assert report.plan.way.next_step_s == UNMEASURED.begin_s
    assert report.took_s is not None
    assert round(report.took_s, 2) == 0.79
    assert "\n  expected  shrink, the next step after 500 ms: it took 790 ms\n" in describe(report)


def test_who_is_waited_for_is_part_of_what_was_expected() -> None:
    """Measured, a process is up in 0.4 s: less than what its coming later would cost."""
    quick = Measured(process_start_s=0.4)
    life = five_steps()
    life.policy = replace(policy_of(SPEC), measured=quick)
    life.meet(WorkerLost(105.0, "b/0.1", "b", "killed", 5), WorkerStopped(105.1, "a/0.1", 1, 5))
    life.meet(InventoryTaken(105.15, 1, VersionId(1, 3), 2), Tick(105.2), WorkerReady(105.45, "b/0.2", "b"))
    life.meet(FirstStep(106.0, 2, 4))
    (report,) = incidents(life.records)
    assert report.plan is not None
    assert (report.plan.way.rung, report.plan.way.workers) == (Rung.PROCESS, 2)
    assert report.took_s is not None
    assert round(report.took_s, 2) == 0.84
    assert "waiting for processes that are starting (2 of 2 workers): 0.75 s expected" in life.reasons()
    assert sum(isinstance(record, Decided) and record.state.attempt == 2 for record in life.records) == 2
