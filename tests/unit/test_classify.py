"""What the findings of one moment come to: the cause, its echoes and why they are echoes, and what it means for the job."""

from __future__ import annotations

import dataclasses

import pytest

from ray_dr.cli.main import exit_status
from ray_dr.detection.classify import RULES, Diagnosis, classify, shown
from ray_dr.detection.detectors import Detection
from ray_dr.detection.taxonomy import FAULTS, Budget
from ray_dr.detection.xid import XIDS, XidRemedy
from ray_dr.errors import JobFailed
from ray_dr.model.signal import (
    Closed,
    Exit,
    FaultKind,
    Finding,
    Formed,
    Member,
    Notice,
    Raised,
    Released,
    Report,
    Sample,
    StoreSeen,
    Subject,
    Xid,
)

K = FaultKind
ECHO = "RuntimeError: [gloo/transport] Connection closed by peer"


def rank(number: int) -> Subject:
    return Subject(f"n{number // 2}", f"n{number // 2}/{number % 2}.0", number)


def found(kind: FaultKind, *subjects: Subject, at: float = 10.0, since: float | None = None, **more: object) -> Finding:
    evidence = f"{kind} of {', '.join(map(str, subjects))}"
    return Finding("test", kind, subjects, at, at if since is None else since, evidence, **more)  # type: ignore[arg-type]


def judged(*findings: Finding, past: tuple[tuple[str, int], ...] = ()) -> Diagnosis:
    diagnosis = classify(findings, past=past)
    assert diagnosis is not None
    return diagnosis


def aside(diagnosis: Diagnosis) -> set[tuple[FaultKind, str]]:
    return {(echo.finding.kind, ", ".join(map(str, echo.finding.subjects))) for echo in diagnosis.aside}


# ------------------------------------------------------------------------------------- from samples to a diagnosis, whole


def group() -> Formed:
    return Formed(0.0, 3, tuple(Member(number, rank(number).worker) for number in range(8)))


def diagnose(*samples: Sample, past: tuple[tuple[str, int], ...] = ()) -> Diagnosis:
    detection = Detection()
    findings = [finding for sample in (group(), *samples) for finding in detection.observe(sample)]
    return judged(*findings, past=past)


def raised(at: float, number: int, error: str, *, echo: bool = False, step: int = 40) -> Raised:
    return Raised(at, rank(number).worker, 3, step, error, echo)


def report(at: float, node: str, **news: object) -> Report:
    return Report(at, node, at, **news)  # type: ignore[arg-type]


def test_a_closed_connection_on_rank_3_because_rank_5_died_is_an_echo() -> None:
    ended = report(10.2, "n2", exits=(Exit("n2/1.0", "killed by signal 9"),))
    diagnosis = diagnose(raised(10.05, 3, ECHO, echo=True), raised(10.1, 4, ECHO, echo=True), ended)
    assert (diagnosis.kind, diagnosis.subjects) == (K.PROCESS_GONE, (rank(5),))
    assert aside(diagnosis) == {(K.COLLECTIVE_BROKEN, "rank 3"), (K.COLLECTIVE_BROKEN, "rank 4")}
    assert all("lost the connection" in echo.reason and "rank 5" in echo.reason for echo in diagnosis.aside)
    assert diagnosis.besides == ()


def test_a_node_takes_its_processes_with_it() -> None:
    samples = [
        report(9.0, "n2"), raised(10.0, 0, ECHO, echo=True), Closed(10.05, "n2"),
        report(10.1, "n2", exits=(Exit("n2/0.0", "socket closed"), Exit("n2/1.0", "socket closed"))),
    ]  # fmt: skip
    diagnosis = diagnose(*samples)
    assert (diagnosis.kind, diagnosis.subjects) == (K.NODE_GONE, (Subject("n2"),))
    assert aside(diagnosis) == {(K.COLLECTIVE_BROKEN, "rank 0"), (K.PROCESS_GONE, "rank 4"), (K.PROCESS_GONE, "rank 5")}
    assert (diagnosis.fault.budget, diagnosis.fault.charged, diagnosis.fault.resubmit) == (Budget.INFRASTRUCTURE, True, True)


def test_a_preempted_node_is_not_charged_even_minutes_after_its_notice() -> None:
    noticed = report(10.0, "n1", notices=(Notice("spot", 120.0),))
    only = diagnose(noticed)
    assert (only.kind, only.root.severity) == (K.PREEMPTION, "warning")
    gone = diagnose(noticed, raised(131.0, 0, ECHO, echo=True), Closed(131.1, "n1"))
    assert (gone.kind, gone.subjects, gone.fault.charged) == (K.PREEMPTION, (Subject("n1"),), False)
    assert aside(gone) == {(K.NODE_GONE, "node n1"), (K.COLLECTIVE_BROKEN, "rank 0")}


