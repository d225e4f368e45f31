"""Who writes which part of what survivors of a broken attempt still have."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.actions import Rescue, TakeInventory
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import InventoryTaken, NodeLost, Rescued, Tick, WorkerLost, WorkerRaised, WorkerStopped
from ray_dr.model.recovery import Policy, Recovering, Standing, Starting, State
from ray_dr.recovery.diagram import until_running
from ray_dr.recovery.machine import step
from ray_dr.recovery.rescue import assign

POLICY = Policy(4, 4, 1, 1, unwind_s=2.0, start_s=4.0, settle_s=1.0, attempts_without_progress=3, rescue_s=1.5)


FOUND = VersionId(1, 10)


def broken(found: VersionId | None = FOUND, **standing: int) -> tuple[State, float, tuple[str, ...]]:
    """Rank 0 of a running group of four is lost at step 40; the others left, standing as told by rank (`r1=40`)."""
    state, at = until_running(POLICY)
    members = state.order
    state = step(state, WorkerLost(at, members[0], members[0].split("/")[0], "signal 9", 40), POLICY).state
    state = step(state, InventoryTaken(at, 1, found, state.asks), POLICY).state
    for rank in (1, 2, 3):
        state = step(state, WorkerStopped(at, members[rank], 1, 40, standing.get(f"r{rank}", -1)), POLICY).state
    return state, at, members


def test_a_lost_ranks_part_is_written_by_a_survivor_of_the_foremost_step_and_the_own_by_each() -> None:
    state, at, _ = broken(r1=40, r2=40, r3=40)
    assert isinstance(state.phase, Recovering)
    assert state.phase.rescue_until == at + POLICY.rescue_s
    done = step(state, Rescued(at, 1, 40), POLICY)
    assert [type(action) for action in done.actions] == [TakeInventory]
    formed = step(done.state, InventoryTaken(at, 1, VersionId(1, 40), done.state.asks), POLICY).state
    assert isinstance(formed.phase, Starting)
    assert formed.phase.group.restore == VersionId(1, 40)


def test_those_behind_have_their_parts_written_by_the_foremost() -> None:
    state, at = until_running(POLICY)
    members = state.order
    state = step(state, WorkerLost(at, members[0], members[0].split("/")[0], "signal 9", 39), POLICY).state
    state = step(state, InventoryTaken(at, 1, VersionId(1, 10), state.asks), POLICY).state
    for rank, stands_at in ((1, 39), (2, 40)):
        state = step(state, WorkerStopped(at, members[rank], 1, stands_at, stands_at), POLICY).state
    decision = step(state, WorkerRaised(at, members[3], 1, "closed", True, 39), POLICY)
    assert decision.actions == (Rescue(1, 40, (members[2],) * 4),)


def test_without_a_whole_state_the_job_goes_on_from_what_is_stored_and_says_why() -> None:
    state, at = until_running(POLICY)
    first, *others = state.order
    state = step(state, WorkerLost(at, first, first.split("/")[0], "signal 9", 40), POLICY).state
    state = step(state, InventoryTaken(at, 1, VersionId(1, 10), state.asks), POLICY).state
    for worker in others[:-1]:
        state = step(state, WorkerStopped(at, worker, 1, 40), POLICY).state
    decision = step(state, WorkerStopped(at, others[-1], 1, 40), POLICY)
    assert isinstance(decision.state.phase, Starting)
    assert "no survivor's state stands whole" in decision.reason


def test_full_sharding_names_the_rank_whose_part_is_lost() -> None:
    state, at = until_running(POLICY)
    first, *others = state.order
    state = step(state, WorkerLost(at, first, first.split("/")[0], "signal 9", 40), POLICY).state
    state = step(state, InventoryTaken(at, 1, VersionId(1, 10), state.asks), POLICY).state
    for rank, worker in enumerate(others, start=1):
        decision = step(state, WorkerStopped(at, worker, 1, 40, 40, (rank,)), POLICY)
        state = decision.state
    assert isinstance(state.phase, Starting)
    assert "nobody who stands at step 40 has rank 0's part" in decision.reason


def test_what_was_saved_at_the_same_step_needs_no_rescue() -> None:
    state, _, _ = broken(VersionId(1, 40), r1=40, r2=40, r3=40)
    assert isinstance(state.phase, Starting)


def test_an_error_of_the_program_costs_no_step_either() -> None:
    state, at = until_running(POLICY)
    members = state.order
    state = step(state, WorkerRaised(at, members[2], 1, "ValueError: bad", False, 40, stands_at=40), POLICY).state
    state = step(state, InventoryTaken(at, 1, None, state.asks), POLICY).state
    actions: list[object] = []
    for rank in (0, 1, 3):
        decision = step(state, WorkerStopped(at, members[rank], 1, 40, 40), POLICY)
        state, actions = decision.state, [*actions, *decision.actions]
    assert actions == [Rescue(1, 40, members)]


def test_a_rescue_that_fails_or_takes_too_long_goes_on_from_what_was_found_before() -> None:
    for answer in (lambda at: Rescued(at, 1, 40, "no memory"), lambda at: Tick(at + POLICY.rescue_s)):
        state, at, _ = broken(r1=40, r2=40, r3=40)
        state = step(state, answer(at), POLICY).state
        assert isinstance(state.phase, Starting)
        assert state.phase.group.restore == VersionId(1, 10)


def test_a_node_lost_while_survivors_stage_is_looked_around_for_again_and_ends_the_rescue() -> None:
    state, at, members = broken(r1=40, r2=40, r3=40)
    state = step(state, NodeLost(at, members[2].split("/")[0], "gone", 40), POLICY).state
    state = step(state, InventoryTaken(at, 1, VersionId(1, 10), state.asks), POLICY).state
    assert isinstance(state.phase, Starting), "without one of those that stage there is nothing to wait for"
    assert step(state, Rescued(at, 1, 40, "a survivor is gone"), POLICY).state is state


@st.composite
def survivors(draw: st.DrawFn) -> tuple[int, list[Standing]]:
    """A world, and who of it stands, each with some twins (itself among them) or all."""
    world = draw(st.integers(1, 12))
    left = draw(st.lists(st.integers(0, world - 1), unique=True, max_size=world))
    found = []
    for rank in left:
        twins = draw(st.one_of(st.just(set[int]()), st.sets(st.integers(0, world - 1))))
        found.append(Standing(f"w{rank}", 7, tuple(sorted(twins | {rank})) if twins else ()))
    return world, found


@settings(deadline=None, derandomize=True)
@given(survivors())
def test_every_rank_has_a_writer_that_has_its_bytes_or_one_is_named_that_nobody_has(drawn: tuple[int, list[Standing]]) -> None:
    world, standing = drawn
    order = [f"w{rank}" for rank in range(world)]
    known = {each.worker: each for each in standing}
    found = assign(order, standing)
    if isinstance(found, int):
        assert order[found] not in known
        assert all(each.twins and found not in each.twins for each in standing)
        return
    assert len(found) == world
    for rank, writer in enumerate(found):
        assert writer == order[rank] if order[rank] in known else not known[writer].twins or rank in known[writer].twins


def test_parts_of_the_lost_are_dealt_out_evenly() -> None:
    order = [f"w{rank}" for rank in range(64)]
    writers = assign(order, [Standing(worker, 3) for worker in order[:16]])
    assert isinstance(writers, tuple)
    assert {writers.count(worker) for worker in order[:16]} == {4}
