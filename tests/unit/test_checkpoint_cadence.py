"""How often to save, and what is complete where."""

from __future__ import annotations

import pytest

from ray_dr.checkpoint.cadence import due, memory_interval, store_interval
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.job import Every
from ray_dr.model.journal import Decided, Noted, PartSaved, Record, Where
from ray_dr.model.recovery import NodeLost
from ray_dr.recovery.machine import initial
from ray_dr.telemetry.tiers import COPIES_KEPT, KEPT, Completeness, fold


@pytest.mark.parametrize(
    ("step_s", "cost_s", "current", "steps"),
    [
        (0.1, 0.001, None, 1),
        (0.1, 0.0011, None, 2),
        (0.1, 0.01, None, 10),
        (0.1, 100.0, None, 1000),
        (0.0, 1.0, None, 1000),
        (0.1, 0.01, 2, 4),
        (0.1, 0.0, 9, 5),
        (0.1, 0.0, 1, 1),
        (0.1, 100.0, 900, 1000),
    ],
)
def test_memory_interval_keeps_the_budget_and_at_most_doubles(
    step_s: float, cost_s: float, current: int | None, steps: int
) -> None:
    assert memory_interval(step_s, cost_s, budget=0.01, current=current) == steps


def test_the_users_interval_overrides_the_budget() -> None:
    assert memory_interval(0.1, 9.0, budget=0.01, current=1, every=Every(steps=7)) == 7
    assert memory_interval(0.25, 9.0, budget=0.01, every=Every(seconds=1.1)) == 4
    assert memory_interval(5.0, 9.0, budget=0.01, every=Every(seconds=1.0)) == 1


def test_store_interval_waits_for_the_last_write_and_is_a_multiple_of_the_memory_interval() -> None:
    every = Every(seconds=1.0)
    assert store_interval(0.1, 0.0, slowdown=0.0, budget=0.01, memory_steps=4, every=every) == 12
    assert store_interval(0.1, 3.0, slowdown=0.0, budget=0.01, memory_steps=4, every=every) == 32
    assert store_interval(0.1, 1.0, slowdown=0.05, budget=0.01, memory_steps=1) == 50


def test_due_counts_finished_steps() -> None:
    assert [step for step in range(7) if due(step, 3)] == [3, 6]


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
