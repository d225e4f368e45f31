from __future__ import annotations

from dataclasses import replace

import pytest

from ray_dr.model.actions import (
    AbortGroup,
    CloseJob,
    FormGroup,
    KillWorker,
    ReleaseNode,
    RequestNodes,
    SaveFinal,
    StartWorkers,
    StopGroup,
    TakeInventory,
)
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import (
    ActionFailed,
    Adopted,
    Event,
    FirstStep,
    InventoryTaken,
    NodeJoined,
    NodeLost,
    Opened,
    StopRequested,
    Tick,
    WorkerLost,
    WorkerRaised,
    WorkerReady,
    WorkerReturned,
    WorkerStopped,
)
from ray_dr.model.recovery import (
    Failed,
    FailureKind,
    Finished,
    Finishing,
    Group,
    Policy,
    Queued,
    Recovering,
    Resizing,
    Running,
    Starting,
    State,
)
from ray_dr.recovery.machine import initial, step

POLICY = Policy(1, 2, 1, 1, unwind_s=15.0, start_s=300.0, settle_s=1.0, attempts_without_progress=3)
A, B = "a/0.1", "b/0.1"


def after(*events: Event, state: State | None = None, policy: Policy = POLICY) -> State:
    state = initial() if state is None else state
    for event in events:
        state = step(state, event, policy).state
    return state


@pytest.fixture
def running() -> State:
    state = after(Opened(100, 1, 0), NodeJoined(101, "a"), NodeJoined(101, "b"))
    state = after(WorkerReady(105, A, "a"), WorkerReady(105, B, "b"), InventoryTaken(106, 0, None, 1), state=state)
    return after(FirstStep(108, 1, 1), state=state)


def test_continues_the_count_of_attempts_from_the_highest_known() -> None:
    state = after(Opened(100, 2, 7), NodeJoined(101, "a", (A,)), NodeJoined(101, "b", (B,)))
    decision = step(state, InventoryTaken(102, 0, VersionId(7, 30), 1), POLICY)
    assert decision.actions == (FormGroup(Group(8, (A, B), VersionId(7, 30))),)


def test_waits_for_the_nodes_to_settle_before_the_first_group() -> None:
    state = after(Opened(100, 1, 0), NodeJoined(101, "a"), WorkerReady(105, A, "a"))
    assert step(state, Tick(105.9), POLICY).state is state
    assert step(state, Tick(106), POLICY).actions == (TakeInventory(0, 1),)


def test_gives_back_a_node_beyond_the_maximum(running: State) -> None:
    decision = step(running, NodeJoined(120, "c"), POLICY)
    assert decision.state is running
    assert decision.actions == (ReleaseNode("c"),)


def test_asks_for_nodes_once_per_shortage(running: State) -> None:
    first = step(running, NodeLost(120, "b", "silent", 9), POLICY)
    assert RequestNodes(2) in first.actions
    second = step(first.state, NodeLost(121, "a", "silent", 9), POLICY)
    assert RequestNodes(2) not in second.actions


def test_survivors_keep_their_ranks_and_newcomers_take_those_of_the_dead_on_their_own_node_first(running: State) -> None:
    three = replace(POLICY, nodes_max=3)
    state = after(NodeLost(120, "a", "silent", 9), NodeJoined(121, "c", ("c/0.1",)), state=running, policy=three)
    state = after(NodeJoined(121, "a", ("a/0.2",)), WorkerStopped(122, B, 1, 9), state=state, policy=three)
    decision = step(state, InventoryTaken(122, 1, VersionId(1, 9), 2), three)
    assert decision.actions == (FormGroup(Group(2, ("a/0.2", B, "c/0.1"), VersionId(1, 9))),)


def test_does_not_form_a_group_before_every_survivor_has_left(running: State) -> None:
    state = after(NodeLost(120, "b", "silent", 9), InventoryTaken(121, 1, VersionId(1, 9), 2), state=running)
    assert isinstance(state.phase, Recovering)
    assert isinstance(after(WorkerStopped(122, A, 1, 9), state=state).phase, Starting)


def test_an_inventory_from_before_a_further_loss_does_not_count(running: State) -> None:
    three = replace(POLICY, nodes_max=3)
    state = after(NodeJoined(110, "c"), NodeLost(120, "b", "silent", 9), state=running, policy=three)
    state = after(NodeLost(121, "c", "silent", 9), state=state, policy=three)
    assert step(state, InventoryTaken(122, 1, VersionId(1, 9), 2), three).state is state


