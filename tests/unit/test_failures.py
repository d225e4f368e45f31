"""What a journal tells about losses: what survived each, how long the job was exposed, and what is to be expected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_dr.checkpoint.failures import COUNTED, DAY_S, NODE_PRIOR, Losses, Tally, count_losses, measured_rate, rates
from ray_dr.model.actions import Action, FormGroup
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Adopted, Event, FirstStep, NodeLost, Opened, Tick, WorkerLost
from ray_dr.model.journal import Decided, JobOpened, Noted, Record, Restored
from ray_dr.model.recovery import (
    FailureKind,
    Finished,
    Group,
    Incident,
    Node,
    Phase,
    Recovering,
    Running,
    Starting,
    State,
    Suspended,
)

MEMORY = {"memory": 10, "peer": 5, "store": 0}
STORE = {"memory": 5, "store": 5}


def group(attempt: int, restore: int = 0) -> Group:
    return Group(attempt, ("a/0", "b/0"), VersionId(attempt - 1, restore) if restore else None)


def decided(at: float, event: Event, phase: Phase, *actions: Action, nodes: int = 2, term: int = 1) -> Decided:
    state = State(phase, tuple(Node(name) for name in "abcdefgh"[:nodes]), attempt=1)
    return Decided(at, term, 1, event, state, actions, "because")


def opened(at: float, term: int) -> JobOpened:
    return JobOpened(at, term, "job", {})


def begins(at: float, attempt: int, restore: int = 0, sources: dict[str, int] | None = None) -> list[Record]:
    """A group forms, restores, and does its first step a second later."""
    first = group(attempt, restore)
    restored = [Restored(at + 0.5, attempt, 0, VersionId(1, restore), sources, 0.1, 0.1)] if sources else []
    return [
        decided(at, Tick(at), Starting(first, at), FormGroup(first)),
        *restored,
        decided(at + 1, FirstStep(at + 1, attempt, restore + 1), Running(first)),
    ]


def breaks(at: float, number: int, kind: FailureKind, *, nodes: int = 2) -> Decided:
    event = NodeLost(at, "b", "gone", 5) if kind is FailureKind.NODE_LOST else WorkerLost(at, "b/0", "b", "gone", 5)
    return decided(at, event, Recovering(Incident(number, kind, "b", at, 5), (), None, at), nodes=nodes)


def life(*records: Record) -> list[Record]:
    return [opened(0.0, 1), *begins(0.0, 1), *records]


@pytest.mark.parametrize(
    ("kind", "sources", "counted"),
    [
        (FailureKind.WORKER_LOST, MEMORY, (1, 0, 0)),
        (FailureKind.USER_ERROR, MEMORY, (1, 0, 0)),
        (FailureKind.NODE_LOST, MEMORY, (0, 1, 0)),
        (FailureKind.NODE_LOST, STORE, (0, 0, 1)),
        (FailureKind.NODE_LOST, None, (0, 1, 0)),
    ],
)
def test_a_loss_counts_where_the_cheapest_survivor_was(
    kind: FailureKind, sources: dict[str, int] | None, counted: tuple[int, int, int]
) -> None:
    tally = count_losses(life(breaks(50.0, 1, kind), *begins(51.0, 2, 5, sources)))
    assert (tally.own, tally.peer, tally.store) == counted


def test_a_node_that_goes_while_a_worker_is_replaced_makes_one_loss_of_a_node() -> None:
    broken = breaks(50.0, 1, FailureKind.WORKER_LOST)
    later = replace(broken, at=51.0, event=NodeLost(51.0, "b", "gone", 5))
    tally = count_losses(life(broken, later, *begins(52.0, 2, 5, MEMORY)))
    assert (tally.own, tally.peer, tally.store) == (0, 1, 0)


def test_a_loss_is_counted_before_it_is_got_over_and_only_once() -> None:
    records = life(breaks(50.0, 1, FailureKind.NODE_LOST))
    assert count_losses(records).peer == 1
    assert count_losses([*records, decided(51.0, Tick(51.0), records[-1].state.phase)]).peer == 1  # type: ignore[union-attr]


def test_a_resize_loses_nothing() -> None:
    tally = count_losses(life(*begins(50.0, 2, 5, STORE)))
    assert (tally.own, tally.peer, tally.store) == (0, 0, 0)


@pytest.mark.parametrize(("sources", "counted"), [(STORE, (0, 0, 1)), (None, (0, 0, 1)), (MEMORY, (0, 1, 0))])
def test_a_life_that_begins_from_a_checkpoint_shows_how_the_one_before_ended(
    sources: dict[str, int] | None, counted: tuple[int, int, int]
) -> None:
    tally = count_losses(life(opened(500.0, 2), *begins(510.0, 2, 5, sources)))
    assert (tally.own, tally.peer, tally.store) == counted
    assert tally.running


def test_nothing_is_lost_with_a_supervisor_whose_group_lives_on() -> None:
    adopted = decided(510.0, Adopted(510.0, group(1), 9), Running(group(1)), term=2)
    tally = count_losses(life(opened(500.0, 2), adopted))
    assert (tally.own, tally.peer, tally.store) == (0, 0, 0)


def test_nothing_is_lost_after_a_job_that_was_over() -> None:
    over = decided(400.0, Tick(400.0), Finished(drained=True))
    tally = count_losses(life(over, opened(500.0, 2), *begins(510.0, 2, 5, STORE)))
    assert tally.store == 0


def test_a_life_that_never_began_hides_no_loss() -> None:
    tally = count_losses(life(opened(500.0, 2), opened(600.0, 3), *begins(610.0, 2, 5, STORE)))
    assert tally.store == 1


def test_exposure_is_counted_in_seconds_of_nodes_and_of_the_job_while_there_is_a_group() -> None:
    suspended = decided(100.0, NodeLost(100.0, "a", "gone", 5), Suspended(None, 100.0), nodes=1)
    tally = count_losses(life(suspended, *begins(150.0, 2, 5, STORE), decided(161.0, Tick(161.0), Running(group(2)), nodes=3)))
    assert tally.job_s == pytest.approx(100.0 + 11.0), "not while it was suspended"
    assert tally.node_s == pytest.approx(2 * 100.0 + 2 * 11.0)


def test_between_two_lives_nothing_is_exposed() -> None:
    tally = count_losses(life(opened(500.0, 2), *begins(510.0, 2, 5, STORE)))
    assert tally.job_s == pytest.approx(1.0 + 1.0)


def test_a_later_fold_goes_on_from_a_note_as_if_it_had_read_everything() -> None:
    records = [
        *life(breaks(50.0, 1, FailureKind.NODE_LOST), *begins(51.0, 2, 5, MEMORY)),
        decided(60.0, Tick(60.0), Running(group(2))),
        breaks(70.0, 2, FailureKind.WORKER_LOST),
        *begins(71.0, 3, 5, MEMORY),
        opened(500.0, 2),
        *begins(510.0, 4, 5, STORE),
    ]
    at = 1 + records.index(next(r for r in records if isinstance(r, Decided) and r.at == 60.0))
    losses = Losses()
    for record in records[:at]:
        losses.add(record)
    fields = losses.note()
    assert fields is not None
    whole, tail = count_losses(records), count_losses([Noted(60.0, COUNTED, fields), *records[at:]])
    assert tail == whole
    assert (whole.own, whole.peer, whole.store) == (1, 1, 1)


def test_no_note_is_taken_while_a_loss_is_being_got_over() -> None:
    losses = Losses()
    for record in life(breaks(50.0, 1, FailureKind.NODE_LOST)):
        losses.add(record)
    assert losses.note() is None


def test_a_note_of_another_form_counts_nothing() -> None:
    assert count_losses([Noted(60.0, COUNTED, {"own": "many", "nodes": None, "peer": -3})]) == Tally()


def test_a_life_counts_on_from_what_is_recalled_late() -> None:
    losses = Losses()
    losses.add(decided(1.0, Opened(1.0, 2, 3), Starting(group(2, 5), 1.0), FormGroup(group(2, 5))))
    losses.add(decided(2.0, FirstStep(2.0, 2, 6), Running(group(2, 5))))
    assert losses.tally().store == 0
    losses.past = Tally(own=3, running=True)
    assert (losses.tally().own, losses.tally().store) == (3, 1)


def test_a_young_job_expects_about_what_others_have_seen() -> None:
    told = rates(Tally(), nodes=4)
    assert 1 / told.peer.per_s == pytest.approx(16.7 * DAY_S, rel=0.01)
    assert 1 / told.store.per_s == pytest.approx(12.2 * DAY_S, rel=0.01)


def test_what_was_seen_outweighs_the_prior() -> None:
    year_s = 365 * DAY_S
    assert measured_rate(NODE_PRIOR, 730, year_s) == pytest.approx(2 / DAY_S, rel=0.01)
    assert measured_rate(NODE_PRIOR, 0, year_s) < 0.1 * measured_rate(NODE_PRIOR, 0, 0.0)


def test_bad_nodes_are_known_after_a_handful_of_losses() -> None:
    expected = measured_rate(NODE_PRIOR, 5, 20 * 3600.0)  # one each four node-hours
    assert 0.5 / (4 * 3600.0) < expected < 1.1 / (4 * 3600.0)


def test_more_nodes_lose_more_but_a_cluster_is_lost_as_a_whole() -> None:
    few, many = rates(Tally(), nodes=2), rates(Tally(), nodes=20)
    assert many.peer.per_s == pytest.approx(10 * few.peer.per_s)
    assert many.store == few.store
