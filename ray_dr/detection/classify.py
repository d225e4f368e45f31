"""From the findings of one moment to one diagnosis: the root cause, and everything else set aside with the reason why.

A finding is an echo when another one explains it. What explains what is a table (`RULES`): by kind, and by where: a node that
is gone explains the end of the processes on it, and a broken collective anywhere. Order in time decides little, as an echo
is often noticed first (a closed connection within milliseconds, the frozen node behind it after a second and a half): an
explanation must only have begun before its effect was found, give or take `SLACK_S`. What nothing explains is a root. The
root is the critical one that began first; several lost at once become one incident with several subjects.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from ray_dr.detection.taxonomy import FAULTS, Fault
from ray_dr.model.signal import FaultKind, Finding, Subject

SLACK_S = 5.0
"""Causes and effects are noticed by different ways; within this their order says nothing."""
AFTER_DEADLINE_S = 120.0
"""A node goes some time after its deadline."""
STORE_ERRORS = re.compile(r"^(Store\w+|AccessDenied|CopiesAway|ObjectTooShort|BrokenPromise): |No space left on device|Errno 28")

Where = Literal["worker", "node", "anywhere"]
K = FaultKind
LOST = (K.NODE_GONE, K.NODE_FROZEN, K.NETWORK_CUT)
ENDS = (*LOST, K.GPU_FAULT, K.OUT_OF_MEMORY, K.PROCESS_GONE, K.EXCEPTION)


@dataclass(frozen=True, slots=True)
class Rule:
    """`cause` explains `effect` on the same worker, on the same node, or anywhere. No cycles."""

    cause: tuple[FaultKind, ...]
    effect: tuple[FaultKind, ...]
    where: Where
    why: str


RULES = (
    Rule((K.PREEMPTION,), (*LOST, K.PROCESS_GONE), "node", "the node was to be taken away"),
    Rule((K.PREFLIGHT,), (*LOST, K.PROCESS_GONE, K.STRAGGLER), "node", "the node was found bad when it came"),
    Rule((K.NETWORK_CUT,), (K.NODE_FROZEN, K.NODE_GONE), "node", "the node is cut off, and others hear it"),
    Rule((K.NODE_FROZEN,), (K.NODE_GONE,), "node", "the node had frozen before"),
    Rule(LOST, (K.PROCESS_GONE, K.EXCEPTION, K.STORAGE), "node", "its node is lost"),
    Rule(
        (K.GPU_FAULT,), (K.PROCESS_GONE, K.EXCEPTION, K.NON_FINITE, K.CORRUPTION, K.GPU_MISUSE), "node",
        "a GPU of its node is at fault",
    ),
    Rule((K.OUT_OF_MEMORY,), (K.PROCESS_GONE, K.EXCEPTION), "worker", "it ran out of memory"),
    Rule((K.EXCEPTION,), (K.PROCESS_GONE,), "worker", "it ended after its exception"),
    Rule((K.EXCEPTION, K.OUT_OF_MEMORY), (K.GPU_MISUSE,), "node", "the kernel's word of the same error"),
    Rule((K.GPU_MISUSE,), (K.PROCESS_GONE,), "node", "the GPU's driver ended it"),
    Rule((K.CORRUPTION,), (K.NON_FINITE, K.LOSS_SPIKE), "anywhere", "wrong parameters spread"),
    Rule((K.NON_FINITE,), (K.LOSS_SPIKE,), "anywhere", "the step was not finite"),
    Rule((*ENDS, K.PREEMPTION, K.HANG), (K.COLLECTIVE_BROKEN,), "anywhere", "it lost the connection to those that ended"),
    Rule(ENDS, (K.HANG, K.STRAGGLER), "anywhere", "it is waited for, or waits, because others ended"),
    Rule((K.HANG,), (K.STRAGGLER,), "anywhere", "nobody got on"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SetAside:
    """A finding that is no cause, and why."""

    finding: Finding
    reason: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One incident, understood as far as its findings go.

    kind        of the root cause: the root's own, or PROGRAM_ERROR
    subjects    whom it struck; more than one when several were struck alike, or nobody can tell which
    since       when it began, as far as known (the host's monotonic seconds)
    aside       echoes, and findings in the shadow
    besides     other causes, unexplained by this one: they may need a diagnosis of their own once this is over
    reason      why this is the cause, in words
    """

    kind: FaultKind
    subjects: tuple[Subject, ...]
    since: float
    root: Finding
    aside: tuple[SetAside, ...]
    besides: tuple[Finding, ...]
    reason: str

    @property
    def fault(self) -> Fault:
        """What this means for the job: budget, resubmission, exit status, first remedy."""
        return FAULTS[self.kind]