def test_a_node_that_goes_long_after_its_deadline_or_beside_it_is_charged() -> None:
    noticed = report(10.0, "n1", notices=(Notice("spot", 120.0),))
    assert diagnose(noticed, Closed(400.0, "n1")).kind is K.NODE_GONE
    other = diagnose(noticed, report(11.0, "n3"), Closed(60.0, "n3"))
    assert (other.kind, other.subjects) == (K.NODE_GONE, (Subject("n3"),))
    assert [finding.kind for finding in other.besides] == [K.PREEMPTION]


def test_memory_explains_the_end_of_its_process() -> None:
    killed = report(10.0, "n0", exits=(Exit("n0/1.0", "signal 9", oom=True),))
    diagnosis = diagnose(killed, raised(10.1, 6, ECHO, echo=True))
    assert (diagnosis.kind, diagnosis.subjects, diagnosis.fault.budget) == (K.OUT_OF_MEMORY, (rank(1),), Budget.PROGRAM)
    assert aside(diagnosis) == {(K.PROCESS_GONE, "rank 1"), (K.COLLECTIVE_BROKEN, "rank 6")}


def test_a_gpu_that_fell_off_the_bus_is_to_blame_for_what_its_processes_raise() -> None:
    lost = report(10.3, "n3", xids=(Xid(0, 79), Xid(0, 45)))
    diagnosis = diagnose(raised(10.0, 6, "RuntimeError: CUDA error: unspecified launch failure", step=40), lost)
    assert (diagnosis.kind, diagnosis.subjects) == (K.GPU_FAULT, (Subject("n3"),))
    assert aside(diagnosis) == {(K.EXCEPTION, "rank 6")}
    assert "fallen off the bus" in shown(diagnosis)


def test_the_programs_own_gpu_error_explains_a_process_that_ended_without_a_word() -> None:
    misuse, ended = report(10.0, "n3", xids=(Xid(0, 31),)), report(10.2, "n3", exits=(Exit("n3/0.0", "signal 6"),))
    assert diagnose(misuse, ended).kind is K.GPU_MISUSE
    error = raised(10.1, 6, "RuntimeError: CUDA error: an illegal memory access was encountered")
    told = diagnose(misuse, error, ended)
    assert (told.kind, aside(told)) == (K.EXCEPTION, {(K.GPU_MISUSE, "node n3"), (K.PROCESS_GONE, "rank 6")})


def test_a_store_in_trouble_explains_errors_of_stores_and_no_others() -> None:
    full = report(9.0, "n0", stores=(StoreSeen("disk", 0, 1, "no space left"),))
    store = diagnose(full, raised(10.0, 0, "StoreFull: jobs/x/part"))
    assert (store.kind, aside(store)) == (K.STORAGE, {(K.EXCEPTION, "rank 0")})
    own = diagnose(full, raised(10.0, 0, "ValueError: bad batch"))
    assert (own.kind, [finding.kind for finding in own.besides]) == (K.EXCEPTION, [K.STORAGE])


def test_what_the_host_ends_itself_is_no_incident() -> None:
    detection = Detection()
    samples = [group(), Released(9.0, "n2"), Released(9.0, "n2/0.0"), report(9.5, "n2", exits=(Exit("n2/0.0", "ended"),))]
    assert classify([finding for sample in samples for finding in detection.observe(sample)]) is None


# ------------------------------------------------------------------------------------------------- the program or the machine

ERROR = "ValueError: shape mismatch at #"


def test_the_same_exception_at_the_same_step_again_is_the_programs() -> None:
    first = diagnose(raised(10.0, 2, ERROR), raised(10.1, 5, ECHO, echo=True))
    assert (first.kind, first.fault.resubmit, first.subjects) == (K.EXCEPTION, True, (rank(2),))
    again = diagnose(raised(10.0, 6, ERROR), past=((ERROR, 40),))
    assert (again.kind, again.fault.resubmit, again.fault.budget) == (K.PROGRAM_ERROR, False, Budget.PROGRAM)
    assert "the program fails there" in again.reason


@pytest.mark.parametrize("past", [(ERROR, 41), (ERROR + "!", 40)])
def test_another_step_or_another_error_is_no_repetition(past: tuple[str, int]) -> None:
    assert diagnose(raised(10.0, 2, ERROR), past=(past,)).kind is K.EXCEPTION


