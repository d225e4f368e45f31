"""What any retention keeps of any history: checked against what each rule says in words."""

from __future__ import annotations

import datetime
from dataclasses import fields, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.checkpoint import Manifest, VersionId
from ray_dr.model.job import Keep
from ray_dr.repository.retention import PrunePlan, plan_prune

counts = st.integers(0, 4)
keeps = st.builds(Keep, st.integers(1, 4), counts, counts, counts, st.sampled_from([0.0, 1800.0, 7200.0, 2e5]))
gaps = st.lists(st.sampled_from([0.0, 60.0, 1800.0, 3600.0, 20000.0, 90000.0, 700000.0, -3600.0]), max_size=14)


def history(gaps: list[float]) -> list[Manifest]:
    """Checkpoints in order, made so many seconds apart; a clock may have been set back."""
    at, found = 1.7e9, []
    for step, gap in enumerate(gaps):
        at += gap
        found.append(Manifest(1, "j", 1, VersionId(1, step), 1, 0, (), at))
    return found


def steps(plan: PrunePlan) -> set[int]:
    return {verdict.manifest.version.step for verdict in plan.keep}


@given(gaps, keeps, st.sets(st.integers(0, 13)))
@settings(max_examples=150, deadline=None)
def test_each_rule_keeps_what_it_says_and_nothing_else_is_kept(gaps: list[float], keep: Keep, bad: set[int]) -> None:
    made = history(gaps)
    good = [each for each in made if each.version.step not in bad]
    plan = plan_prune(made, keep, {VersionId(1, step): "damaged" for step in bad})
    listed = sorted(verdict.manifest.version for verdict in (*plan.keep, *plan.drop))
    assert listed == [each.version for each in made]
    assert all(verdict.reason for verdict in (*plan.keep, *plan.drop))
    if not good:
        assert not plan.drop
        return
    wanted = {each.version.step for each in good[-keep.last :]}
    for count, form in ((keep.hourly, "%Y-%m-%d %H"), (keep.daily, "%Y-%m-%d"), (keep.weekly, "%G-%V")):
        spans: dict[str, tuple[float, int]] = {}
        for each in good:
            name = datetime.datetime.fromtimestamp(each.created_at, datetime.UTC).strftime(form)
            spans[name] = (each.created_at, each.version.step)
        wanted |= {spans[name][1] for name in sorted(spans, reverse=True)[:count]}
    if keep.within_s:
        youngest = max(each.created_at for each in good)
        wanted |= {each.version.step for each in good if youngest - each.created_at <= keep.within_s}
    assert steps(plan) == wanted


@given(gaps.filter(bool), keeps, st.sets(st.integers(0, 13)))
@settings(max_examples=100, deadline=None)
def test_the_newest_good_one_stays_and_damaged_ones_never_count(gaps: list[float], keep: Keep, bad: set[int]) -> None:
    made = history(gaps)
    damaged = {VersionId(1, step): "damaged" for step in bad}
    good = [each for each in made if each.version not in damaged]
    plan = plan_prune(made, keep, damaged)
    if good:
        assert good[-1].version.step in steps(plan)
        assert steps(plan) == steps(plan_prune(good, keep))
    else:
        assert steps(plan) == {each.version.step for each in made}


@given(gaps, keeps, st.sampled_from([field.name for field in fields(Keep)]), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_asking_for_more_never_keeps_less(gaps: list[float], keep: Keep, rule: str, more: int) -> None:
    made = history(gaps)
    amount = more * 3600 if rule == "within_s" else more
    wider = replace(keep, **{rule: getattr(keep, rule) + amount})
    assert steps(plan_prune(made, keep)) <= steps(plan_prune(made, wider))


@given(gaps, keeps, st.integers(0, 14))
@settings(max_examples=100, deadline=None)
def test_nothing_is_missed_later_that_went_early(gaps: list[float], keep: Keep, early: int) -> None:
    """Pruning often and pruning once come to the same: no version goes that a later plan would have kept."""
    made = history(gaps)
    left = [verdict.manifest for verdict in plan_prune(made[:early], keep).keep]
    assert steps(plan_prune([*left, *made[early:]], keep)) == steps(plan_prune(made, keep))
