"""How often to save, and what is complete where."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ray_dr.checkpoint.cadence import LONGEST_S, Bounds, Costs, Rhythm, best_interval, choose, due, span
from ray_dr.checkpoint.failures import Rate
from ray_dr.model.attempt import Cadence
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import NodeLost
from ray_dr.model.job import Every
from ray_dr.model.journal import Decided, Noted, PartSaved, Record, Where
from ray_dr.recovery.machine import initial
from ray_dr.telemetry.tiers import COPIES_KEPT, KEPT, Completeness, fold

MONTH = Rate(1 / (30 * 86_400))
DAILY = Rate(1 / 86_400, seen=3, exposed_s=43_200.0)


def steps(costs: Costs, rate: Rate = MONTH, current: int | None = None, **bounds: Any) -> int:
    return choose(costs, rate, Bounds(**bounds), current).steps


@pytest.mark.parametrize(
    ("cost_s", "mtbf_s", "best_s"),
    [(1.0, 100.0, 13.4835), (2.05, 111_600.0, 675.066), (1.0, 1.0, 0.84141), (60.0, 86_400.0, 3180.063), (0.0, 9.0, 0.0)],
)
def test_the_best_interval_is_where_the_exact_waste_is_least(cost_s: float, mtbf_s: float, best_s: float) -> None:
    assert best_interval(cost_s, mtbf_s) == pytest.approx(best_s, rel=1e-5)

    def waste(tau_s: float) -> float:  # wall / work with exponential failures, Daly (2006)
        return mtbf_s / tau_s * math.expm1((tau_s + cost_s) / mtbf_s)

    if cost_s:
        assert waste(best_s) < min(waste(0.99 * best_s), waste(1.01 * best_s))


def test_without_failures_saves_are_as_rare_as_may_be() -> None:
    assert best_interval(1.0, math.inf) == LONGEST_S
    assert steps(Costs(1.0, 1.0), Rate(0.0)) == LONGEST_S


def test_an_interval_is_the_best_one_where_no_bound_speaks() -> None:
    choice = choose(Costs(0.1, 2.0, 4.0), DAILY, Bounds(budget=0.05))
    assert choice.steps == 5865, "587.9 s less 1.3 s: what Young leaves out"
    assert choice.reason == "a save costs 2 s, a loss is expected every 24 h (3 seen in 12 h): 9.8 min is best"


def test_saving_never_costs_more_than_the_budget() -> None:
    often = Rate(1 / 60.0, seen=9, exposed_s=540.0)
    choice = choose(Costs(0.1, 0.3), often, Bounds(budget=0.01))
    assert choice.steps == 300
    assert "at most 1% of the time may be spent: 30 s" in choice.reason


def test_part_of_the_budget_is_spent_in_any_case() -> None:
    choice = choose(Costs(0.1, 0.005), MONTH, Bounds(budget=0.01, spent=0.25))
    assert choice.steps == 20
    assert "0.25% of the time is spent in any case: 2 s" in choice.reason


def test_an_interval_changes_by_at_most_a_factor_of_two() -> None:
    assert steps(Costs(0.1, 2.0), DAILY, 100) == 200
    assert steps(Costs(0.1, 2.0), DAILY, 99_999) == 50_000
    assert "by a factor of two at once: 20 s for now" in choose(Costs(0.1, 2.0), DAILY, Bounds(), 100).reason


def test_the_objective_shortens_an_interval_at_once() -> None:
    choice = choose(Costs(0.1, 2.0, 4.0), DAILY, Bounds(rpo_s=300.0), 99_999)
    assert choice.steps == 2960
    assert "at most 5 min of work may be lost: 4.9 min" in choice.reason


def test_a_write_is_over_before_the_next_begins_whatever_is_asked_for() -> None:
    choice = choose(Costs(0.1, 0.0, 4.0), MONTH, Bounds(every=Every(seconds=1.0), rpo_s=2.0))
    assert choice.steps == 40
    assert "a write takes 4 s, and the next begins after it" in choice.reason


def test_the_users_word_overrides_what_is_best_and_the_budget() -> None:
    assert steps(Costs(0.1, 9.0), every=Every(steps=7), budget=0.01, current=1) == 7
    assert steps(Costs(0.25, 9.0), every=Every(seconds=1.1), budget=0.01) == 4
    assert steps(Costs(5.0, 9.0), every=Every(seconds=1.0), budget=0.01) == 1


def test_an_interval_is_a_multiple_where_the_bounds_allow() -> None:
    every = Every(seconds=1.0)
    assert steps(Costs(0.1, 0.0), every=every, multiple=4) == 12
    assert steps(Costs(0.1, 0.0, 3.0), every=every, multiple=4) == 32
    assert steps(Costs(0.1, 0.0), every=every, multiple=4, rpo_s=1.0) == 8
    assert steps(Costs(0.1, 0.0), every=every, multiple=25, rpo_s=1.0) == 10


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.34, "340 ms"), (4.12, "4.1 s"), (110.0, "110 s"), (840.0, "14 min"), (111_600.0, "31 h"), (1e7, "116 d"),
     (math.inf, "for ever")],
)  # fmt: skip
def test_a_span_is_said_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_due_counts_finished_steps() -> None:
    assert [step for step in range(7) if due(step, 3)] == [3, 6]


@pytest.mark.parametrize(
    ("old", "new", "at", "saved"),
    [
        (10, 9, 109, [100, 110, 117, 126]),  # the next multiple of 9 is 17 steps after the last of 10
        (10, 9, 108, [100, 108, 117, 126]),
        (10, 40, 121, [120, 160, 200]),
        (10, 40, 131, [130, 160, 200]),
        (40, 30, 111, [80, 120, 150, 180]),
        (40, 150, 151, [120, 150 + 120, 300]),
    ],
)
def test_when_an_interval_changes_no_two_saves_are_further_apart_than_the_larger_one(
    old: int, new: int, at: int, saved: list[int]
) -> None:
    rhythm, found = Rhythm.begin(Cadence(0, 0, old), saved[0] - 1), []
    for step in range(saved[0], saved[-1] + 1):
        rhythm, places = (rhythm.change(Cadence(at, 0, new)) if step == at else rhythm).next(step)
        if places:
            assert places == {Where.STORE, Where.MEMORY}
            found.append(step)
    assert found == saved


def add(state: Completeness, step: int, rank: int, where: Where, node: str = "n") -> tuple[Completeness, tuple]:
    return state.add(VersionId(1, step), rank, 2, where, node)


def test_a_version_is_complete_once_all_ranks_are_in_and_says_so_once() -> None:
    state, new = add(Completeness(), 1, 0, Where.MEMORY)
    assert new == ()
    state, new = add(state, 1, 0, Where.MEMORY, "other")
    assert new == ()
    state, new = add(state, 1, 1, Where.MEMORY)
    assert new == ((VersionId(1, 1), Where.MEMORY),)
    assert add(state, 1, 1, Where.MEMORY) == (state, ())
    assert state.complete(Where.MEMORY) == (VersionId(1, 1),)
    assert state.complete(Where.STORE) == ()


def test_many_memory_versions_do_not_push_out_a_slow_store_version() -> None:
    state, _ = add(Completeness(), 1, 0, Where.STORE)
    for step in range(2, 50):
        state, _ = add(state, step, 0, Where.MEMORY)
    assert len(state.rows) == KEPT + 1
    assert add(state, 1, 0, Where.MEMORY) == (state, ())
    assert add(state, 1, 1, Where.STORE)[1] == ((VersionId(1, 1), Where.STORE),)


def test_a_lost_node_takes_its_memory_but_not_the_store() -> None:
    state = Completeness()
    for where in (Where.MEMORY, Where.STORE):
        state, _ = add(state, 1, 0, where, "a")
        state, _ = add(state, 1, 1, where, "b")
    state = state.without("b")
    assert state.complete(Where.MEMORY) == ()
    assert state.complete(Where.STORE) == (VersionId(1, 1),)


def test_a_rank_outside_its_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        add(Completeness(), 1, 2, Where.MEMORY)


def test_a_version_is_armed_when_every_part_has_all_its_copies_on_other_nodes() -> None:
    state = Completeness(peers=2)
    assert state.armed() is None
    for rank in range(2):
        state, _ = add(state, 1, rank, Where.MEMORY, f"own{rank}")
        state, new = add(state, 1, rank, Where.PEER, "b")
        assert new == (), "one copy is not two"
    state, _ = add(state, 1, 0, Where.PEER, "c")
    state, new = add(state, 1, 1, Where.PEER, "c")
    assert new == ((VersionId(1, 1), Where.PEER),)
    assert state.armed() == VersionId(1, 1)
    assert state.nodes(VersionId(1, 1), Where.PEER) == {"b", "c"}
    assert state.without("c").armed() is None


def test_without_peers_what_lies_in_its_own_memory_is_armed() -> None:
    state, _ = add(Completeness(peers=0), 4, 0, Where.MEMORY)
    state, _ = add(state, 4, 1, Where.MEMORY)
    assert state.armed() == VersionId(1, 4)


def test_a_new_attempt_leaves_nothing_in_memory_but_what_it_began_from() -> None:
    state = Completeness()
    for step in (1, 2):
        for where in (Where.MEMORY, Where.PEER, Where.DISK, Where.STORE):
            state, _ = add(state, step, 0, where)
    rows = [(row.version.step, row.where) for row in state.begin(VersionId(1, 1)).rows]
    assert sorted(rows) == sorted([
        (1, Where.DISK), (1, Where.MEMORY), (1, Where.PEER), (1, Where.STORE), (2, Where.DISK), (2, Where.STORE),
    ])  # fmt: skip


def test_a_lost_node_takes_its_disk_with_it() -> None:
    state, _ = add(Completeness(), 1, 0, Where.DISK, "a")
    state, _ = add(state, 1, 0, Where.SECOND, "a")
    assert [row.where for row in state.without("a").rows] == [Where.SECOND]


def test_the_journal_tells_what_is_armed() -> None:
    def saved(rank: int, where: Where, node: str) -> PartSaved:
        return PartSaved(1.0, VersionId(1, 3), rank, 2, where, node, 10, 0.1)

    records: list[Record] = [Noted(0.0, COPIES_KEPT, {"peers": 1})]
    records += [saved(rank, Where.MEMORY, "ab"[rank]) for rank in range(2)]
    assert fold(records).armed() is None
    records += [saved(rank, Where.PEER, "ba"[rank]) for rank in range(2)]
    assert fold(records).armed() == VersionId(1, 3)
    lost = NodeLost(2.0, "a", "power", 3)
    records.append(Decided(2.0, 1, 1, lost, initial(), (), ""))
    assert fold(records).armed() is None


def test_what_is_forgotten_counts_again_when_it_is_reported_again() -> None:
    state, _ = add(Completeness(), 1, 0, Where.STORE)
    state, new = add(state, 1, 1, Where.STORE)
    assert new == ((VersionId(1, 1), Where.STORE),)
    state = state.forget(VersionId(1, 1), Where.STORE)
    state, new = add(state, 1, 0, Where.STORE)
    assert new == ()
    assert add(state, 1, 1, Where.STORE)[1] == ((VersionId(1, 1), Where.STORE),)


def test_a_rank_whose_own_node_is_gone_is_an_orphan() -> None:
    state, _ = add(Completeness(), 1, 0, Where.MEMORY, "a")
    state, _ = add(state, 1, 1, Where.MEMORY, "b")
    assert state.orphans(VersionId(1, 1), {"a"}) == {1}
    assert state.orphans(VersionId(1, 2), {"a"}) == frozenset()