def test_a_repeated_error_beside_a_lost_node_is_the_nodes() -> None:
    diagnosis = diagnose(report(9.0, "n1"), raised(10.0, 2, ERROR), Closed(10.2, "n1"), past=((ERROR, 40),))
    assert (diagnosis.kind, aside(diagnosis)) == (K.NODE_GONE, {(K.EXCEPTION, "rank 2")})


def test_a_broken_collective_is_never_the_programs_fault_and_running_out_of_memory_twice_is() -> None:
    assert diagnose(raised(10.0, 2, ECHO, echo=True), past=((ECHO, 40),)).kind is K.COLLECTIVE_BROKEN
    memory = "OutOfMemoryError: CUDA out of memory"
    assert diagnose(raised(10.0, 2, memory), past=((memory, 40),)).kind is K.PROGRAM_ERROR


def test_the_same_exception_on_every_rank_is_one_and_different_ones_are_not() -> None:
    everywhere = diagnose(*(raised(10.0 + number / 100, number, ERROR) for number in range(8)))
    assert (everywhere.kind, everywhere.subjects, len(everywhere.aside)) == (K.EXCEPTION, (rank(0),), 7)
    assert {echo.reason.partition(" (")[0] for echo in everywhere.aside} == {"the same error, on another rank"}
    two = diagnose(raised(10.0, 1, ERROR), raised(10.1, 2, "KeyError: 'x'"))
    assert (two.subjects, [finding.error for finding in two.besides]) == ((rank(1),), ["KeyError: 'x'"])


# --------------------------------------------------------------------------------------------------------- causes and echoes


@pytest.mark.parametrize(
    ("cause", "echoes"),
    [
        (found(K.NODE_FROZEN, Subject("n1"), at=11.5, since=10.0), [found(K.NODE_GONE, Subject("n1"), at=12.0)]),
        (found(K.NETWORK_CUT, Subject("n1"), at=12.5, since=10.0), [found(K.NODE_FROZEN, Subject("n1"), at=11.5, since=10.0)]),
        (found(K.PROCESS_GONE, rank(3)), [found(K.HANG, rank(3), at=15.0, since=10.0), found(K.COLLECTIVE_BROKEN, rank(0))]),
        (found(K.HANG, rank(3), at=15.0, since=10.0), [found(K.COLLECTIVE_BROKEN, rank(0), at=15.4)]),
        (found(K.CORRUPTION, rank(7)), [found(K.LOSS_SPIKE, rank(0), rank(1)), found(K.NON_FINITE, rank(0))]),
        (found(K.GPU_FAULT, Subject("n3")), [found(K.CORRUPTION, rank(7)), found(K.NON_FINITE, rank(6))]),
        (found(K.EXCEPTION, rank(2), error="E: x", step=4), [found(K.PROCESS_GONE, rank(2), at=10.3)]),
    ],
    ids=lambda value: str(value.kind) if isinstance(value, Finding) else None,
)
def test_the_cause_is_the_root_whatever_was_noticed_first(cause: Finding, echoes: list[Finding]) -> None:
    for order in ([cause, *echoes], [*echoes, cause]):
        diagnosis = judged(*order)
        assert diagnosis.root == cause
        assert {echo.finding.kind for echo in diagnosis.aside} == {echo.kind for echo in echoes}
        assert not diagnosis.besides


def test_an_echo_on_another_node_is_no_echo() -> None:
    diagnosis = judged(found(K.NODE_GONE, Subject("n1")), found(K.PROCESS_GONE, rank(0), at=10.5))
    assert diagnosis.root.kind is K.NODE_GONE
    assert [finding.kind for finding in diagnosis.besides] == [K.PROCESS_GONE]


def test_a_neighbour_on_the_same_node_is_no_echo_either() -> None:
    diagnosis = judged(found(K.OUT_OF_MEMORY, rank(2)), found(K.PROCESS_GONE, rank(3), at=10.5))
    assert diagnosis.root.kind is K.OUT_OF_MEMORY
    assert [finding.subjects for finding in diagnosis.besides] == [(rank(3),)]


def test_nodes_that_go_together_are_one_incident_with_both() -> None:
    diagnosis = judged(found(K.NODE_GONE, Subject("n1")), found(K.NODE_GONE, Subject("n2"), at=10.4))
    assert diagnosis.subjects == (Subject("n1"), Subject("n2"))
    assert diagnosis.besides == ()


def test_what_is_critical_comes_before_a_warning_that_was_there_first() -> None:
    slow = found(K.STRAGGLER, rank(1), at=5.0, severity="warning")
    diagnosis = judged(slow, found(K.NODE_GONE, Subject("n3"), at=300.0))
    assert diagnosis.root.kind is K.NODE_GONE


