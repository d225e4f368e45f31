"""Samples that are left out, over any windows, worlds and epochs: the others are used exactly once, in their order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.actions import FormGroup
from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.data import Order, digest, joined, leave_out, position_of, share
from ray_dr.model.events import Opened
from ray_dr.model.journal import DataOpened, Decided, Record, Stepped
from ray_dr.model.recovery import Group, Rollback, Starting, State
from ray_dr.recovery.quarantine import settled, usable, windows
from ray_dr.telemetry.lineage import verify_data

cuts = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), max_size=8)


@given(cuts)
def test_places_are_the_positions_that_no_window_holds_in_their_order(made: list[tuple[int, int]]) -> None:
    kept, found = list(range(2000)), ()
    for first, count in made:
        found = leave_out(found, first, first + count)
        # what is cut again may lie around an older window: from the first to the last position, all of it goes
        gone = range(kept[first], kept[first + count - 1] + 1) if count else range(0)
        kept = [position for position in kept if position not in gone]
    assert found == joined(found)
    inside = {position for first, last in found for position in range(first, last)}
    assert kept == [position for position in range(2000) if position not in inside]
    assert [position_of(place, found) for place in range(len(kept))] == kept


@settings(deadline=None)
@given(cuts, st.integers(5, 400), st.integers(1, 40), st.integers(1, 7), st.booleans(), st.integers(0, 9))
def test_every_sample_that_is_not_left_out_is_used_once_an_epoch_at_any_world_size(
    made: list[tuple[int, int]], length: int, batch: int, world: int, shuffle: bool, seed: int
) -> None:
    found = ()
    for first, count in made:
        found = leave_out(found, first, first + count)
    plain, order = Order(length, seed, shuffle), Order(length, seed, shuffle, found)
    used: list[int] = []
    for step in range(12):
        for rank in range(world):
            piece = share(step, global_batch=batch, rank=rank, world=world)
            used += order.indices(piece.first, piece.last)
    inside = {position for first, last in found for position in range(first, last)}
    stream = [position for position in range(12 * batch + len(inside)) if position not in inside][: 12 * batch]
    assert used == [plain.index(position) for position in stream]
    assert used == [order.index(place) for place in range(12 * batch)]


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[Record], int, int, list[tuple[int, int]]]:
    """A job's journal, attempt by attempt: it does some steps, then goes back to a step it had been at, for a plain failure or
    because training went wrong. Also its steps, its batch, and what each attempt used."""
    batch, records, rollbacks, base, origin = draw(st.integers(1, 9)), [], (), 0, None
    last_attempt = draw(st.integers(1, 6))
    for attempt in range(1, last_attempt + 1):
        world = draw(st.integers(1, 4))
        rollbacks = settled(rollbacks, origin)
        order = Order(50, 3, True, windows(rollbacks))
        group = Group(attempt, tuple(f"n/{rank}" for rank in range(world)), origin)
        state = State(Starting(group, 0.0), attempt=attempt, rollbacks=rollbacks)
        records.append(Decided(0.0, 1, attempt, Opened(0.0, 1, 0), state, (FormGroup(group),), "begins"))
        records.append(DataOpened(0.0, attempt, 50, batch, 0, 3, True, order.left_out))
        last = base + draw(st.integers(1, 6))
        for step in range(base, last):
            for rank in range(world):
                piece = share(step, global_batch=batch, rank=rank, world=world)
                mine = digest(order.indices(piece.first, piece.last))
                records.append(Stepped(0.0, StepRecord(attempt, step + 1, rank, world, ((piece.first, piece.last),), mine, 0.1)))
        good = draw(st.integers(base, last))
        if attempt < last_attempt and draw(st.booleans()):
            rollbacks = (*rollbacks, Rollback(attempt, good, last, batch))
        if attempt < last_attempt:
            # An older attempt's version, too, can be gone back to; it is of the lineage when it is not beyond this one's base.
            base, origin = good, VersionId(attempt, good)
            assert usable(origin, rollbacks)
    return records, last, batch, list(windows(rollbacks))


@settings(deadline=None)
@given(lives())
def test_the_journal_proves_it_and_takes_what_is_left_out_for_neither_lost_nor_repeated(
    life: tuple[list[Record], int, int, list[tuple[int, int]]],
) -> None:
    records, steps, batch, left_out = life
    report = verify_data(records)
    assert report.ok, report
    assert (report.steps, report.used) == (steps, steps * batch)
    assert report.quarantined == sum(last - first for first, last in left_out)
    assert sum(report.epochs.values()) == steps * batch


@settings(deadline=None)
@given(lives())
def test_the_journal_does_not_prove_it_when_a_step_used_what_was_left_out(
    life: tuple[list[Record], int, int, list[tuple[int, int]]],
) -> None:
    records, steps, batch, left_out = life
    order = Order(50, 3)
    first = next((first for first, _ in left_out if first < steps * batch), None)
    if first is None:
        return
    wrong = [
        Stepped(0.0, StepRecord(r.record.attempt, r.record.step, r.record.rank, r.record.world, r.record.ranges,
                                digest(order.index(at) for a, b in r.record.ranges for at in range(a, b)), 0.1))
        if isinstance(r, Stepped) else r for r in records
    ]  # fmt: skip
    used = Order(50, 3, True, tuple(left_out))
    if [order.index(at) for at in range(steps * batch)] != [used.index(at) for at in range(steps * batch)]:
        assert not verify_data(wrong).ok


def test_a_version_is_of_use_from_before_and_of_a_later_attempt() -> None:
    backs = (Rollback(3, 40, 60),)
    fits = [(1, 39), (3, 40), (4, 41), (4, 99)]
    assert [usable(VersionId(*one), backs) for one in fits] == [True] * 4
    assert not usable(VersionId(3, 41), backs)
    assert not usable(VersionId(2, 50), backs)
