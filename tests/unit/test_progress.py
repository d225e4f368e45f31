"""How far an attempt has come: the slowest rank counts, and each record counts once."""

from __future__ import annotations

from ray_dr.actors.progress import REMEMBERED, Progress
from ray_dr.model.checkpoint import StepRecord


def record(rank: int, step: int, attempt: int = 1) -> StepRecord:
    return StepRecord(attempt, step, rank, 2, (), "", 0.1)


def begun(step: int = 0) -> Progress:
    progress = Progress()
    progress.begin(1, 2, step)
    return progress


def test_a_step_is_done_when_every_rank_has_done_it() -> None:
    progress = begun()
    progress.add(record(0, 1))
    assert (progress.step, progress.newest) == (0, 1)
    progress.add(record(1, 1))
    progress.add(record(1, 2))
    assert (progress.step, progress.newest) == (1, 2)


def test_before_the_first_step_an_attempt_is_where_it_began() -> None:
    assert (begun(40).step, begun(40).newest) == (40, 40)


def test_a_record_heard_of_twice_counts_once() -> None:
    progress = begun()
    assert progress.add(record(0, 1))
    assert not progress.add(record(0, 1))


def test_late_records_of_an_older_attempt_are_news_but_no_progress() -> None:
    progress = begun()
    progress.begin(2, 2, 10)
    assert progress.add(record(0, 11, attempt=1))
    assert progress.newest == 10


def test_records_that_come_out_of_order_never_turn_progress_back() -> None:
    progress = begun()
    for rank in (0, 1):
        progress.add(record(rank, 5))
        progress.add(record(rank, 4))
    assert progress.step == 5


def test_what_is_remembered_is_bounded() -> None:
    progress = begun()
    for step in range(REMEMBERED + 500):
        progress.add(record(0, step))
    assert len(progress._seen) == REMEMBERED
