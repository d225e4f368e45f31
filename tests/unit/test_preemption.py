"""Nodes that are to be taken away: what the machine does in each phase, what is measured for it, and how it is told."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_dr.cli.main import main
from ray_dr.model.actions import (
    Action,
    CloseJob,
    Decision,
    FormGroup,
    KillWorker,
    ReleaseNode,
    RequestNodes,
    SaveFinal,
    StartWorkers,
    StopGroup,
    TakeInventory,
)
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.departure import Rates
from ray_dr.model.events import (
    ActionFailed,
    Event,
    FirstStep,
    InventoryTaken,
    NodeJoined,
    NodeLeaving,
    NodeLost,
    Opened,
    Saved,
    StopRequested,
    Tick,
    WorkerLost,
    WorkerRaised,
    WorkerReady,
    WorkerStopped,
)
from ray_dr.model.journal import Decided, PartSaved, Record, Stepped, VersionSaved, Where
from ray_dr.model.recovery import (
    Draining,
    FailureKind,
    Finished,
    Group,
    Policy,
    Queued,
    Recovering,
    Resizing,
    Running,
    State,
    Suspended,
)
from ray_dr.recovery.invariants import check
from ray_dr.recovery.machine import initial, step
from ray_dr.recovery.rates import Measured, p95
from ray_dr.stores.disk import FileStore
from ray_dr.telemetry.preemptions import in_words, preemptions
from ray_dr.telemetry.timeline import status
from tests.unit.stored_life import NAME, begun, write_journal

POLICY = Policy(1, 2, 1, 1, unwind_s=15.0, start_s=300.0, settle_s=1.0, attempts_without_progress=0)
BOTH = replace(POLICY, nodes_min=2, min_nodes_to_run=2)
A, B = "a/0.1", "b/0.1"
UP: tuple[Event, ...] = (
    Opened(100.0, 1, 0), NodeJoined(101.0, "a"), NodeJoined(101.0, "b"), WorkerReady(105.0, A, "a"), WorkerReady(105.0, B, "b"),
    InventoryTaken(106.0, 0, None), FirstStep(108.0, 1, 1),
)  # fmt: skip


def decide(*events: Event, state: State | None = None, policy: Policy = POLICY) -> Decision:
    """The last decision; invariants hold on the way."""
    state = initial() if state is None else state
    for event in events:
        decision = step(state, event, policy)
        check(state, event, decision, policy)
        state = decision.state
    return decision


def running(policy: Policy = POLICY) -> State:
    state = decide(*UP, policy=policy).state
    assert isinstance(state.phase, Running)
    return state


def leaving(node: str, left_s: float, at: float = 120.0, **rates: float | bool) -> NodeLeaving:
    return NodeLeaving(at, node, at + left_s, "ray drain", Rates(**rates))  # type: ignore[arg-type]


def kinds(actions: Sequence[Action]) -> list[type]:
    return [type(action) for action in actions]


# ------------------------------------------------------------------------------------------------------------- choices


def test_a_node_in_time_makes_the_group_stop_and_another_one_asked_for() -> None:
    decision = decide(leaving("b", 30.0), state=running())
    assert isinstance(decision.state.phase, Resizing)
    assert decision.actions == (RequestNodes(2), StopGroup(1, everywhere=False))
    assert "b leaves in 30 s (ray drain)" in decision.reason
    assert "expected to take 7.5 s, 30.0 s are left" in decision.reason


def test_measured_rates_decide_what_fits() -> None:
    quick, slow = leaving("b", 5.0, step_s=0.1, copied_s=0.5), leaving("b", 30.0, step_s=20.0)
    assert isinstance(decide(quick, state=running()).state.phase, Resizing)
    assert isinstance(decide(slow, state=running()).state.phase, Running)


def test_without_copies_the_next_group_must_have_read_in_time() -> None:
    assert isinstance(decide(leaving("b", 20.0), state=running()).state.phase, Resizing)
    assert isinstance(decide(leaving("b", 20.0, copies=False), state=running()).state.phase, Running)


def test_a_save_is_a_delta_where_something_was_committed() -> None:
    delta = decide(leaving("b", 40.0, committed=True), state=running(BOTH), policy=BOTH)
    full = decide(leaving("b", 40.0), state=running(BOTH), policy=BOTH)
    assert delta.actions == (RequestNodes(2), StopGroup(1, everywhere=True))
    assert "saves what has changed to every store" in delta.reason
    assert isinstance(full.state.phase, Running)
    assert "too soon for a save" in full.reason


def test_a_node_that_is_not_of_the_job_and_a_repeated_notice_change_nothing() -> None:
    state = running()
    assert decide(leaving("x", 30.0), state=state).state is state
    after = decide(leaving("b", 30.0), state=state).state
    assert decide(leaving("b", 29.5, at=120.4), state=after).state is after
    sooner = decide(leaving("b", 10.0, at=121.0), state=after).state
    assert [departure.deadline for departure in sooner.departures] == [131.0]


def test_a_node_that_leaves_at_a_time_nobody_told_is_left() -> None:
    decision = decide(leaving("b", math.inf), state=running())
    assert isinstance(decision.state.phase, Resizing)
    assert "at a time nobody told" in decision.reason


# -------------------------------------------------------------------------------------------------------------- phases


def test_a_queued_job_waits_for_nodes_that_stay() -> None:
    state = decide(*UP[:4], policy=BOTH).state
    state = decide(leaving("b", 30.0, at=104.0), UP[4], Tick(500.0), state=state, policy=BOTH).state
    assert state.phase == Queued()
    state = decide(NodeJoined(501.0, "c"), WorkerReady(505.0, "c/0.1", "c"), state=state, policy=BOTH).state
    assert state.phase == Queued(asked=True)
    group = decide(InventoryTaken(506.0, 0, None), state=state, policy=BOTH).actions[0]
    assert group == FormGroup(Group(1, (A, "c/0.1"), None))


def test_a_group_that_starts_is_left_to_start_and_then_moves() -> None:
    state = decide(*UP[:-1]).state
    begun = decide(leaving("b", 60.0, at=107.0), state=state)
    assert begun.actions == (RequestNodes(2),)
    assert isinstance(decide(UP[-1], state=begun.state).state.phase, Resizing)


def test_no_process_is_started_on_a_node_that_leaves() -> None:
    state = decide(leaving("b", 2.0), state=running()).state
    lost = decide(WorkerLost(121.0, B, "b", "signal 9", 5), state=state)
    assert isinstance(lost.state.phase, Recovering)
    assert StartWorkers not in kinds(lost.actions)
    assert lost.state.failures == 0, "what ends with a node that leaves is charged to nobody"


@pytest.mark.parametrize(
    "end",
    [NodeLost(121.0, "b", "connection closed", 0), WorkerLost(121.0, B, "b", "signal 9", 0),
     WorkerRaised(121.0, A, 1, "RuntimeError: reset", True, 0)],
    ids=["node", "worker", "echo"],
)  # fmt: skip
def test_a_preemption_without_a_step_before_it_is_charged_to_no_budget(end: Event) -> None:
    starting = decide(*UP[:-1]).state
    assert CloseJob("failed") in decide(end, state=starting).actions, "not one failure without progress is allowed"
    announced = decide(leaving("b", 1.0), end, state=starting)
    assert isinstance(announced.state.phase, Recovering)
    assert announced.state.failures == 0


def test_an_error_of_the_program_is_charged_also_while_a_node_leaves() -> None:
    starting = decide(*UP[:-1]).state
    decision = decide(leaving("b", 1.0), WorkerRaised(121.0, A, 1, "ValueError: bad", False, 0), state=starting)
    assert CloseJob("failed") in decision.actions


def test_a_job_that_suspends_saves_first_when_its_nodes_leave() -> None:
    events = NodeLost(110.0, "b", "gone", 5), WorkerStopped(110.5, A, 1, 5), InventoryTaken(111.0, 1, VersionId(1, 5))
    state = decide(*UP, *events, policy=BOTH).state
    assert isinstance(state.phase, Suspended)
    looking = decide(leaving("a", 60.0), state=state, policy=BOTH)
    assert looking.state.phase == Draining(None, (), 180.0, suspends=True)
    assert kinds(looking.actions) == [TakeInventory]
    found = InventoryTaken(121.0, looking.state.incidents, VersionId(1, 5), looking.state.asks)
    saving = decide(found, state=looking.state, policy=BOTH)
    assert saving.actions == (SaveFinal(1, 5),)
    saved = decide(Saved(125.0, 1, 5), state=saving.state, policy=BOTH)
    assert isinstance(saved.state.phase, Suspended)
    assert saved.actions == (ReleaseNode("a"),)


def test_a_group_that_breaks_while_it_saves_is_recovered_from_and_saved_after_that() -> None:
    state = decide(leaving("b", 90.0), state=running(BOTH), policy=BOTH).state
    broken = decide(WorkerRaised(121.0, A, 1, "RuntimeError: reset", True, 9), state=state, policy=BOTH)
    assert isinstance(broken.state.phase, Recovering)
    assert broken.state.phase.unwinding == (B,)
    assert broken.state.failures == 0
    out = decide(WorkerStopped(121.5, B, 1, 9), state=broken.state, policy=BOTH).state
    kept = decide(InventoryTaken(122.0, 1, VersionId(1, 8)), state=out, policy=BOTH)
    assert kept.actions == (SaveFinal(1, 8),)
    assert isinstance(decide(Saved(125.0, 1, 8), state=kept.state, policy=BOTH).state.phase, Suspended)


def test_a_save_that_does_not_get_done_ends_in_waiting_and_gives_nothing_back() -> None:
    state = decide(leaving("b", 90.0), WorkerStopped(121.0, A, 1, 9), WorkerStopped(121.0, B, 1, 9), state=running(BOTH),
                   policy=BOTH).state  # fmt: skip
    assert isinstance(state.phase, Draining)
    late = decide(Tick(210.5), state=state, policy=BOTH)
    assert isinstance(late.state.phase, Suspended)
    assert ReleaseNode not in kinds(late.actions), "its memory may be all there is"
    failed = decide(ActionFailed(130.0, "SaveFinal", "no space", "1"), state=state, policy=BOTH)
    assert isinstance(failed.state.phase, Recovering)


def test_members_that_do_not_stop_by_the_deadline_are_not_in_two_groups() -> None:
    state = decide(leaving("b", 90.0), WorkerStopped(121.0, B, 1, 9), state=running(BOTH), policy=BOTH).state
    late = decide(Tick(210.5), state=state, policy=BOTH)
    assert isinstance(late.state.phase, Recovering)
    assert late.state.phase.unwinding == (A,)
    stuck = decide(InventoryTaken(211.0, 1, VersionId(1, 1)), Tick(240.0), state=late.state, policy=BOTH)
    assert KillWorker(A) in stuck.actions
    assert isinstance(stuck.state.phase, Suspended)


def test_a_request_to_stop_makes_it_the_end() -> None:
    state = decide(leaving("b", 90.0), StopRequested(121.0, 60.0, "Ctrl-C"), state=running(BOTH), policy=BOTH).state
    assert state.phase == Draining(Group(1, (A, B), None), (), 181.0)
    events = WorkerStopped(122.0, A, 1, 9), WorkerStopped(122.0, B, 1, 9), Saved(123.0, 1, 9)
    decision = decide(*events, state=state, policy=BOTH)
    assert decision.state.phase == Finished(drained=True)
    assert decision.actions == (CloseJob("drained"),)


def test_a_node_that_outlives_its_deadline_does_not_keep_the_job_from_growing() -> None:
    state = decide(leaving("b", 2.0), NodeJoined(130.0, "c"), WorkerReady(135.0, "c/0.1", "c"), state=running()).state
    assert isinstance(state.phase, Resizing)
    stops = WorkerStopped(136.0, A, 1, 9), WorkerStopped(136.0, B, 1, 9)
    group = decide(*stops, state=state).actions[-1]
    assert group == FormGroup(Group(2, (A, "c/0.1"), VersionId(1, 9)))


def test_what_is_announced_to_leave_does_not_count_as_a_node_the_job_has() -> None:
    state = decide(leaving("b", 2.0), NodeJoined(130.0, "c"), state=running()).state
    assert [node.id for node in state.nodes] == ["a", "b", "c"]
    assert decide(NodeJoined(131.0, "d"), state=state).actions == (ReleaseNode("d"),)


# --------------------------------------------------------------------------------------------------------------- rates


def saved(version: int, rank: int, where: Where, took_s: float, *, sent: int = 100, stall_s: float = 0.0) -> PartSaved:
    return PartSaved(0.0, VersionId(1, version), rank, 2, where, "n", 100, took_s, stall_s, sent)


def test_nothing_measured_is_as_stated() -> None:
    assert Measured().rates(copies=True) == Rates()


def test_a_version_takes_as_long_as_its_slowest_part() -> None:
    measured = Measured()
    for record in (
        saved(1, 0, Where.MEMORY, 0.2, stall_s=0.1), saved(1, 1, Where.MEMORY, 0.1), saved(1, 0, Where.PEER, 0.5),
        saved(1, 1, Where.PEER, 1.5), saved(1, 0, Where.STORE, 9.0), saved(2, 0, Where.STORE, 3.0, sent=40),
        VersionSaved(0.0, VersionId(1, 1), Where.STORE, 200),
    ):  # fmt: skip
        measured.add(record)
    rates = measured.rates(copies=True)
    assert (rates.staged_s, rates.copied_s, rates.full_s, rates.delta_s) == (pytest.approx(0.3), 1.5, 9.0, 3.0)
    assert rates.committed


def test_a_delta_is_never_expected_to_take_longer_than_all_of_it() -> None:
    measured = Measured()
    measured.add(saved(1, 0, Where.STORE, 2.0))
    assert measured.rates(copies=True).delta_s == 2.0
    other = Measured()
    other.add(saved(1, 0, Where.STORE, 200.0, sent=1))
    assert other.rates(copies=True).full_s == 200.0


def test_steps_and_starts_are_measured_by_their_95th_percentile() -> None:
    measured = Measured()
    for number in range(1, 21):
        measured.add(Stepped(0.0, StepRecord(1, number, 0, 1, (), "", float(number))))
    formed = decide(*UP[:-1])
    measured.add(Decided(106.0, 1, 1, UP[-2], formed.state, formed.actions, "formed"))
    measured.add(Decided(109.5, 1, 2, UP[-1], running(), (), "first step"))
    assert measured.rates(copies=True).step_s == 19.0
    assert measured.rates(copies=True).resume_s == 3.5
    assert p95([3.0, 1.0]) == 3.0


# ---------------------------------------------------------------------------------------------------------------- told


def told(*events: Event, policy: Policy = POLICY) -> list[Record]:
    """The journal of such a life."""
    records: list[Record] = []
    state = initial()
    for seq, event in enumerate((*UP, *events), 1):
        decision = step(state, event, policy)
        state = decision.state
        records.append(Decided(event.at, 1, seq, event, state, decision.actions, decision.reason))
    return records


def test_a_preemption_is_told_with_what_was_chosen_and_what_became_of_the_node() -> None:
    notice = leaving("b", 30.0)
    still = told(notice)
    (one,) = preemptions(still)
    assert in_words(one).endswith("30.0 s are left); it is there still")
    assert status(still).leaving == (f"node b is {in_words(one)}",)
    moved = told(notice, WorkerStopped(121.0, A, 1, 9), WorkerStopped(121.0, B, 1, 9), FirstStep(122.0, 2, 10))
    (one,) = preemptions(moved)
    assert (one.gone_at, one.lost) == (122.0, False)
    assert status(moved).leaving == ()
    (one,) = preemptions(told(leaving("b", 1.0), NodeLost(121.0, "b", "connection closed", 9)))
    assert (one.gone_at, one.lost) == (121.0, True)
    assert "too soon for a move" in in_words(one)


def test_the_loss_of_an_announced_node_is_an_incident_of_its_own_kind() -> None:
    state = told(leaving("b", 1.0), NodeLost(121.0, "b", "connection closed", 9))[-1].state  # type: ignore[union-attr]
    assert state.phase.incident.kind is FailureKind.PREEMPTED
    assert state.failures == 0


def test_status_timeline_and_why_tell_of_it(tmp_path: Path) -> None:
    life = begun()
    life.do(1, range(2, 6), 2, since=99.9)
    life.meet(NodeLeaving(105.0, "b", 135.0, "ray drain"))
    life.meet(WorkerStopped(105.8, A, 1, 6), WorkerStopped(105.8, B, 1, 6), FirstStep(107.0, 2, 7))
    life.meet(NodeJoined(108.0, "c"), NodeLeaving(109.0, "c", math.inf, "azure preempt"))
    life.meet(NodeLeaving(110.0, "a", 111.0, "aws spot"))
    write_journal(FileStore(tmp_path), life.records)
    where = ("--store", f"file://{tmp_path}")
    why = CliRunner().invoke(main, ["why", NAME, *where]).stdout
    assert "3 preemptions:" in why
    assert "to be taken away in 30.0 s (ray drain): attempt 1 stops at its next common step" in why
    assert "given back 2.0 s after the notice" in why
    shown = CliRunner().invoke(main, ["timeline", NAME, *where]).stdout
    assert "no incidents" in shown
    assert [line.split()[1] for line in shown.splitlines() if "leaves" in line] == ["preemption"] * 3
    now = CliRunner().invoke(main, ["status", NAME, *where]).stdout
    assert "leaving" in now
    assert "node a is to be taken away in 1.0 s (aws spot)" in now
    told_json = json.loads(CliRunner().invoke(main, ["why", NAME, *where, "--json"]).stdout)
    assert [one["node"] for one in told_json["preemptions"]] == ["b", "c", "a"]
    assert told_json["preemptions"][1]["deadline"] is None


def test_why_names_the_notice_as_the_cause_and_charges_nobody(tmp_path: Path) -> None:
    life = begun()
    life.do(1, range(2, 6), 2, since=99.9)
    life.meet(NodeLeaving(105.0, "b", 106.0, "aws spot terminate"), WorkerRaised(106.0, A, 1, "RuntimeError: reset", True, 5))
    life.meet(NodeLost(106.2, "b", "connection closed", 5), InventoryTaken(106.4, 1, VersionId(1, 3)), FirstStep(107.0, 2, 4))
    write_journal(FileStore(tmp_path), life.records)
    where = ("--store", f"file://{tmp_path}")
    why = CliRunner().invoke(main, ["why", NAME, *where]).stdout
    assert "node b was taken away, as had been announced" in why
    (incident,) = json.loads(CliRunner().invoke(main, ["why", NAME, *where, "--json"]).stdout)["incidents"]
    assert (incident["kind"], incident["charged"]) == ("preemption", False)
    assert {aside["kind"] for aside in incident["set_aside"]} == {"collective_broken", "node_gone"}
    assert incident["over"]
