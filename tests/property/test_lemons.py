"""Scores of machines over any incidents: they fade, grow with each incident, and never leave a job without machines."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.nodes import Charge, Entry, Pardon
from ray_dr.model.signal import FaultKind
from ray_dr.recovery.lemons import SHARE_MOST, Score, quarantine, score

NOW = 1_000_000_000.0
FLEET = "abcdefghijklmnopqrstuvwxyz"
machines = st.sampled_from(FLEET)
times = st.floats(NOW - 30 * 86400, NOW)
charges = st.builds(
    Charge, machines, st.sampled_from(FaultKind), times, st.just("job"), st.uuids(version=4).map(str), share=st.floats(0.1, 1)
)
entries = st.lists(st.one_of(charges, charges, charges, charges, st.builds(Pardon, machines, times)), max_size=40)
many = settings(max_examples=200, deadline=None, derandomize=True)


def of(name: str, held: list[Entry], now: float = NOW) -> Score:
    return next(one for one in score(held, FLEET, now) if one.machine == name)


@many
@given(entries, st.floats(0, 60 * 86400))
def test_points_only_fade_and_nobody_is_condemned_by_time_alone(held: list[Entry], later: float) -> None:
    for name in "abc":
        now, then = of(name, held), of(name, held, NOW + later)
        assert then.points <= now.points
        assert then.until in (0.0, now.until) or not now.until


@many
@given(entries, charges)
def test_a_further_incident_never_helps_its_machine_nor_harms_another(held: list[Entry], further: Charge) -> None:
    before, after = of(further.machine, held), of(further.machine, [*held, further])
    assert after.points >= before.points
    assert after.rate >= before.rate
    assert after.excess >= before.excess * (1 - 1e-12)
    assert after.until >= before.until
    other = "a" if further.machine != "a" else "b"
    assert of(other, [*held, further]).excess <= of(other, held).excess * (1 + 1e-12)


@many
@given(entries, st.randoms())
def test_the_order_in_which_entries_are_read_says_nothing(held: list[Entry], dice: object) -> None:
    mixed = list(held)
    dice.shuffle(mixed)  # type: ignore[attr-defined]
    assert score(mixed, FLEET, NOW) == score(held, FLEET, NOW)


@many
@given(entries, st.sets(machines), st.integers(0, 30))
def test_the_cap_holds_and_no_sound_machine_is_left_out(held: list[Entry], present: set[str], need: int) -> None:
    scores = score(held, FLEET, NOW)
    verdict = quarantine(scores, present, need)
    out = {one.machine for one in verdict.out}
    assert len(out) <= max(1, int(SHARE_MOST * len(present)))
    assert len(present - out) >= min(need, len(present))
    condemned = {one.machine for one in scores if one.until} & present
    assert out | {one.machine for one in verdict.spared} == condemned
    if verdict.out and verdict.spared:
        assert min(one.points for one in verdict.out) >= max(one.points for one in verdict.spared)
