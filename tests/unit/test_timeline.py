"""Folds over a hand-written journal: two ranks, a node lost at step 5, on from step 3 with one rank, back to two."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_dr.model.actions import Action, Decision, FormGroup
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.data import Order, digest, share
from ray_dr.model.events import Event, FirstStep, InventoryTaken, NodeLost, Opened, WorkerRaised, WorkerStopped
from ray_dr.model.journal import (
    DataOpened,
    Decided,
    JobOpened,
    Marked,
    Noted,
    PartSaved,
    Record,
    Restored,
    Stepped,
    VersionSaved,
    Where,
)
from ray_dr.model.ladder import Measured
from ray_dr.model.recovery import (
    Failed,
    FailureKind,
    Group,
    Incident,
    Node,
    Phase,
    Queued,
    Recovering,
    Running,
    Starting,
    State,
)
from ray_dr.telemetry.lineage import steps as lineage
from ray_dr.telemetry.phases import MEASURED, note
from ray_dr.telemetry.timeline import incidents, loss_curve, replay, status, verify_data

BATCH, SAMPLES, SEED = 8, 20, 5
ORDER = Order(SAMPLES, SEED)
MEANWHILE = Measured(process_start_s=3.0)
INCIDENT = Incident(1, FailureKind.NODE_LOST, "b", at=105.0, step=5)
NODES = (Node("a", ready=("a/0.1",)), Node("b", ready=("b/0.1",)))
FIRST, SECOND = Group(1, ("a/0.1", "b/0.1"), None), Group(2, ("a/0.1",), VersionId(1, 3))


def did(attempt: int, step: int, rank: int, world: int, at: float | None = None) -> Stepped:
    part = share(step - 1, global_batch=BATCH, rank=rank, world=world)
    indices = (ORDER.index(position) for position in range(part.first, part.last))
    ranges, logs = ((part.first, part.last),), {"loss": float(step)}
    record = StepRecord(attempt, step, rank, world, ranges, digest(indices), 0.5, logs)
    return Stepped(100.0 + step if at is None else at, record)


def all_did(attempt: int, steps: range, world: int, at: float) -> list[Record]:
    return [did(attempt, step, rank, world, at + step) for step in steps for rank in range(world)]


def decided(at: float, seq: int, event: Event, phase: Phase, *actions: Action, reason: str = "because") -> Decided:
    group = getattr(phase, "group", None)
    attempt = group.attempt if group else 1
    return Decided(at, 1, seq, event, State(phase, NODES, attempt=attempt), actions, reason)


def recovering(*unwinding: str, found: VersionId | None = None) -> Recovering:
    return Recovering(INCIDENT, unwinding, found, 105.0)


def journal() -> list[Record]:
    return [
        JobOpened(99.0, 1, "night", {}),
        decided(99.1, 1, Opened(99.0, 1, 0), Starting(FIRST, 99.0), FormGroup(FIRST)),
        DataOpened(99.5, 1, SAMPLES, BATCH, 1, SEED, True),
        decided(101.0, 2, FirstStep(101.0, 1, 1), Running(FIRST)),
        *all_did(1, range(1, 6), 2, 100.0),
        *(PartSaved(103.5, VersionId(1, 3), rank, 2, Where.MEMORY, "a", 10, 0.1) for rank in range(2)),
        PartSaved(104.5, VersionId(1, 4), 0, 2, Where.MEMORY, "a", 10, 0.1),
        VersionSaved(103.6, VersionId(1, 3), Where.PEER, 20),
        VersionSaved(102.6, VersionId(1, 2), Where.STORE, 20),
        decided(105.2, 3, NodeLost(105.1, "b", "silent", 5), recovering("a/0.1"), reason="node b is lost"),
        decided(105.4, 4, WorkerStopped(105.3, "a/0.1", 1, 5), recovering()),
        decided(
            105.8, 5, InventoryTaken(105.7, 1, VersionId(1, 3)), Starting(SECOND, 105.8), FormGroup(SECOND),
            reason="attempt 2 begins from step 3",
        ),
        Marked(106.0, 2, "group_formed", 0.2),
        Restored(107.0, 2, 0, VersionId(1, 3), {"memory": 10, "peer": 7}, 0.6, 0.4),
        decided(107.6, 6, FirstStep(107.5, 2, 4), Running(SECOND)),
        *all_did(2, range(4, 8), 1, 103.5),
    ]  # fmt: skip


def test_an_incident_is_told_by_its_cause_though_only_a_symptom_was_known_at_first() -> None:
    records = journal()
    at = next(i for i, record in enumerate(records) if isinstance(record, Decided) and isinstance(record.event, NodeLost))
    symptom = replace(INCIDENT, kind=FailureKind.GROUP_BROKEN, subject="a/0.1", detail="connection reset")
    raised = WorkerRaised(105.0, "a/0.1", 1, "connection reset", True, 5)
    began = decided(105.0, 2, raised, replace(recovering("a/0.1"), incident=symptom))
    (report,) = incidents([*records[:at], began, *records[at:]])
    assert report.incident == INCIDENT


def test_status_tells_where_the_job_stands() -> None:
    told = status(journal())
    assert (told.job, told.phase, told.term, told.attempt) == ("night", "running", 1, 2)
    assert (told.nodes, told.workers, told.step, told.samples, told.incidents) == (2, 2, 7, 56, 1)
    assert told.loss == 7.0
    assert told.newest == {"memory": VersionId(1, 3), "peer": VersionId(1, 3), "store": VersionId(1, 2)}
    assert told.saved == {"memory": 1, "peer": 1, "store": 1}
    assert (told.opened_at, told.updated_at) == (99.0, 110.5)


def test_status_tells_why_saves_are_as_often_as_they_are_and_whether_the_objective_is_met() -> None:
    told = status([
        *journal(),
        Noted(111.0, "cadence.changed", {"reason": "first"}), Noted(112.0, "rpo.unreachable", {"reason": "too slow"}),
        Noted(113.0, "cadence.changed", {"reason": "second"}),
    ])  # fmt: skip
    assert (told.cadence, told.unmet) == ("second", "too slow")
    over = [Noted(112.0, "rpo.unreachable", {"reason": "too slow"}), Noted(113.0, "rpo.reachable")]
    assert status([*journal(), *over]).unmet == ""
    before = [Noted(112.0, "cadence.changed", {"reason": "then"}), JobOpened(200.0, 2, "night", {})]
    assert status([*journal(), *before]).cadence == ""


def test_status_of_nothing_is_unknown() -> None:
    assert status([]).phase == "unknown"


def test_status_of_a_failed_job_says_why_and_whether_to_run_it_again() -> None:
    failed = decided(120.0, 9, NodeLost(119.0, "a", "gone", 7), Failed("ValueError: bad", resubmit=False))
    told = status([*journal(), failed])
    assert (told.phase, told.reason, told.resubmit) == ("failed", "ValueError: bad", False)


def test_an_incident_has_its_phases_in_seconds_since_it_happened() -> None:
    (report,) = incidents(journal())
    assert report.phases == pytest.approx(
        {
            "detected": 0.1, "decided": 0.2, "unwound": 0.4, "found": 0.7, "provisioned": 1.0, "fetched": 1.6,
            "loaded": 2.0, "first_step": 2.5, "caught_up": 4.5,
        }
    )  # fmt: skip
    assert next(iter(report.phases)) == "detected"
    assert (report.attempt, report.restored, report.steps_lost) == (2, VersionId(1, 3), 2)
    assert report.bytes == {"memory": 10, "peer": 7}
    assert (report.reason, report.expectation) == ("node b is lost", "attempt 2 begins from step 3")


def test_an_incident_that_is_not_over_has_the_phases_so_far() -> None:
    cut = journal()[: [type(r).__name__ for r in journal()].index("Marked") - 1]
    (report,) = incidents(cut)
    assert list(report.phases) == ["detected", "decided", "unwound"]
    assert (report.attempt, report.steps_lost) == (0, 0)


def test_the_lineage_is_what_the_newest_attempt_stands_on() -> None:
    assert [(step.number, step.attempt, step.world) for step in lineage(journal())] == [
        (1, 1, 2), (2, 1, 2), (3, 1, 2), (4, 2, 1), (5, 2, 1), (6, 2, 1), (7, 2, 1),
    ]  # fmt: skip


def test_the_lineage_goes_by_versions_and_not_by_the_highest_attempt_of_each_step() -> None:
    third = Group(3, ("a/0.1", "b/0.1"), VersionId(1, 5))
    records = [*journal(), decided(120.0, 7, InventoryTaken(119.0, 2, None), Starting(third, 120.0), FormGroup(third))]
    assert [(step.number, step.attempt) for step in lineage(records)] == [(number, 1) for number in range(1, 6)]


def test_the_loss_curve_weighs_ranks_by_their_samples() -> None:
    first = replace(did(1, 1, 0, 2).record, ranges=((0, 6),), logs={"loss": 1.0})
    second = replace(did(1, 1, 1, 2).record, ranges=((6, 8),), logs={"loss": 5.0})
    assert loss_curve([Stepped(10.0, first), Stepped(11.0, second)]) == ((1, 2.0, 11.0),)
    assert [point[0] for point in loss_curve(journal())] == list(range(1, 8))


def test_every_sample_once_is_proved() -> None:
    report = verify_data(journal())
    assert report.ok, report.differences
    assert (report.steps, report.used, report.epochs) == (7, 56, {0: 20, 1: 20, 2: 16})


def test_a_step_that_was_reported_twice_counts_once() -> None:
    assert verify_data([*journal(), did(1, 2, 0, 2)]).ok


def changed(step: int, rank: int, ranges: tuple[tuple[int, int], ...]) -> list[Record]:
    """The journal with other ranges for one report, and the digest that fits them."""
    records = journal()
    for place, record in enumerate(records):
        done = record.record if isinstance(record, Stepped) else None
        if done and (done.attempt, done.step, done.rank) == (1, step, rank):
            indices = (ORDER.index(at) for first, last in ranges for at in range(first, last))
            records[place] = Stepped(record.at, replace(done, ranges=ranges, digest=digest(indices)))
    return records


def test_a_gap_is_found() -> None:
    report = verify_data(changed(2, 1, ((12, 14),)))
    assert (report.ok, report.lost, report.repeated, report.unwitnessed) == (False, 2, 0, 0)
    assert report.differences == ("step 2: 2 of its 8 samples were used by no rank",)


def test_a_repeat_is_found() -> None:
    report = verify_data(changed(2, 1, ((11, 16),)))
    assert (report.ok, report.lost, report.repeated) == (False, 0, 1)
    assert report.differences == ("position 11: used 2 times",)


def test_samples_of_another_step_are_found() -> None:
    report = verify_data(changed(2, 1, ((12, 16), (80, 81))))
    assert not report.ok
    assert report.differences == ("step 2: 1 samples belong to another step",)


def test_padding_uses_nothing() -> None:
    assert verify_data(changed(2, 1, ((12, 16), (15, 15)))).ok


def test_other_samples_than_the_order_has_are_found() -> None:
    records = [replace(r, seed=SEED + 1) if isinstance(r, DataOpened) else r for r in journal()]
    report = verify_data(records)
    assert (report.ok, report.mismatched) == (False, 10)


@pytest.mark.parametrize(("ranks", "missing"), [({1}, 4), ({0, 1}, 8)])
def test_a_missing_report_is_no_proof_and_no_loss(ranks: set[int], missing: int) -> None:
    records = [
        r for r in journal() if not (isinstance(r, Stepped) and r.record.step == 2 and r.record.rank in ranks)
    ]  # fmt: skip
    report = verify_data(records)
    assert (report.ok, report.lost, report.unwitnessed) == (False, 0, missing)


def test_a_journal_without_data_proves_nothing() -> None:
    assert not verify_data([]).ok


def test_other_data_in_a_later_attempt_is_found() -> None:
    report = verify_data([*journal(), DataOpened(120.0, 2, SAMPLES, BATCH, 1, SEED, False)])
    assert "attempt 2: shuffle is False, was True" in report.differences


def machine(state: State, event: Event, opened: JobOpened | None, measured: Measured = MEANWHILE) -> Decision:
    assert opened is not None
    said = f"{opened.job}: {type(event).__name__}, {measured.process_start_s:g} s"
    return Decision(replace(state, step=state.step + 1), (), said)


def test_replay_finds_nothing_where_the_machine_decides_as_it_did_and_the_difference_where_not() -> None:
    records: list[Record] = []
    for term in (1, 2):
        state = State(Queued())
        records += [JobOpened(1.0, term, "night", {}), Noted(1.5, MEASURED, note(MEANWHILE))]
        for seq in range(1, 4):
            event = Opened(2.0, term, seq)
            decision = machine(state, event, next(r for r in reversed(records) if isinstance(r, JobOpened)))
            records.append(Decided(2.0, term, seq, event, decision.state, decision.actions, decision.reason))
            state = decision.state
    assert replay(records, machine, State(Queued())) == ()
    last = records[-1]
    assert isinstance(last, Decided)
    records[-1] = replace(last, reason="other")
    assert replay(records, machine, State(Queued())) == (
        "term 2, decision 3 on Opened: reason was 'other', is now 'night: Opened, 3 s'",
    )