def test_a_loss_replaces_a_collateral_failure_as_the_cause(running: State) -> None:
    state = after(WorkerRaised(120, A, 1, "reset", True, 9), NodeLost(120.1, "b", "raylet died", 9), state=running)
    assert isinstance(state.phase, Recovering)
    incident = state.phase.incident
    assert (incident.number, incident.kind, incident.subject) == (1, FailureKind.NODE_LOST, "b")


def test_the_programs_error_replaces_a_collateral_failure_as_the_cause(running: State) -> None:
    state = after(WorkerRaised(120, A, 1, "reset", True, 9), state=running)
    state = after(WorkerRaised(120.1, B, 1, "ValueError", False, 9), state=state)
    assert isinstance(state.phase, Recovering)
    assert state.phase.incident.kind is FailureKind.USER_ERROR
    assert state.last_error == ("ValueError", 9)


def test_the_same_error_of_every_rank_in_one_attempt_counts_once(running: State) -> None:
    state = after(WorkerRaised(120, A, 1, "ValueError", False, 9), state=running)
    state = after(WorkerRaised(120, B, 1, "ValueError", False, 9), state=state)
    assert isinstance(state.phase, Recovering)


def test_kills_who_does_not_leave_in_time_and_goes_on_without(running: State) -> None:
    state = after(WorkerRaised(120, A, 1, "reset", True, 9), InventoryTaken(121, 1, None, 2), state=running)
    decision = step(state, Tick(135), POLICY)
    assert decision.actions[0] == KillWorker(B)
    assert FormGroup(Group(2, (A,), None)) in decision.actions


def test_grows_at_a_step_boundary_from_exactly_there(running: State) -> None:
    state = after(NodeLost(120, "b", "silent", 9), WorkerStopped(120, A, 1, 9), state=running)
    state = after(InventoryTaken(121, 1, VersionId(1, 9), 2), FirstStep(122, 2, 10), NodeJoined(130, "c"), state=state)
    grown = step(state, WorkerReady(135, "c/0.1", "c"), POLICY)
    assert grown.actions == (StopGroup(2, everywhere=False),)
    decision = step(grown.state, WorkerStopped(136, A, 2, 31), POLICY)
    assert decision.actions == (FormGroup(Group(3, (A, "c/0.1"), VersionId(2, 31))),)


def test_members_that_stop_at_different_steps_are_a_broken_group(running: State) -> None:
    state = after(WorkerStopped(136, A, 1, 31), state=running)
    assert isinstance(state.phase, Resizing)
    assert isinstance(after(WorkerStopped(136, B, 1, 32), state=state).phase, Recovering)


def test_a_failed_last_save_goes_on_from_the_newest_version(running: State) -> None:
    state = after(WorkerReturned(200, A, 1, 100), WorkerReturned(200, B, 1, 100), state=running)
    assert isinstance(state.phase, Finishing)
    decision = step(state, ActionFailed(201, "SaveFinal", "no space"), POLICY)
    assert decision.actions == (TakeInventory(1, 2),)


def test_stopping_a_broken_job_saves_what_is_found(running: State) -> None:
    state = after(NodeLost(120, "b", "silent", 9), StopRequested(121, 30, "Ctrl-C"), state=running)
    decision = step(state, InventoryTaken(122, 1, VersionId(1, 8), 2), POLICY)
    assert decision.actions == (SaveFinal(1, 8),)


def test_stopping_ends_at_the_deadline_saved_or_not(running: State) -> None:
    decision = step(after(StopRequested(120, 30, "Ctrl-C"), state=running), Tick(150), POLICY)
    assert decision.actions == (CloseJob("drained"),)
    assert decision.state.phase == Finished(drained=True)
    assert "deadline" in decision.reason


def test_stopping_a_queued_job_ends_it_at_once() -> None:
    assert step(after(Opened(100, 1, 0)), StopRequested(101, 30, "Ctrl-C"), POLICY).actions == (CloseJob("drained"),)


