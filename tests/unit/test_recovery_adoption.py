from __future__ import annotations

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Adopted, InventoryTaken, NodeJoined, Opened, WorkerReady
from ray_dr.model.recovery import Group, Policy, Recovering, Starting
from ray_dr.recovery.adoption import Living, living_group, who_left
from ray_dr.recovery.machine import initial, step

V3 = VersionId(1, 3)


def living(worker: str, rank: int, done: int = 7, *, running: bool = True, attempt: int = 2) -> Living:
    return Living(worker, attempt, rank, done, running, V3, 3)


def test_the_living_members_of_the_newest_attempt_are_a_group_in_rank_order() -> None:
    found = living_group([living("c", 2), living("a", 0, 8), living("b", 1), living("old", 0, attempt=1), Living("idle")])
    assert found == (Group(2, ("a", "b", "c"), V3), 7)


def test_there_is_no_group_when_nobody_was_ever_in_one() -> None:
    assert living_group([Living("idle")]) == (None, 0)
    assert living_group([]) == (None, 0)


def test_who_has_left_is_told_only_when_nobody_is_in_it_any_more() -> None:
    out = [living("a", 0, running=False), living("c", 2, running=False), Living("idle")]
    group, done = living_group(out)
    assert group == Group(2, ("a", "rank 1 of attempt 2", "c"), V3)
    assert done == 7
    assert who_left(out, group) == ("a", "c")
    assert who_left([*out[:1], living("c", 2)], group) == ()


def test_a_broken_group_that_everybody_has_left_goes_on_with_who_lives_and_waits_for_nobody() -> None:
    policy = Policy(2, 2, 1, 1, unwind_s=15.0, start_s=300.0, settle_s=1.0, attempts_without_progress=3)
    state = initial()
    group = Group(2, ("n/a", "rank 1 of attempt 2"), V3)
    for event in (Opened(1.0, 2, 2), NodeJoined(1.0, "n", ("n/a",)), Adopted(1.0, group, 7, ("n/a",)),
                  InventoryTaken(1.1, 1, V3, 1)):  # fmt: skip
        state = step(state, event, policy).state
    assert isinstance(state.phase, Starting)
    assert state.phase.group == Group(3, ("n/a",), V3)


def test_a_group_alone_that_ended_whole_does_not_wait_for_more_nodes() -> None:
    policy = Policy(2, 2, 1, 1, unwind_s=15.0, start_s=300.0, settle_s=1.0, attempts_without_progress=3)
    state = initial()
    for event in (Opened(1.0, 2, 2), NodeJoined(1.0, "n", ("n/a",)), Adopted(1.0, Group(2, ("n/a",), V3), 7, ("n/a",))):
        state = step(state, event, policy).state
    assert isinstance(state.phase, Recovering)
    assert state.phase.unwinding == ()


def test_a_group_that_lost_a_rank_is_not_taken_for_whole() -> None:
    group, done = living_group([living("n/a", 0), living("n/c", 2)])
    assert group == Group(2, ("n/a", "rank 1 of attempt 2", "n/c"), V3)
    policy = Policy(1, 1, 1, 3, unwind_s=15.0, start_s=300.0, settle_s=1.0, attempts_without_progress=3)
    state = initial()
    for event in (Opened(1.0, 2, 2), NodeJoined(1.0, "n"), WorkerReady(1.0, "n/a", "n"), WorkerReady(1.0, "n/c", "n")):
        state = step(state, event, policy).state
    after = step(state, Adopted(2.0, group, done), policy).state
    assert isinstance(after.phase, Recovering)
    assert after.phase.unwinding == ("n/a", "n/c")
