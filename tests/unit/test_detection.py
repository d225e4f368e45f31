"""Each detector by itself: it finds what it should, names the right one, and is quiet otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest

from ray_dr.detection.detectors import DETECTORS, Detection
from ray_dr.detection.node_frozen import SEEN_BY_PEERS, SURE, Habit
from ray_dr.errors import ConfigError
from ray_dr.model import codec
from ray_dr.model.signal import (
    Beacon,
    Closed,
    Exit,
    FaultKind,
    Finding,
    Formed,
    Member,
    Notice,
    Now,
    Peer,
    Raised,
    RayWord,
    Released,
    Report,
    Sample,
    StepDone,
    StoreSeen,
    WorkerPhase,
    Xid,
)

K = FaultKind
CLOCK = 50_000.0
"""How far a node's own clock is from the host's in these tests."""


def group(world: int = 4, shards: int = 1) -> Formed:
    return Formed(0.0, 1, tuple(Member(rank, f"n{rank}/0.0", rank % shards) for rank in range(world)))


def feed(samples: Iterable[Sample], detection: Detection | None = None) -> list[Finding]:
    detection = detection or Detection()
    return [finding for sample in samples for finding in detection.observe(sample)]


def told(findings: Iterable[Finding]) -> list[tuple[FaultKind, str, str]]:
    return [(finding.kind, finding.stage, ", ".join(map(str, finding.subjects))) for finding in findings]


def report(at: float, node: str, **news: object) -> Report:
    return Report(at, node, at + CLOCK, **news)  # type: ignore[arg-type]


def beats(nodes: Iterable[str], begin: float, end: float) -> Iterable[Sample]:
    """Reports of the nodes each quarter of a second, and the time each tenth."""
    names = list(nodes)
    for tick in range(round(begin * 20), round(end * 20)):
        at = tick / 20
        if tick % 5 == 0:
            yield from (report(at, name) for name in names)
        if tick % 2 == 0:
            yield Now(at)


# ----------------------------------------------------------------------------------------------- processes and exceptions


def test_a_process_that_ends_is_found_once_with_its_rank() -> None:
    ended = report(5.0, "n2", exits=(Exit("n2/0.0", "killed by signal 9"),))
    found = feed([group(), ended, replace(ended, at=5.3)])
    assert told(found) == [(K.PROCESS_GONE, "confirmed", "rank 2")]
    assert "signal 9" in found[0].evidence


def test_a_process_that_the_host_ends_itself_is_no_finding() -> None:
    assert feed([group(), Released(4.0, "n2/0.0"), report(5.0, "n2", exits=(Exit("n2/0.0", "signal 9"),))]) == []


def test_an_idle_worker_that_ends_has_no_rank() -> None:
    assert told(feed([group(), report(5.0, "n2", exits=(Exit("n2/7.3", "exit code 1"),))])) == [
        (K.PROCESS_GONE, "confirmed", "worker n2/7.3")
    ]


def test_memory_names_the_killed_and_the_one_that_raised() -> None:
    killed = report(5.0, "n1", exits=(Exit("n1/0.0", "signal 9", oom=True),))
    raised = Raised(6.0, "n3/0.0", 1, 40, "OutOfMemoryError: CUDA out of memory. Tried to allocate # GiB", False)
    assert told(feed([group(), killed, raised])) == [
        (K.PROCESS_GONE, "confirmed", "rank 1"),
        (K.OUT_OF_MEMORY, "confirmed", "rank 1"),
        (K.OUT_OF_MEMORY, "confirmed", "rank 3"),
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("ValueError: no", K.EXCEPTION),
        ("MemoryError: ", K.OUT_OF_MEMORY),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", K.OUT_OF_MEMORY),
        ("KeyError: 'MemoryError'", K.EXCEPTION),
    ],
)
def test_an_exception_is_a_finding_by_its_type(error: str, kind: FaultKind) -> None:
    found = feed([group(), Raised(6.0, "n3/0.0", 1, 40, error, False)])
    assert told(found) == [(kind, "confirmed", "rank 3")]
    assert (found[0].error, found[0].step) == (error, 40)


def test_a_broken_collective_is_told_from_an_exception() -> None:
    assert told(feed([group(), Raised(6.0, "n3/0.0", 1, 40, "DistBackendError: closed", True)])) == [
        (K.COLLECTIVE_BROKEN, "confirmed", "rank 3")
    ]


# ------------------------------------------------------------------------------------------------------------------ nodes


def test_a_closed_connection_and_rays_word_are_one_end() -> None:
    samples = [report(1.0, "n1"), Closed(2.0, "n1"), RayWord(20.0, "n1", alive=False), Closed(21.0, "n1")]
    assert told(feed(samples)) == [(K.NODE_GONE, "confirmed", "node n1")]


def test_a_node_that_came_back_can_go_again() -> None:
    assert len(feed([report(1.0, "n1"), Closed(2.0, "n1"), report(3.0, "n1"), Closed(4.0, "n1")])) == 2


def test_a_node_given_back_and_one_never_heard_of_are_no_finding() -> None:
    assert feed([report(1.0, "n1"), Released(2.0, "n1"), Closed(2.1, "n1"), RayWord(3.0, "other", alive=False)]) == []


def silent(until: float, *, peers: tuple[Peer, ...] = (), late_s: float = 0.0) -> list[Finding]:
    """n0 reports up to 20 s, now and then `late_s` late, and then no more; n1 goes on."""
    samples: list[Sample] = [Now(0.0)]
    due = 0.0
    for beat in range(round(until * 4)):
        at = beat / 4
        samples.append(report(at, "n1", peers=tuple(replace(peer, age_s=peer.age_s + at - 20.0) for peer in peers)))
        while due <= min(at, 20.0):
            samples.append(report(at, "n0"))
            due += 0.25 + (late_s if round(due * 4) % 10 == 0 else 0.0)
        samples += [Now(at + 0.1), Now(at + 0.2)]
    return feed(samples)


def test_a_silent_node_is_frozen_within_two_seconds() -> None:
    found = silent(24.0)
    assert told(found) == [(K.NODE_FROZEN, "confirmed", "node n0")]
    assert 21.0 < found[0].at <= 22.0
    assert found[0].since == pytest.approx(20.0, abs=0.3)


def test_with_peers_that_hear_nothing_either_it_takes_less() -> None:
    alone, witnessed = silent(24.0)[0].at, silent(24.0, peers=(Peer("n0", 0.1),))[0]
    assert witnessed.at < alone
    assert "1 peers hear nothing" in witnessed.evidence


def test_a_node_that_is_often_late_is_given_more_time() -> None:
    assert silent(40.0, late_s=0.5)[0].at > silent(40.0)[0].at + 0.3


def test_rare_but_long_delays_are_remembered_as_what_they_are() -> None:
    habit = Habit()
    for beat in range(256):
        habit.add(0.9 if beat % 20 == 0 else 0.0)
    assert habit.suspicion(1.7) < SEEN_BY_PEERS
    assert habit.suspicion(2.5) > SURE


def test_a_host_that_slept_blames_nobody() -> None:
    samples = [*beats(["n0", "n1"], 0.0, 20.0), Now(35.0), Now(35.1), *beats(["n0", "n1"], 35.2, 40.0)]
    assert feed(samples) == []


def test_when_all_nodes_are_silent_at_once_it_may_be_the_heads_own_line() -> None:
    samples = [*beats(["n0", "n1"], 0.0, 10.0), *beats([], 10.0, 15.0)]
    found = feed(samples)
    assert {stage for _, stage, _ in told(found)} == {"suspected"}
    assert all("the head's own line" in finding.evidence for finding in found)
    one_speaks = feed([*samples, *beats(["n1"], 15.0, 16.0)])[len(found) :]
    assert sorted((stage, named) for _, stage, named in told(one_speaks)) == [("confirmed", "node n0"), ("withdrawn", "node n1")]


def test_a_node_that_speaks_again_is_withdrawn() -> None:
    samples = [*beats(["n0"], 0.0, 10.0), *beats([], 10.0, 13.0), *beats(["n0"], 13.0, 15.0)]
    assert [stage for _, stage, _ in told(feed(samples))] == ["confirmed", "withdrawn"]


# ---------------------------------------------------------------------------------------------------------------- network

NODES = ("n0", "n1", "n2", "n3", "n4")


def pings(ages: dict[tuple[str, str], float], seconds: float, *, begin: float = 10.0, mute: str = "") -> list[Sample]:
    """Each node asks all others; `ages` begins with these ages, which grow, all other lines answer."""
    samples: list[Sample] = []
    for beat in range(round(seconds * 4)):
        at = begin + beat / 4
        for one in NODES:
            grown = {pair: age + beat / 4 for pair, age in ages.items()}
            peers = tuple(Peer(other, grown.get((one, other), 0.2)) for other in NODES if other != one)
            if one != mute:
                samples.append(report(at, one, peers=peers))
        samples += [Now(at + 0.1), Now(at + 0.2)]
    return samples


def both(one: str, others: Iterable[str]) -> dict[tuple[str, str], float]:
    return {pair: 0.2 for other in others for pair in ((one, other), (other, one))}


@pytest.mark.parametrize(
    ("cut", "named"),
    [
        (both("n2", ("n0", "n1", "n3", "n4")), "node n2"),
        (both("n0", ("n1", "n2", "n3")) | both("n4", ("n1", "n2", "n3")), "node n0, node n4"),
        (both("n1", ("n3",)), "node n1, node n3"),
        ({("n1", "n3"): 0.2}, "node n1, node n3"),
    ],
    ids=["one node", "an island of two", "one line", "one direction"],
)
def test_a_cut_between_peers_names_the_smaller_side(cut: dict[tuple[str, str], float], named: str) -> None:
    found = feed([*pings({}, 5.0), *pings(cut, 4.0, begin=15.0), *pings({}, 3.0, begin=19.0)])
    assert told(found) == [(K.NETWORK_CUT, "confirmed", named), (K.NETWORK_CUT, "withdrawn", named)]
    assert found[0].at <= 15.0 + 3.0


def test_of_two_nodes_nobody_can_say_which_is_cut_off() -> None:
    samples: list[Sample] = []
    for beat in range(16):
        at = 10 + beat / 4
        samples += [report(at, "a", peers=(Peer("b", 0.2 + beat / 4),)), report(at, "b", peers=(Peer("a", 0.2 + beat / 4),))]
        samples.append(Now(at + 0.1))
    assert told(feed(samples)) == [(K.NETWORK_CUT, "confirmed", "node a, node b")]


def test_a_node_that_peers_hear_is_cut_off_from_the_head_and_not_frozen() -> None:
    found = feed([*pings({}, 5.0), *pings({}, 4.0, begin=15.0, mute="n3")])
    assert told(found) == [(K.NETWORK_CUT, "confirmed", "node n3")]
    assert "answers 4 peers" in found[0].evidence


def test_a_node_that_froze_just_after_a_late_answer_is_found_all_the_same() -> None:
    """Its report was late when it froze, so a peer had heard it after the head: that acquits it for a moment only."""
    samples = [*beats(["n0", "n2"], 0.0, 20.0)]
    for beat in range(20):
        at = 20.0 + beat / 4
        answered_s = max(0.1, at - 20.6)
        samples += [report(at, "n2", peers=(Peer("n0", answered_s),)), Now(at + 0.1), Now(at + 0.2)]
    found = feed(samples)
    assert told(found) == [(K.NODE_FROZEN, "confirmed", "node n0")]
    assert found[0].at < 22.5


def test_a_frozen_node_is_not_taken_for_a_cut_neither_before_nor_when_it_thaws() -> None:
    stuck = both("n3", ("n0", "n1", "n2", "n4"))
    samples = [*pings({}, 5.0), *pings(stuck, 6.0, begin=15.0, mute="n3")]
    thawed = {pair: age + 6.0 for pair, age in stuck.items()}
    samples += [*pings(thawed, 0.5, begin=21.0), *pings({}, 5.0, begin=21.5)]
    assert told(feed(samples)) == [(K.NODE_FROZEN, "confirmed", "node n3"), (K.NODE_FROZEN, "withdrawn", "node n3")]


# ------------------------------------------------------------------------------------------------------------------- hang


def beacon(rank: int, step: int, phase: WorkerPhase, collective: int, since: float, *, stopped: bool = False) -> Beacon:
    return Beacon(rank, 1, step, phase, collective, CLOCK + since, stopped)


def trained(steps: int = 120, took_s: float = 0.5, world: int = 4) -> list[Sample]:
    """A group that has done some steps of `took_s`, without hearing of anything strange."""
    samples: list[Sample] = [group(world)]
    for step in range(steps):
        at = step * took_s
        samples += [report(at, f"n{rank}", beacons=(beacon(rank, step, WorkerPhase.COMPUTE, step, at),)) for rank in range(world)]
        samples += [StepDone(at + took_s, rank, 1, step + 1, took_s, took_s / 2) for rank in range(world)]
        samples.append(Now(at + took_s))
    return samples


def stand(places: dict[int, tuple[int, WorkerPhase, int]], seconds: float, begin: float = 60.0, **marks: bool) -> list[Sample]:
    """Ranks stay where they are, entered at `begin`."""
    samples: list[Sample] = []
    for beat in range(round(seconds * 4)):
        at = begin + beat / 4
        for rank, (step, phase, collective) in places.items():
            stopped = marks.get(f"rank{rank}", False)
            samples.append(report(at, f"n{rank}", beacons=(beacon(rank, step, phase, collective, begin, stopped=stopped),)))
        samples.append(Now(at + 0.2))
    return samples


IN, OUT = WorkerPhase.COLLECTIVE, WorkerPhase.COMPUTE


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ({0: (120, IN, 121), 1: (120, OUT, 120), 2: (120, IN, 121), 3: (120, IN, 121)}, "rank 1"),
        ({0: (120, IN, 121), 1: (120, IN, 121), 2: (120, OUT, 120), 3: (120, OUT, 120)}, "rank 2, rank 3"),
        ({0: (121, IN, 122), 1: (121, OUT, 121), 2: (120, WorkerPhase.LOAD, 121), 3: (121, IN, 122)}, "rank 2"),
        ({0: (120, IN, 122), 1: (120, IN, 121), 2: (120, IN, 122), 3: (120, OUT, 120)}, "rank 3"),
        ({0: (120, IN, 121), 1: (120, IN, 121), 2: (120, IN, 121), 3: (120, IN, 121)}, "rank 0, rank 1, rank 2, rank 3"),
        ({0: (120, IN, 121), 1: (120, IN, 121), 2: (120, IN, 121), 3: (120, WorkerPhase.DONE, 120)}, "rank 3"),
    ],
    ids=["one behind", "two behind", "a step behind", "a chain of waits", "the network", "one returned early"],
)
def test_the_rank_that_is_behind_hangs_and_not_those_that_wait(
    places: dict[int, tuple[int, WorkerPhase, int]], named: str
) -> None:
    found = feed([*trained(), *stand(places, 8.0)])
    assert told(found) == [(K.HANG, "confirmed", named)]
    assert found[0].at <= 65.0


def test_of_those_in_one_collective_the_stopped_process_hangs() -> None:
    places = dict.fromkeys(range(4), (120, IN, 121))
    assert told(feed([*trained(), *stand(places, 8.0, rank2=True)])) == [(K.HANG, "confirmed", "rank 2")]


def test_a_long_step_of_a_job_with_long_steps_is_no_hang_and_one_that_moves_on_is_withdrawn() -> None:
    behind = {0: (120, IN, 121), 1: (120, OUT, 120), 2: (120, IN, 121), 3: (120, IN, 121)}
    assert feed([*trained(took_s=4.0), *stand(behind, 9.0, begin=480.0)]) == []
    on = dict.fromkeys(range(4), (121, OUT, 121))
    found = feed([*trained(took_s=4.0), *stand(behind, 14.0, begin=480.0), *stand(on, 2.0, begin=495.0)])
    assert [stage for _, stage, _ in told(found)] == ["confirmed", "withdrawn"]


@pytest.mark.parametrize(
    ("phase", "seconds", "hangs"),
    [
        (WorkerPhase.EVAL, 500.0, False),
        (WorkerPhase.EVAL, 610.0, True),
        (WorkerPhase.SAVE, 500.0, False),
        (WorkerPhase.COMPILE, 500.0, False),
        (WorkerPhase.SETUP, 2000.0, False),
        (WorkerPhase.DONE, 2000.0, False),
    ],
)
def test_what_is_outside_of_steps_has_limits_of_its_own(phase: WorkerPhase, seconds: float, hangs: bool) -> None:
    found = feed([*trained(), *stand(dict.fromkeys(range(4), (120, phase, 120)), seconds)])
    assert bool(found) == hangs


def test_an_evaluation_that_was_seen_to_end_sets_the_next_ones_limit() -> None:
    samples = trained()
    for number in range(10):
        samples += stand(dict.fromkeys(range(4), (120 + number, WorkerPhase.EVAL, 120)), 4.0, begin=60.0 + number * 5)
        samples += stand(dict.fromkeys(range(4), (120 + number, OUT, 120)), 1.0, begin=64.0 + number * 5)
    found = feed([*samples, *stand(dict.fromkeys(range(4), (130, WorkerPhase.EVAL, 120)), 60.0, begin=110.0)])
    assert told(found)[0][:2] == (K.HANG, "confirmed")
    assert 110.0 + 24.0 < found[0].at < 110.0 + 32.0  # six times the longest of ten, which took 4 s


def test_a_first_step_may_take_minutes() -> None:
    assert feed([group(), *stand(dict.fromkeys(range(4), (0, OUT, 0)), 300.0, begin=0.0)]) == []


def test_so_may_the_first_step_of_the_next_attempt_whatever_was_learned() -> None:
    again = Formed(60.0, 2, group().members)
    first = [replace(beacon(rank, 100, OUT, 0, 61.0), attempt=2) for rank in range(4)]
    waits: list[Sample] = []
    for beat in range(400):
        at = 61.0 + beat / 4
        waits += [*(report(at, f"n{rank}", beacons=(first[rank],)) for rank in range(4)), Now(at + 0.2)]
    assert feed([*trained(), again, *waits]) == []


def test_those_that_waited_for_a_slow_rank_do_not_hang_when_it_has_just_moved_on() -> None:
    slow = {0: (120, WorkerPhase.EVAL, 120)} | dict.fromkeys(range(1, 4), (120, IN, 121))
    samples = [*trained(), *stand(slow, 100.0)]
    samples += [report(160.0, "n0", beacons=(beacon(0, 121, OUT, 123, 159.9),)), Now(160.3)]
    assert feed(samples) == []


def test_a_silent_agents_ranks_do_not_hang() -> None:
    """Of a frozen node nobody knows where its ranks are: NodeFrozen speaks of it, and those that wait are not to blame."""
    waiting = {0: (120, IN, 121), 1: (120, IN, 121), 2: (120, IN, 121)}
    found = feed([*trained(), *stand(waiting, 20.0)])
    assert {finding.kind for finding in found} == {K.NODE_FROZEN}


# -------------------------------------------------------------------------------------------------------- what steps show


def steps(count: int, first: int = 1, world: int = 4, *, took_s: float = 1.0, **values: object) -> list[Sample]:
    """Steps of which every rank says the same, but for what is given as a function of (step, rank)."""
    samples: list[Sample] = []
    for step in range(first, first + count):
        for rank in range(world):
            said = {name: value(step, rank) if callable(value) else value for name, value in values.items()}
            samples.append(StepDone(step * took_s, rank, 1, step, took_s, said.pop("arrived_s", took_s / 2), **said))
    return samples


def test_a_non_finite_loss_is_found_at_its_step_once_per_row() -> None:
    bad = steps(10, finite=lambda step, rank: not (rank == 2 and step in (4, 5, 6, 8)))
    found = feed([group(), *bad])
    assert told(found) == [(K.NON_FINITE, "confirmed", "rank 2")] * 2
    assert [finding.step for finding in found] == [4, 8]


def loss_course(spike: range, factor: float) -> list[Finding]:
    def loss(step: int, rank: int) -> float:
        return 3.0 * (1 + 0.02 * math.sin(step * 1.7 + rank)) * (factor if step in spike else 1.0)

    return feed([group(), *steps(300, loss=loss)])


def test_a_spike_that_comes_back_is_suspected_and_withdrawn() -> None:
    found = loss_course(range(200, 210), 2.5)
    assert [(finding.stage, finding.step) for finding in found] == [("suspected", 202), ("withdrawn", 214)]


def test_a_loss_that_stays_high_is_confirmed_after_twenty_steps() -> None:
    found = loss_course(range(200, 300), 2.5)
    assert [(finding.stage, finding.step) for finding in found] == [("suspected", 202), ("confirmed", 222)]
    assert found[1].since == 200.0


@pytest.mark.parametrize(("spike", "factor"), [(range(200, 202), 50.0), (range(200, 300), 1.2), (range(200, 300), 0.2)])
def test_two_wild_steps_a_little_more_and_any_less_are_no_spike(spike: range, factor: float) -> None:
    assert loss_course(spike, factor) == []


@pytest.mark.parametrize(
    ("world", "shards", "wrong", "stage", "named"),
    [
        (4, 1, {2}, "confirmed", "rank 2"),
        (5, 1, {1, 3}, "confirmed", "rank 1, rank 3"),
        (2, 1, {1}, "suspected", "rank 0, rank 1"),
        (4, 1, {0, 1}, "suspected", "rank 0, rank 1, rank 2, rank 3"),
        (6, 2, {5}, "confirmed", "rank 5"),
    ],
)
def test_differing_parameters_name_the_minority_or_everybody(
    world: int, shards: int, wrong: set[int], stage: str, named: str
) -> None:
    def digest(step: int, rank: int) -> str:
        return f"{step}/{rank % shards}{'!' if rank in wrong and step >= 4 else ''}" if step % 2 == 0 else ""

    found = feed([group(world, shards), *steps(10, world=world, digest=digest)])
    assert told(found) == [(K.CORRUPTION, stage, named)]
    assert found[0].step == 4
    assert ("replay" in found[0].evidence) == (stage == "suspected")


def test_shards_of_their_own_have_nothing_to_compare() -> None:
    assert feed([group(4, 4), *steps(10, digest=lambda step, rank: f"{step}/{rank}")]) == []


def arrivals(slow: float, until: int, world: int = 4) -> list[Finding]:
    def arrived(step: int, rank: int) -> float:
        jitter = 0.01 * math.sin(step * 2.3 + rank * 1.9)
        return 0.6 + jitter + (slow if rank == world - 1 and 100 <= step < until else 0.0) + (0.2 if step % 7 == 0 else 0.0)

    return feed([group(world), *steps(400, world=world, arrived_s=arrived)])


@pytest.mark.parametrize("slow", [0.3, 0.05])
@pytest.mark.parametrize("world", [2, 4, 9])
def test_a_rank_that_arrives_late_is_a_straggler_whoever_waits(slow: float, world: int) -> None:
    found = arrivals(slow, 400, world)
    assert told(found) == [(K.STRAGGLER, "confirmed", f"rank {world - 1}")]
    assert found[0].severity == "warning"
    assert found[0].step is not None
    assert found[0].step < 260


def test_a_rank_that_was_slow_for_a_moment_is_none_and_one_that_recovers_is_withdrawn() -> None:
    assert arrivals(0.5, 130) == []
    assert [stage for _, stage, _ in told(arrivals(0.3, 220))] == ["confirmed", "withdrawn"]


# ------------------------------------------------------------------------------------------------- notices, stores and GPUs


def test_a_notice_is_told_once_and_again_when_the_deadline_comes_nearer() -> None:
    def notice(at: float, left_s: float) -> Report:
        return report(at, "n1", notices=(Notice("spot", left_s),))

    found = feed([notice(10.0, 120.0), notice(11.0, 119.0), notice(12.0, 118.4), notice(13.0, 30.0)])
    assert told(found) == [(K.PREEMPTION, "confirmed", "node n1")] * 2
    assert [finding.numbers["left_s"] for finding in found] == [120.0, 30.0]


def stores(*seen: StoreSeen) -> list[Finding]:
    return feed([report(10.0 + number, "n1", stores=(one,)) for number, one in enumerate(seen)])


def test_a_full_store_counts_at_once_and_is_withdrawn_when_it_takes_again() -> None:
    full = StoreSeen("disk", 0, 1, "StoreFull: no space left")
    found = stores(StoreSeen("disk", 3), full, full, StoreSeen("disk", 1))
    assert [stage for _, stage, _ in told(found)] == ["confirmed", "withdrawn"]
    assert "no space left" in found[0].evidence
    assert found[0].severity == "warning"


def test_a_store_that_is_away_counts_after_nine_tries_and_a_throttling_one_never() -> None:
    away = [StoreSeen("store", 20)] + [StoreSeen("store", 0, 1)] * 30
    assert told(stores(*away)) == [(K.STORAGE, "confirmed", "node n1")]
    assert told(stores(*away[1:9])) == []
    assert told(stores(*away[1:10])) == [(K.STORAGE, "confirmed", "node n1")]
    assert stores(*[StoreSeen("store", 8, 1)] * 300) == []
    assert stores(*[StoreSeen("store", 99, 1)] * 300) == []


def test_a_request_hangs_when_it_takes_far_longer_than_any_before() -> None:
    ages = [float(second) for second in range(60)]
    usual = [StoreSeen("store", 1, oldest_s=age) for age in (0.5, 2.0, 0.1, 1.0, 0.2)]
    assert told(stores(*usual, *(StoreSeen("store", oldest_s=age) for age in ages))) == [(K.STORAGE, "confirmed", "node n1")]
    slow = [StoreSeen("store", 1, oldest_s=age) for age in (25.0, 0.1)]
    assert stores(*slow, *(StoreSeen("store", oldest_s=age) for age in ages)) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (79, [(K.GPU_FAULT, "critical")]),
        (48, [(K.GPU_FAULT, "critical")]),
        (74, [(K.GPU_FAULT, "critical")]),
        (31, [(K.GPU_MISUSE, "warning")]),
        (63, []),
        (45, []),
        (9999, [(K.GPU_MISUSE, "warning")]),
    ],
)
def test_a_gpus_code_is_told_by_nvidias_table(code: int, expected: list[tuple[FaultKind, str]]) -> None:
    samples = [report(10.0 + second, "n1", xids=(Xid(3, code),)) for second in range(5)]
    found = feed(samples)
    assert [(finding.kind, finding.severity) for finding in found] == expected
    assert all(f"Xid {code}" in finding.evidence and "GPU 3" in finding.evidence for finding in found)


# ----------------------------------------------------------------------------------------------------------- all together


def test_every_detector_says_its_budget_of_false_alarms() -> None:
    missing = [detector.__name__ for detector in DETECTORS if "False alarms:" not in (detector.__doc__ or "")]
    assert not missing
    assert len({detector.name for detector in DETECTORS}) == len(DETECTORS)


def test_the_shadow_marks_what_is_on_trial_and_nothing_else() -> None:
    samples = [group(), report(5.0, "n2", exits=(Exit("n2/0.0", "signal 9"),)), Closed(6.0, "n2")]
    found = feed(samples, Detection(shadow=("process_gone",)))
    assert [(finding.kind, finding.shadow) for finding in found] == [(K.PROCESS_GONE, True), (K.NODE_GONE, False)]
    with pytest.raises(ConfigError, match=r"no detector is named 'proces_gone' \(one of process_gone, "):
        Detection(shadow=("proces_gone",))


def test_a_step_counts_once_every_rank_has_done_it_and_a_lost_one_never() -> None:
    samples = [sample for sample in steps(200, finite=False) if not (sample.rank == 1 and sample.step < 150)]  # type: ignore[union-attr]
    found = feed([group(), *samples])
    assert [finding.step for finding in found] == [150]


def test_what_was_said_of_another_attempt_is_not_heard() -> None:
    late = [replace(sample, attempt=0) for sample in steps(5, finite=False)]  # type: ignore[type-var]
    assert feed([group(), *late]) == []


def test_samples_and_findings_survive_json() -> None:
    said = report(5.0, "n2", exits=(Exit("n2/0.0", "signal 9"),), beacons=(beacon(2, 7, IN, 8, 4.0),), peers=(Peer("n1", 0.1),))
    assert codec.from_json(Report, codec.to_json(said)) == said
    (finding,) = feed([group(), said])
    assert codec.from_json(Finding, codec.to_json(finding)) == finding