def classify(findings: Sequence[Finding], *, past: Collection[tuple[str, int]] = ()) -> Diagnosis | None:
    """The incident behind the findings; None when none of them is confirmed and may be acted on.

    findings   of the last minutes, in the order they were found; those withdrawn since don't count, nor does what was
               over long before the newest critical one
    past       normalised errors and their steps, of incidents before this one: the same error at the same step
               again is the program's
    """
    current = _current(findings)
    acting = [finding for finding in current if finding.stage == "confirmed" and not finding.shadow]
    if not acting:
        return None
    explained = {id(effect): why for effect in acting if (why := _explanation(effect, acting)) is not None}
    roots = [finding for finding in acting if id(finding) not in explained]
    root = min(roots, key=_order)
    same = [other for other in roots if other.kind is root.kind and _like(root, other)]
    besides = tuple(other for other in roots if other not in same)
    aside = [SetAside(finding, explained[id(finding)]) for finding in acting if id(finding) in explained]
    aside += [
        SetAside(finding, "on trial: in the shadow" if finding.shadow else "a suspicion only")
        for finding in current if finding not in acting
    ]  # fmt: skip
    kind, reason = _judge(root, past)
    subjects = tuple(dict.fromkeys(subject for finding in same for subject in finding.subjects))
    return Diagnosis(kind, subjects, min(finding.since for finding in same), root, tuple(aside), besides, reason)


def _current(findings: Sequence[Finding]) -> list[Finding]:
    """What stands: not withdrawn, a suspicion only where it was not confirmed, and of the time of the newest critical one."""
    standing: dict[tuple[str, FaultKind, tuple[Subject, ...], str], Finding] = {}
    for finding in findings:
        key = finding.detector, finding.kind, finding.subjects, finding.error
        if finding.stage == "withdrawn":
            standing = {other: kept for other, kept in standing.items() if other[:3] != key[:3]}
        elif key not in standing or standing[key].stage == "suspected":
            standing[key] = finding
    acting = [finding for finding in standing.values() if finding.stage == "confirmed" and not finding.shadow]
    newest = max(acting, key=lambda finding: (finding.severity == "critical", finding.at), default=None)
    if newest is None:
        return list(standing.values())
    return [finding for finding in standing.values() if finding.at >= newest.since - SLACK_S or _lasts(finding, newest.at)]


def _lasts(finding: Finding, at: float) -> bool:
    """Whether an older finding still holds at `at`: a notice up to its deadline and some time, a warning until withdrawn."""
    if finding.kind is K.PREEMPTION:
        return at <= finding.at + finding.numbers.get("left_s", 0.0) + AFTER_DEADLINE_S
    return finding.severity == "warning"


def _explanation(effect: Finding, causes: Sequence[Finding]) -> str | None:
    """Why the effect is an echo of one of the causes; None when it is not."""
    for cause in causes:
        if cause is effect or cause.since > effect.at + SLACK_S:
            continue
        why = _why(cause, effect)
        if why is not None:
            return f"{why} ({cause.evidence})"
    return None


def _why(cause: Finding, effect: Finding) -> str | None:
    for rule in RULES:
        if cause.kind in rule.cause and effect.kind in rule.effect and _meets(rule.where, cause, effect):
            return rule.why
    if cause.kind is effect.kind is K.EXCEPTION and cause.error == effect.error and _order(cause) < _order(effect):
        return "the same error, on another rank"
    if cause.kind is K.STORAGE and effect.kind is K.EXCEPTION and STORE_ERRORS.search(effect.error):
        return "its store is in trouble"
    return None


def _meets(where: Where, cause: Finding, effect: Finding) -> bool:
    match where:
        case "worker":
            return bool(_workers(cause) & _workers(effect))
        case "node":
            return _nodes(effect) <= _nodes(cause) if len(effect.subjects) > 1 else bool(_nodes(cause) & _nodes(effect))
        case _:
            return True


def _workers(finding: Finding) -> set[str]:
    return {subject.worker for subject in finding.subjects if subject.worker}


def _nodes(finding: Finding) -> set[str]:
    return {subject.node for subject in finding.subjects}


def _order(finding: Finding) -> tuple[bool, float, tuple[str, ...]]:
    """What comes first as a cause; the last part makes it a fixed order among those alike."""
    return finding.severity != "critical", finding.since, tuple(map(str, finding.subjects))


def _like(root: Finding, other: Finding) -> bool:
    """Whether two roots are one loss: of the same moment, and, for exceptions, with the same words."""
    return abs(other.since - root.since) <= SLACK_S and other.error == root.error


def _judge(root: Finding, past: Collection[tuple[str, int]]) -> tuple[FaultKind, str]:
    if root.error and root.step is not None and (root.error, root.step) in past and root.kind is not K.COLLECTIVE_BROKEN:
        return K.PROGRAM_ERROR, f"{root.evidence}, as before at the same step: the program fails there"
    if root.kind is K.COLLECTIVE_BROKEN:
        return root.kind, f"{root.evidence}; nobody is known to have ended"
    return root.kind, root.evidence


def shown(diagnosis: Diagnosis) -> str:
    """A diagnosis in a few lines, for the journal and for `ray-dr why`."""
    fault = diagnosis.fault
    who = ", ".join(map(str, diagnosis.subjects[:8]))
    charged = f"counts as a failure {fault.budget}" if fault.charged else "not counted as a failure"
    lines = [f"{diagnosis.kind} of {who}: {diagnosis.reason}", f"  {charged}; first: {fault.remedy}"]
    lines += [f"  set aside: {aside.finding.evidence}: {aside.reason}" for aside in diagnosis.aside]
    lines += [f"  besides: {other.evidence}" for other in diagnosis.besides]
    return "\n".join(lines)
