"""What holds for detectors and classification whatever is said, and in whatever order."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import median

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_dr.detection.classify import classify
from ray_dr.detection.detectors import Detection
from ray_dr.detection.node_frozen import Habit
from ray_dr.detection.robust import median_of_others, quantile
from ray_dr.detection.storage import CHANCE, USUAL, _exceeds
from ray_dr.detection.straggler import RUN_LENGTH, _allowance, _limit
from ray_dr.model.signal import (
    Beacon,
    Closed,
    Exit,
    FaultKind,
    Finding,
    Formed,
    Member,
    Now,
    Peer,
    Raised,
    RayWord,
    Released,
    Report,
    Sample,
    StepDone,
    StoreSeen,
    Subject,
    WorkerPhase,
    Xid,
)

WORLD = 3
times = st.floats(0.0, 1e3, allow_nan=False)
values = st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=2, max_size=40)


def worker(rank: int) -> str:
    return f"n{rank}/0.0"


def life(seed: int, length: int) -> list[Sample]:
    """Anything that can be said, in any order, with time going on."""
    dice = random.Random(seed)
    at, samples = 0.0, [Formed(0.0, 1, tuple(Member(rank, worker(rank)) for rank in range(WORLD)))]
    for _ in range(length):
        at += dice.choice((0.0, 0.05, 0.25, 1.0, 5.0))
        node, rank = f"n{dice.randrange(WORLD + 1)}", dice.randrange(WORLD)
        phase = dice.choice(list(WorkerPhase))
        beacon = Beacon(rank, 1, dice.randrange(4), phase, dice.randrange(4), at - dice.random() * 20)
        samples.append(dice.choice((
            Report(at, node, at, (beacon,), (Peer(f"n{rank}", dice.random() * 4),), xids=(Xid(0, dice.choice((31, 79))),)),
            Report(at, node, at, exits=(Exit(worker(rank), "gone", dice.random() < 0.3),), stores=(StoreSeen("s", 1, 2),)),
            StepDone(at, rank, 1, dice.randrange(5), 1.0, 0.5, 2.0, 1.0, dice.random() < 0.8, dice.choice(("", "a", "b"))),
            Raised(at, worker(rank), 1, 3, "E: x", dice.random() < 0.5),
            Closed(at, node), RayWord(at, node, alive=dice.random() < 0.5), Released(at, node), Now(at), Now(at),
            Formed(at, dice.randrange(1, 3), tuple(Member(rank, worker(rank)) for rank in range(dice.randrange(WORLD + 1)))),
        )))  # fmt: skip
    return samples


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_the_same_samples_give_the_same_findings_and_a_diagnosis_leaves_none_out(seed: int) -> None:
    samples = life(seed, 120)
    one, other = Detection(), Detection()
    findings = [finding for sample in samples for finding in one.observe(sample)]
    assert findings == [finding for sample in samples for finding in other.observe(sample)]
    for finding in findings:
        assert finding.subjects
        assert finding.since <= finding.at
        assert finding.evidence
    for end in range(len(findings)):
        classify(findings[:end])  # never fails, whatever was found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_process_ends_once_and_a_withdrawal_follows_what_was_told(seed: int) -> None:
    detection = Detection()
    findings = [finding for sample in life(seed, 200) for finding in detection.observe(sample)]
    ended = Counter(finding.subjects[0].worker for finding in findings if finding.kind is FaultKind.PROCESS_GONE)
    assert all(count == 1 for count in ended.values())
    open_: Counter[tuple[str, tuple[Subject, ...]]] = Counter()
    for finding in findings:
        key = finding.detector, finding.subjects
        if finding.stage == "withdrawn":
            assert open_[key], f"withdrawn, but never told: {finding}"
            open_[key] = 0
        else:
            open_[key] += 1


@given(values, st.data())
def test_the_median_of_the_others_is_what_it_says(numbers: list[float], data: st.DataObject) -> None:
    ordered = sorted(numbers)
    at = data.draw(st.integers(0, len(ordered) - 1))
    assert median_of_others(ordered, at) == median(ordered[:at] + ordered[at + 1 :])


@given(values, st.floats(0.01, 1.0))
def test_a_quantile_is_one_of_the_values_that_enough_do_not_exceed(numbers: list[float], share: float) -> None:
    found = quantile(numbers, share)
    assert found in numbers
    assert sum(number <= found for number in numbers) >= share * len(numbers) - 1e-9


@given(st.lists(st.floats(0.0, 0.5), max_size=300), st.floats(0.0, 5.0), st.floats(0.0, 5.0))
def test_suspicion_grows_with_silence_and_is_never_less_than_nothing(habits: list[float], one: float, other: float) -> None:
    habit = Habit()
    for late_s in habits:
        habit.add(late_s)
    less, more = sorted((one, other))
    assert 0.0 <= habit.suspicion(less) <= habit.suspicion(more)


@given(st.integers(1, 60).flatmap(lambda tries: st.tuples(st.integers(0, tries), st.just(tries))))
def test_a_stores_failures_are_beyond_chance_only_where_the_exact_chance_is_smaller(case: tuple[int, int]) -> None:
    failed, tries = case
    exact = sum(math.comb(tries, k) * USUAL**k * (1 - USUAL) ** (tries - k) for k in range(failed, tries + 1))
    if _exceeds(failed, tries):
        assert exact <= CHANCE
    elif failed:
        assert exact > CHANCE / 1e3  # the bound gives away little


@given(st.floats(0.001, 3.0))
def test_the_cumulative_sums_limit_keeps_its_run_length(sigma: float) -> None:
    allowance = _allowance(sigma)
    limit = _limit(allowance)
    assume(limit > 1.0)
    exponent = 2 * allowance * (limit + 1.166)
    assert math.expm1(exponent) / (2 * allowance**2) >= 0.99 * RUN_LENGTH


subjects = st.integers(0, 5).map(lambda rank: Subject(f"n{rank // 2}", worker(rank), rank))
findings_ = st.builds(
    Finding,
    st.sampled_from(("a", "b")),
    st.sampled_from([kind for kind in FaultKind if kind is not FaultKind.PROGRAM_ERROR]),
    st.tuples(subjects),
    st.floats(10.0, 12.0),
    st.floats(9.0, 10.0),
    st.just("found"),
    st.sampled_from(("warning", "critical")),
    st.sampled_from(("suspected", "confirmed")),
    error=st.sampled_from(("", "E: x", "StoreFull: y")),
    step=st.just(3),
    shadow=st.booleans(),
)


def what(finding: Finding) -> tuple[object, ...]:
    """One thing found twice is one thing."""
    return finding.detector, finding.kind, finding.subjects, finding.error


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(findings_, max_size=8, unique_by=what))
def test_one_root_and_everything_else_has_its_place(findings: list[Finding]) -> None:
    diagnosis = classify(findings)
    acting = [finding for finding in findings if finding.stage == "confirmed" and not finding.shadow]
    assert (diagnosis is None) == (not acting)
    if diagnosis is None:
        return
    assert diagnosis.root in acting
    assert not any(finding.shadow or finding.stage == "suspected" for finding in diagnosis.besides)
    placed = [echo.finding for echo in diagnosis.aside] + list(diagnosis.besides)
    assert len(placed) == len({id(finding) for finding in placed}) <= len(findings) - 1
    assert set(diagnosis.root.subjects) <= set(diagnosis.subjects)
    again = classify(findings[::-1])
    assert again is not None
    assert (again.kind, again.root, set(again.subjects)) == (diagnosis.kind, diagnosis.root, set(diagnosis.subjects))
