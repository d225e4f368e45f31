"""Bad machines: what is held against them, who is left out and for how long."""

from __future__ import annotations

import pytest

from ray_dr.detection.taxonomy import FAULTS, Budget
from ray_dr.model.nodes import Charge, Entry, Pardon
from ray_dr.model.signal import FaultKind
from ray_dr.recovery.lemons import (
    COOL_OFF_S,
    DAY_S,
    HALF_LIFE_S,
    Quarantine,
    Score,
    quarantine,
    score,
    weight,
)

NOW = 1_000_000_000.0
FLEET = ("a", "b", "c", "d")


def charge(machine: str, at: float, kind: FaultKind = FaultKind.NODE_GONE, *, share: float = 1.0) -> Charge:
    return Charge(machine, kind, at, "job", f"1.{at:f}", "silent", share)


def of(name: str, *entries: Entry, now: float = NOW, fleet: tuple[str, ...] = FLEET) -> Score:
    return next(one for one in score(entries, fleet, now) if one.machine == name)


def losses(machine: str, count: int, before: float = NOW) -> list[Entry]:
    return [charge(machine, before - 60.0 * number) for number in range(count)]


def test_one_loss_is_no_lemon_and_three_in_an_hour_are() -> None:
    assert of("a", *losses("a", 1)).standing == "suspect"
    assert of("a", *losses("a", 1), now=NOW + 60).standing == "well"
    assert of("a", *losses("a", 2)).standing == "suspect"
    assert of("a", *losses("a", 3)).standing == "condemned"
    assert of("b", *losses("a", 3)).standing == "well"


def test_points_halve_in_a_half_life() -> None:
    one = charge("a", NOW)
    assert of("a", one, now=NOW + HALF_LIFE_S).points == pytest.approx(of("a", one).points / 2)


def test_a_hardware_error_of_a_gpu_condemns_at_once() -> None:
    assert of("a", charge("a", NOW, FaultKind.GPU_FAULT)).standing == "condemned"
    assert of("a", charge("a", NOW, FaultKind.GPU_FAULT, share=0.5)).standing == "suspect"


def test_a_cool_off_ends_and_the_next_incident_begins_a_longer_one() -> None:
    first = losses("a", 3)
    assert of("a", *first, now=NOW + COOL_OFF_S).standing == "condemned"
    assert of("a", *first, now=NOW + 2 * COOL_OFF_S).standing == "suspect"
    again = of("a", *first, charge("a", NOW + 2 * DAY_S), now=NOW + 2 * DAY_S)
    assert again.until - (NOW + 2 * DAY_S) > of("a", *first).until - NOW


def test_a_small_incident_does_not_end_a_cool_off() -> None:
    broken, later = charge("a", NOW, FaultKind.GPU_FAULT), NOW + 0.9 * DAY_S
    small = charge("a", later, FaultKind.EXCEPTION)
    assert of("a", broken, small, now=later).until == of("a", broken, now=later).until == NOW + COOL_OFF_S


def test_a_bad_week_of_the_whole_fleet_condemns_nobody() -> None:
    everybody = [entry for name in FLEET for entry in losses(name, 3)]
    assert {one.standing for one in score(everybody, FLEET, NOW)} == {"suspect"}
    assert of("a", *everybody, *losses("a", 20)).standing == "condemned"


def test_what_is_pardoned_counts_no_more_and_what_comes_after_does() -> None:
    entries: list[Entry] = [*losses("a", 3), Pardon("a", NOW + 1)]
    assert of("a", *entries, now=NOW + 2).points == 0
    assert of("a", *entries, charge("a", NOW + 2), now=NOW + 2).charges == 1
    assert of("b", Pardon("a", NOW + 1), *losses("b", 3)).standing == "condemned"


def test_an_incident_told_twice_is_one_charge() -> None:
    assert of("a", charge("a", NOW), charge("a", NOW)).charges == 1


def test_neither_the_programs_faults_nor_being_taken_away_weigh_anything() -> None:
    free = {kind for kind, fault in FAULTS.items() if fault.budget is Budget.PROGRAM} | {FaultKind.PREEMPTION}
    assert {weight(kind) for kind in free} == {0.0}
    assert weight(FaultKind.NODE_GONE) == 2.0


def test_enough_machines_to_run_are_never_left_out() -> None:
    scores = score(losses("a", 3), FLEET, NOW)
    assert [one.machine for one in quarantine(scores, FLEET, need=3).out] == ["a"]
    spared = quarantine(scores, FLEET, need=4)
    assert spared.out == ()
    assert [one.machine for one in spared.spared] == ["a"]
    assert quarantine(scores, ("a",), need=1).out == ()


def test_only_a_tenth_is_left_out_and_the_worst_first() -> None:
    fleet = tuple(f"n{number:03d}" for number in range(100))
    bad = [entry for number in range(15) for entry in losses(fleet[number], 20 if number == 14 else 10)]
    verdict = quarantine(score(bad, fleet, NOW), fleet, need=1)
    assert (len(verdict.out), len(verdict.spared)) == (10, 5)
    assert verdict.out[0].machine == "n014"


def test_who_is_not_there_is_neither_left_out_nor_spared() -> None:
    assert quarantine(score(losses("z", 3), FLEET, NOW), FLEET, need=1) == Quarantine()


def test_a_reason_names_the_last_incident() -> None:
    said = of("a", *losses("a", 3)).reason
    assert "3 incidents" in said
    assert "the last node_gone in job job (silent)" in said