def test_an_incident_of_the_past_is_no_part_of_this_one() -> None:
    diagnosis = judged(found(K.NODE_GONE, Subject("n1")), found(K.COLLECTIVE_BROKEN, rank(0), at=300.0))
    assert (diagnosis.kind, diagnosis.aside) == (K.COLLECTIVE_BROKEN, ())
    assert "nobody is known to have ended" in diagnosis.reason


def test_suspicions_the_shadow_and_what_was_withdrawn_start_nothing() -> None:
    suspicion = found(K.HANG, rank(3), stage="suspected")
    shadow = found(K.STRAGGLER, rank(3), shadow=True)
    told = found(K.NODE_FROZEN, Subject("n1"))
    assert classify([suspicion, shadow, told, dataclasses.replace(told, at=13.0, stage="withdrawn")]) is None
    diagnosis = judged(suspicion, shadow, found(K.EXCEPTION, rank(0), error="E: x", step=1))
    assert diagnosis.kind is K.EXCEPTION
    assert {echo.reason for echo in diagnosis.aside} == {"a suspicion only", "on trial: in the shadow"}


def test_a_suspicion_that_was_confirmed_counts_once() -> None:
    suspicion = found(K.HANG, rank(3), stage="suspected")
    diagnosis = judged(suspicion, dataclasses.replace(suspicion, at=14.0, stage="confirmed"))
    assert (diagnosis.root.stage, diagnosis.aside) == ("confirmed", ())


def test_no_findings_are_no_incident() -> None:
    assert classify([]) is None


def test_a_diagnosis_reads_as_words() -> None:
    store = found(K.STORAGE, Subject("n0"), severity="warning")
    diagnosis = judged(found(K.GPU_FAULT, Subject("n2")), found(K.COLLECTIVE_BROKEN, rank(3)), store)
    assert shown(diagnosis).splitlines() == [
        "gpu_fault of node n2: gpu_fault of node n2",
        "  counts as a failure of the infrastructure; first: leave the node; reset its GPU, or have it replaced, before it "
        "is used again",
        "  set aside: collective_broken of rank 3: it lost the connection to those that ended (gpu_fault of node n2)",
        "  besides: storage of node n0",
    ]


# -------------------------------------------------------------------------------------------------------------- the taxonomy


def test_every_kind_of_failure_says_what_it_means() -> None:
    assert set(FAULTS) == set(FaultKind)
    assert [kind for kind, fault in FAULTS.items() if not fault.charged] == [K.PREEMPTION, K.STRAGGLER]
    assert [kind for kind, fault in FAULTS.items() if not fault.resubmit] == [K.PROGRAM_ERROR]


@pytest.mark.parametrize("kind", FaultKind)
def test_exit_codes_are_those_of_the_command_line(kind: FaultKind) -> None:
    assert FAULTS[kind].exit_code == exit_status(JobFailed("x", "y", resubmit=FAULTS[kind].resubmit))


def test_no_kind_of_failure_explains_itself_round_a_circle() -> None:
    explains = {kind: {effect for rule in RULES if kind in rule.cause for effect in rule.effect} for kind in FaultKind}
    explains[K.STORAGE] = explains[K.STORAGE] | {K.EXCEPTION}

    def reach(kind: FaultKind, seen: set[FaultKind]) -> set[FaultKind]:
        for effect in explains[kind] - seen:
            seen |= {effect} | reach(effect, seen | {effect})
        return seen

    assert [kind for kind in FaultKind if kind in reach(kind, set())] == []


def test_the_gpu_codes_that_training_meets_are_as_nvidia_has_them() -> None:
    remedies = {code: XIDS[code].remedy for code in (13, 31, 43, 45, 48, 63, 64, 74, 79, 92, 94, 95, 109, 119, 120, 140)}
    assert remedies == {
        13: XidRemedy.APPLICATION, 31: XidRemedy.APPLICATION, 43: XidRemedy.WATCH, 45: XidRemedy.WATCH,
        48: XidRemedy.RESET_GPU, 63: XidRemedy.WATCH, 64: XidRemedy.RESET_GPU, 74: XidRemedy.DRAIN,
        79: XidRemedy.REPLACE, 92: XidRemedy.WATCH, 94: XidRemedy.APPLICATION, 95: XidRemedy.RESET_GPU,
        109: XidRemedy.RESET_GPU, 119: XidRemedy.RESET_GPU, 120: XidRemedy.RESET_GPU, 140: XidRemedy.RESET_GPU,
    }  # fmt: skip
