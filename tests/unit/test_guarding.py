"""When a guard submits a job again, and when it leaves it alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from ray_dr.model.lease import Guarding, Lease
from ray_dr.recovery.guarding import (
    GuardPolicy,
    Leave,
    Resubmit,
    Wait,
    Watch,
    decide,
    judge,
    look,
    refused,
    resubmitted,
)

POLICY = GuardPolicy(stale_s=60.0, start_s=300.0, backoff_s=60.0, backoff_most_s=600.0, tries_most=3)
ALIVE = Lease(term=4, beat=10, at=7.0, every_s=3.0, step=50, phase="Running")
LOOK_S = 5.0


def looking(watch: Watch, lease: Lease | None, at: float, until: float) -> Watch:
    """The watch after looks every LOOK_S at the same lease."""
    while at <= until:
        watch, at = look(watch, at, lease, POLICY), at + LOOK_S
    return watch


def stale(lease: Lease = ALIVE, done: Guarding | None = None) -> Watch:
    """At 1100, a lease that was last seen to change at 1000."""
    return looking(Watch(done or Guarding()), lease, 1000.0, 1100.0)


def test_a_lease_that_changes_is_alive_whatever_its_clock_says() -> None:
    watch = Watch()
    for beat in range(100):
        watch = look(watch, 1000.0 + LOOK_S * beat, replace(ALIVE, beat=beat, at=-5e6), POLICY)
        assert isinstance(decide(watch, watch.looked_at, POLICY), Wait)


def test_a_lease_that_stays_the_same_is_lost_after_the_stated_time_and_not_before() -> None:
    watch = looking(Watch(), ALIVE, 1000.0, 1055.0)
    assert isinstance(decide(watch, 1055.0, POLICY), Wait)
    watch = looking(watch, ALIVE, 1060.0, 1060.0)
    verdict = decide(watch, 1060.0, POLICY)
    assert isinstance(verdict, Resubmit)
    assert "term 4 has not renewed its lease for 60 s" in verdict.reason


def test_a_slow_lease_is_given_three_of_its_intervals() -> None:
    slow = replace(ALIVE, every_s=40.0)
    assert isinstance(decide(stale(slow), 1100.0, POLICY), Wait)
    assert isinstance(decide(looking(stale(slow), slow, 1105.0, 1120.0), 1120.0, POLICY), Resubmit)


def test_time_in_which_the_store_could_not_be_read_does_not_count() -> None:
    watch = stale()
    watch = look(watch, 1101.0, None, POLICY, trouble="503")
    assert decide(watch, 1101.0, POLICY) == Wait("the store cannot be read (503)")
    watch = look(watch, 1102.0, ALIVE, POLICY)
    assert isinstance(decide(watch, 1102.0, POLICY), Wait), "the supervisor could not renew it either"
    assert isinstance(decide(looking(watch, ALIVE, 1107.0, 1170.0), 1170.0, POLICY), Resubmit)


def test_time_in_which_the_guard_stood_still_does_not_count() -> None:
    watch = look(look(Watch(), 1000.0, ALIVE, POLICY), 5000.0, ALIVE, POLICY)
    assert isinstance(decide(watch, 5000.0, POLICY), Wait)
    back = look(watch, 900.0, ALIVE, POLICY)
    assert isinstance(decide(back, 900.0, POLICY), Wait), "nor when its clock was set back"


def test_a_job_nobody_has_heard_of_is_not_started() -> None:
    assert decide(looking(Watch(), None, 0.0, 5000.0), 5000.0, POLICY) == Wait("no supervisor has been heard of yet")


@pytest.mark.parametrize(
    ("lease", "left"),
    [
        (replace(ALIVE, over="finished"), Leave("finished after step 50", well=True)),
        (replace(ALIVE, over="drained"), Leave("drained after step 50 (somebody asked it to stop)", well=True)),
        (
            replace(ALIVE, over="failed", reason="ValueError", resubmit=False),
            Leave("failed, and would fail again: ValueError", well=False, for_good=True),
        ),
    ],
    ids=["finished", "drained", "failed for good"],
)
def test_what_is_over_is_left_alone(lease: Lease, left: Leave) -> None:
    assert decide(stale(lease), 1100.0, POLICY) == left


def test_what_was_lost_while_it_was_being_stopped_is_not_started_again() -> None:
    verdict = decide(stale(replace(ALIVE, phase="Draining")), 1100.0, POLICY)
    assert isinstance(verdict, Leave)
    assert not verdict.well


def test_a_failure_that_may_pass_is_tried_again_without_waiting_for_silence() -> None:
    failed = replace(ALIVE, over="failed", reason="no progress", resubmit=True)
    assert isinstance(decide(look(Watch(), 1000.0, failed, POLICY), 1000.0, POLICY), Resubmit)


def test_after_a_resubmission_its_supervisor_has_time_to_begin_also_for_a_guard_that_was_started_again() -> None:
    watch = resubmitted(stale(), 1100.0)
    assert watch.done == Guarding(1, 1100.0, 4, 50)
    assert isinstance(decide(looking(watch, ALIVE, 1105.0, 1390.0), 1390.0, POLICY), Wait)
    again = looking(Watch(watch.done), ALIVE, 1200.0, 1390.0)
    assert isinstance(decide(again, 1390.0, POLICY), Wait), "the guard was started again"
    assert isinstance(decide(looking(again, ALIVE, 1395.0, 1405.0), 1405.0, POLICY), Resubmit)


def test_resubmissions_back_off_and_end_when_none_brings_a_new_step() -> None:
    watch, at, tries = stale(), 1100.0, []
    while not isinstance(verdict := decide(watch, at, POLICY), Leave):
        if isinstance(verdict, Resubmit):
            tries.append(at)
            watch = resubmitted(watch, at)
        at += LOOK_S
        # Each one begins at once, takes the next term, and falls silent where the first had come to.
        watch = look(watch, at, replace(ALIVE, term=4 + len(tries), step=45), POLICY)
        assert at < 20_000
    assert len(tries) == POLICY.tries_most
    pauses = [after - before for before, after in pairwise(tries)]
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 2 * POLICY.backoff_s
    assert not verdict.well
    assert "given up" in verdict.reason


def test_a_new_step_starts_the_count_anew() -> None:
    watch = resubmitted(resubmitted(stale(), 1100.0), 1500.0)
    assert look(watch, 1600.0, replace(ALIVE, term=5, step=50), POLICY).done.tries == 2
    assert look(watch, 1600.0, replace(ALIVE, term=5, step=51), POLICY).done.tries == 0


def test_a_cluster_that_cannot_be_reached_is_tried_again_soon_and_for_ever() -> None:
    watch, at, tries = stale(), 1100.0, 0
    while at < 5000.0:
        if isinstance(decide(watch, at, POLICY), Resubmit):
            tries += 1
            watch = refused(resubmitted(watch, at), at, counts=False)
        at += LOOK_S
        watch = look(watch, at, ALIVE, POLICY)
    assert tries > 3 * POLICY.tries_most


def test_a_submission_that_failed_counts_and_is_not_waited_for() -> None:
    watch = refused(resubmitted(stale(), 1100.0), 1110.0, counts=True)
    assert isinstance(decide(looking(watch, ALIVE, 1115.0, 1165.0), 1165.0, POLICY), Wait)
    assert isinstance(decide(looking(watch, ALIVE, 1115.0, 1175.0), 1175.0, POLICY), Resubmit)
    assert watch.done.tries == 1


def test_a_supervisor_that_lives_on_without_its_head_has_lost_its_cluster() -> None:
    watch = Watch()
    for beat in range(20):
        lease = replace(ALIVE, beat=beat, headless_s=LOOK_S * beat)
        watch = look(watch, 1000.0 + LOOK_S * beat, lease, POLICY)
        assert isinstance(decide(watch, watch.looked_at, POLICY), Resubmit) == (lease.headless_s >= POLICY.stale_s)


def test_who_wants_a_job_now_takes_it_only_from_a_supervisor_known_not_to_live() -> None:
    renewed = replace(ALIVE, beat=11)
    assert judge(ALIVE, ALIVE, 8.0) is None
    assert judge(ALIVE, ALIVE, 9.0) is False
    assert judge(ALIVE, renewed, 0.0) is True
    assert judge(ALIVE, replace(renewed, headless_s=4.0), 0.0) is None, "its head may come back"
    assert judge(ALIVE, replace(renewed, headless_s=9.0), 0.0) is False
    assert judge(ALIVE, replace(renewed, over="failed"), 0.0) is False
