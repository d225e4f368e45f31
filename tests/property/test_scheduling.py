"""Who gets which nodes: what holds for any jobs on any machines."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.scheduling import Allocation, Machine, Rules, StepTime, Wanting
from ray_dr.scheduling.allocate import allocate, largest
from ray_dr.scheduling.goodput import efficiency, fit

USERS = ("ann", "bob")
NOW = 10_000.0


@st.composite
def machines(draw: st.DrawFn) -> list[Machine]:
    count = draw(st.integers(0, 12))
    return [
        Machine(f"n{number}", draw(st.sampled_from(("", "fast"))), draw(st.sampled_from((1.0, 4.0))),
                draw(st.sampled_from((0.0, 2.0))), draw(st.sampled_from(("a", "b"))), spot=draw(st.booleans()),
                usable=draw(st.integers(0, 5)) > 0)
        for number in range(count)
    ]  # fmt: skip


@st.composite
def jobs(draw: st.DrawFn) -> list[Wanting]:
    out = []
    for number in range(draw(st.integers(0, 8))):
        multiple = draw(st.sampled_from((1, 1, 2)))
        least = multiple * draw(st.integers(1, 2))
        out.append(Wanting(
            f"j{number}", draw(st.sampled_from(USERS)), float(draw(st.integers(0, 9000))), least,
            least + multiple * draw(st.integers(0, 5)), multiple, draw(st.integers(0, 1)), draw(st.sampled_from((1.0, 2.0))),
            cpus=draw(st.sampled_from((0.5, 1.0))), gpus=draw(st.sampled_from((0.0, 1.0))),
            kinds=draw(st.sampled_from(((), ("fast",)))), on_demand_min=draw(st.integers(0, 1)),
            times={"": StepTime(draw(st.floats(0.1, 10)), draw(st.floats(0, 0.1)), draw(st.floats(0, 0.01)))},
            steps_left=draw(st.sampled_from((math.inf, 100.0, 1e5))),
        ))  # fmt: skip
    return out


def check(wanting: list[Wanting], there: list[Machine], rules: Rules, given_out: tuple[Allocation, ...]) -> None:
    by_id, by_name = {each.id: each for each in there}, {job.name: job for job in wanting}
    cpus, gpus, users = Counter[str](), Counter[str](), Counter[str]()
    assert [each.job for each in given_out] == [job.name for job in wanting]
    for each in given_out:
        job = by_name[each.job]
        assert each.reason
        assert len(set(each.nodes)) == len(each.nodes), "a machine is taken once by a job"
        if each.nodes:
            assert job.nodes_min <= len(each.nodes) <= job.nodes_max, "whole gangs only"
            assert (len(each.nodes) - job.nodes_min) % job.multiple == 0
            assert sum(not by_id[node].spot for node in each.nodes) >= job.on_demand_min
            assert len({by_id[node].kind for node in each.nodes}) == 1
        for node in each.nodes:
            assert by_id[node].usable
            assert not job.kinds or by_id[node].kind in job.kinds
            cpus[node] += job.cpus  # type: ignore[assignment]
            gpus[node] += job.gpus  # type: ignore[assignment]
        users[job.user] += len(each.nodes)
    assert all(cpus[each.id] <= each.cpus and gpus[each.id] <= each.gpus for each in there), "no more than there is"
    assert all(users[user] <= most for user, most in rules.quotas.items())


def running(wanting: list[Wanting], given_out: tuple[Allocation, ...]) -> list[Wanting]:
    return [replace(job, held=each.nodes, changed_at=NOW) for job, each in zip(wanting, given_out, strict=True)]


@settings(max_examples=300, deadline=None)
@given(jobs(), machines(), st.dictionaries(st.sampled_from(USERS), st.integers(0, 8)))
def test_nothing_is_given_out_twice_and_gangs_are_whole(
    wanting: list[Wanting], there: list[Machine], quotas: dict[str, int]
) -> None:
    rules = Rules(quotas)
    first = allocate(wanting, there, rules, NOW)
    check(wanting, there, rules, first.allocations)
    second = allocate(running(wanting, first.allocations), there, rules, NOW + 1)
    check(wanting, there, rules, second.allocations)


@settings(max_examples=200, deadline=None)
@given(jobs(), machines())
def test_who_runs_keeps_what_it_has_while_nothing_changes(wanting: list[Wanting], there: list[Machine]) -> None:
    first = allocate(wanting, there, Rules(), NOW)
    assert allocate(wanting, there, Rules(), NOW) == first
    now_running = running(wanting, first.allocations)
    again = allocate(now_running, there, Rules(), NOW + 1)
    for before, after in zip(first.allocations, again.allocations, strict=True):
        if before.nodes:
            assert set(after.nodes) == set(before.nodes)


@settings(max_examples=200, deadline=None)
@given(jobs(), machines())
def test_a_machine_that_goes_costs_only_what_it_must(wanting: list[Wanting], there: list[Machine]) -> None:
    first = allocate(wanting, there, Rules(), NOW)
    used = [node for each in first.allocations for node in each.nodes]
    if not used:
        return
    gone = used[0]
    left = [each for each in there if each.id != gone]
    after = allocate(running(wanting, first.allocations), left, Rules(), NOW + 1)
    hit = {each.job for each in first.allocations if gone in each.nodes}
    priorities = {job.name: job.priority for job in wanting}
    check(wanting, left, Rules(), after.allocations)
    for before, now_has in zip(first.allocations, after.allocations, strict=True):
        if not any(priorities[before.job] <= priorities[name] for name in hit):
            assert set(now_has.nodes) == set(before.nodes), "those of a higher priority are not touched"


@settings(max_examples=200, deadline=None)
@given(jobs(), machines())
def test_a_job_of_higher_priority_gets_its_minimum_as_if_it_were_alone(wanting: list[Wanting], there: list[Machine]) -> None:
    urgent = Wanting("urgent", "eve", NOW, 2, 2, priority=9)
    alone = allocate([urgent], there, Rules(), NOW).allocations[0]
    among = allocate([*running(wanting, allocate(wanting, there, Rules(), NOW).allocations), urgent], there, Rules(), NOW + 1)
    assert len(among.allocations[-1].nodes) == len(alone.nodes)


def test_nobody_is_overtaken_for_ever() -> None:
    there = [Machine(f"n{number}") for number in range(4)]
    small = Wanting("small", "ann", 0.0, 2, 2, held=("n0", "n1"))
    large = Wanting("large", "ann", 10.0, 4, 4)
    later = Wanting("later", "ann", 20.0, 2, 2)
    early = allocate([small, large, later], there, Rules(starve_s=100.0), 50.0)
    assert [len(each.nodes) for each in early.allocations] == [2, 0, 2]
    late = allocate([small, large, later], there, Rules(starve_s=100.0), 110.0)
    assert [len(each.nodes) for each in late.allocations] == [2, 0, 0]
    assert "behind large" in late.allocations[2].reason
    free = allocate([large, later], there, Rules(starve_s=100.0), 120.0)
    assert [len(each.nodes) for each in free.allocations] == [4, 0]


def test_a_higher_priority_shrinks_others_before_it_suspends_them() -> None:
    there = [Machine(f"n{number}") for number in range(4)]
    ids = tuple(each.id for each in there)
    low = Wanting("low", "ann", 0.0, 1, 4, held=ids)
    shrunk = allocate([low, Wanting("high", "bob", 1.0, 3, 3, priority=1)], there, Rules(), 100.0)
    assert [len(each.nodes) for each in shrunk.allocations] == [1, 3]
    assert "shrinks from 4 to 1" in shrunk.allocations[0].reason
    gone = allocate([low, Wanting("high", "bob", 1.0, 4, 4, priority=1)], there, Rules(), 100.0)
    assert [len(each.nodes) for each in gone.allocations] == [0, 4]
    assert gone.allocations[0].reason.startswith("suspended")
    assert gone.missing == {"": 1}


def test_nodes_go_to_those_that_scale() -> None:
    there = [Machine(f"n{number}") for number in range(8)]
    scales = Wanting("scales", "ann", 0.0, 1, 8, times={"": StepTime(1.0)})
    does_not = Wanting("does not", "ann", 0.0, 1, 8, times={"": StepTime(0.1, 0.9)})
    found = allocate([scales, does_not], there, Rules(), NOW)
    assert [len(each.nodes) for each in found.allocations] == [7, 1]


def test_a_resize_that_does_not_pay_is_not_made() -> None:
    there = [Machine(f"n{number}") for number in range(4)]
    soon_over = Wanting("soon over", "ann", 0.0, 1, 4, held=("n0",), steps_left=3, resize_s=10.0)
    assert allocate([soon_over], there, Rules(), NOW).allocations[0].nodes == ("n0",)
    assert len(allocate([replace(soon_over, steps_left=1e6)], there, Rules(), NOW).allocations[0].nodes) == 4


def test_a_job_goes_where_it_is_fastest() -> None:
    there = [Machine("old", "old"), Machine("new", "new")]
    job = Wanting("job", "ann", 0.0, 1, 1, times={"old": StepTime(2.0), "new": StepTime(1.0)})
    assert allocate([job], there, Rules(), NOW).allocations[0].nodes == ("new",)
    assert allocate([replace(job, held=("old",))], there, Rules(), NOW).allocations[0].nodes == ("old",)


@pytest.mark.parametrize(("least", "most", "can"), [(2, 8, 7), (2, 4, 4), (8, 9, 0)])
def test_what_can_never_fit_is_known_beforehand(least: int, most: int, can: int) -> None:
    job = Wanting("job", "ann", 0.0, least, most, kinds=("gpu",))
    assert largest(job, {"gpu": 7, "cpu": 100}) == can
    assert largest(replace(job, multiple=2), {"gpu": 7, "cpu": 100}) == can - (can - least) % 2 * (can > 0)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.1, 100), st.floats(0, 1), st.floats(0, 0.1))
def test_a_step_time_is_found_again_from_what_it_gives(divided: float, fixed: float, per_node: float) -> None:
    true = StepTime(divided, fixed, per_node)
    found = fit((nodes, true.on(nodes)) for nodes in (1, 2, 4, 8))
    for nodes in (1, 3, 8, 16):
        assert found.on(nodes) == pytest.approx(true.on(nodes), rel=1e-3)


def test_of_one_size_all_is_taken_to_be_divisible_and_nothing_is_negative() -> None:
    assert fit([(4, 1.0), (4, 3.0)]).on(8) == pytest.approx(1.0)
    worse = fit([(1, 1.0), (2, 1.5), (4, 2.0)])
    assert min(worse.divided_s, worse.fixed_s, worse.per_node_s) >= 0
    with pytest.raises(ValueError, match="no step"):
        fit([])


def test_a_larger_batch_is_worth_less_per_sample_when_gradients_agree() -> None:
    assert efficiency(1.0, variance=5.0, squared=1.0) == pytest.approx(1.0)
    assert efficiency(4.0, variance=0.0, squared=1.0) == pytest.approx(0.25)
    assert efficiency(4.0, variance=1e9, squared=1.0) == pytest.approx(1.0, abs=1e-6)