def test_a_crash_at_the_same_step_again_and_again_ends_the_job(running: State) -> None:
    state = running
    for attempt in range(1, 9):
        at = 100 * attempt  # it waits longer and longer before the next
        state = after(WorkerRaised(at, A, attempt, "reset", True, 9), WorkerStopped(at, B, attempt, 9), state=state)
        if isinstance(state.phase, Failed):
            break
        state = after(InventoryTaken(at + 90, attempt, VersionId(1, 8)), FirstStep(at + 91, attempt + 1, 9), state=state)
    assert isinstance(state.phase, Failed)
    assert state.phase.resubmit
    assert attempt == POLICY.attempts_without_progress + 2


def test_failing_with_progress_in_between_never_ends_the_job(running: State) -> None:
    state = running
    for attempt in range(1, 20):
        done = 10 * attempt
        state = after(WorkerRaised(200, A, attempt, "reset", True, done), state=state)
        state = after(WorkerStopped(200, B, attempt, done), InventoryTaken(201, attempt, None), state=state)
        state = after(FirstStep(202, attempt + 1, done + 1), state=state)
    assert isinstance(state.phase, Running)


def test_a_group_of_an_attempt_that_another_was_to_follow_is_taken_over_as_broken() -> None:
    state = after(Opened(100, 2, 4), NodeJoined(101, "a", (A,)))
    decision = step(state, Adopted(102, Group(3, (A,), None), 20), POLICY)
    assert AbortGroup(3, (A,)) in decision.actions
    state = after(WorkerStopped(103, A, 3, 20), InventoryTaken(103, 1, None, 1), state=decision.state)
    assert isinstance(state.phase, Starting)
    assert state.phase.group.attempt == 5


def test_a_second_word_about_a_lost_worker_changes_nothing(running: State) -> None:
    state = after(WorkerLost(120, B, "b", "signal 9", 9), state=running)
    assert step(state, WorkerLost(120.1, B, "b", "actor died", 9), POLICY).state is state


def test_one_worker_too_many_ends_again() -> None:
    state = after(Opened(100, 1, 0), NodeJoined(101, "a"), WorkerReady(102, A, "a"))
    assert isinstance(state.phase, Queued)
    assert KillWorker("a/0.2") in step(state, WorkerReady(103, "a/0.2", "a"), POLICY).actions


def test_a_late_failure_to_form_an_older_group_breaks_no_newer_one(running: State) -> None:
    state = after(WorkerRaised(120, A, 1, "reset", True, 9), WorkerStopped(121, B, 1, 9), state=running)
    state = after(InventoryTaken(122, 1, VersionId(1, 8), state.asks), state=state)
    assert isinstance(state.phase, Starting)
    assert step(state, ActionFailed(123, "FormGroup", "a member is gone", "1"), POLICY).state is state
    broken = step(state, ActionFailed(123, "FormGroup", "a member is gone", "2"), POLICY).state
    assert isinstance(broken.phase, Recovering)


def test_the_number_of_an_attempt_that_only_a_version_tells_of_is_not_given_again() -> None:
    state = after(Opened(100, 2, 5), NodeJoined(101, "a", (A,)), NodeJoined(101, "b", (B,)))
    state = after(InventoryTaken(102, 0, VersionId(6, 40), state.asks), state=state)
    assert isinstance(state.phase, Starting)
    assert state.phase.group.attempt == 7


def test_a_job_that_has_begun_before_goes_on_with_the_fewest_nodes_once_the_others_had_time_to_come() -> None:
    policy = replace(POLICY, nodes_min=2)
    begun = after(Opened(100, 2, 4), NodeJoined(101, "a", (A,)), policy=policy)
    assert step(begun, Tick(400.9), policy).state is begun
    assert TakeInventory(0, 1) in step(begun, Tick(401), policy).actions
    new = after(Opened(100, 1, 0), NodeJoined(101, "a", (A,)), policy=policy)
    assert step(new, Tick(10_000), policy).state is new


def test_a_worker_that_comes_up_has_starts_tried_again_that_were_given_up() -> None:
    policy = replace(POLICY, nodes_max=1, workers_per_node=2)
    state = after(Opened(100, 1, 0), NodeJoined(101, "a"), policy=policy)
    for failed in range(3):
        state = after(WorkerLost(102, f"a/0.{failed}", "a", "exit code 1", 0), state=state, policy=policy)
    assert state.nodes[0].starting == 1
    decision = step(state, WorkerReady(110, "a/0.9", "a"), policy)
    assert decision.actions == (StartWorkers("a", 1),)
