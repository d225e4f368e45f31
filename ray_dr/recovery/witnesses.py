"""Who saw a job's failure, by its journal, and what that comes to.

A failure has two kinds of witnesses: findings of detectors, as they were noted, and the events the machine decided on, which
count as findings where no detector said the same. `classify` tells the root from its echoes; where it knows of a cause that has
nothing to do with what broke the job, what broke the job is taken, and the other cause stands beside it.

Unlike in a running detector, the times in findings are UTC seconds of the supervisor here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ray_dr.detection.classify import LOST, SLACK_S, Diagnosis, classify
from ray_dr.model.codec import from_json
from ray_dr.model.events import Corrupted, Diverged, Event, Hung, NodeLost, WorkerLost, WorkerRaised
from ray_dr.model.journal import Decided, Noted, Record
from ray_dr.model.recovery import FailureKind, Incident, State
from ray_dr.model.signal import FaultKind, Finding, Subject, node_of

SUPERVISOR = "supervisor"
"""In `Finding.detector`: nobody but the supervisor said so, in the event it decided on."""
K = FaultKind
KINDS = {
    FailureKind.NODE_LOST: K.NODE_GONE, FailureKind.WORKER_LOST: K.PROCESS_GONE,
    FailureKind.GROUP_BROKEN: K.COLLECTIVE_BROKEN, FailureKind.USER_ERROR: K.EXCEPTION,
    FailureKind.HANG: K.HANG, FailureKind.START_TIMEOUT: K.HANG, FailureKind.PREEMPTED: K.PREEMPTION,
    FailureKind.DIVERGED: K.NON_FINITE, FailureKind.CORRUPTION: K.CORRUPTION,
}  # fmt: skip
ENDED, RAISED = (K.PROCESS_GONE, K.OUT_OF_MEMORY), (K.EXCEPTION, K.COLLECTIVE_BROKEN, K.OUT_OF_MEMORY)
ID_DIGITS = 56


def diagnose(
    records: Sequence[Record], begin: int, incident: Incident, past: Sequence[tuple[str, int]] = ()
) -> Diagnosis:
    """What the records from `begin` on come to, which hold the incident's witnesses."""
    findings = list(_findings(records[begin:]))
    findings += _unsaid(_events(records, begin), findings)
    own = max((finding for finding in findings if _is(finding, incident)), key=lambda finding: finding.at, default=None)
    if own is None:
        findings.append(own := _of_machine(incident))
    # What began long after is another failure, or an echo nobody needs; and what was acted on can't be taken back.
    findings = [f for f in findings if f.since <= own.at + SLACK_S and (f.stage != "withdrawn" or f.at < own.at)]
    mine = _causes(own, findings)
    foreign: list[Finding] = []
    while (diagnosis := classify(findings, past=past)) is not None and diagnosis.root not in mine:
        foreign.append(diagnosis.root)
        findings.remove(diagnosis.root)
    assert diagnosis is not None, "what broke the job is confirmed"
    return replace(diagnosis, besides=(*diagnosis.besides, *foreign))


def _causes(own: Finding, findings: Sequence[Finding]) -> list[Finding]:
    """The finding, and all that explain it, or one that explains it."""
    causes = [own]
    for effect in causes:
        causes += [other for other in findings if other not in causes and _explains(other, effect)]
    return causes


def _explains(cause: Finding, effect: Finding) -> bool:
    pair = classify([cause, effect])
    return pair is not None and pair.root == cause and any(aside.finding == effect for aside in pair.aside)


def _findings(records: Iterable[Record]) -> Iterator[Finding]:
    """Those that were noted; a note of another version, which this one can't read, is left out."""
    for record in records:
        if isinstance(record, Noted) and record.name == "finding":
            fields = {name: value for name, value in record.fields.items() if name != "began"}
            try:
                finding: Finding = from_json(
                    Finding, {**fields, "at": record.at, "since": record.fields.get("began", record.at)}
                )
            except ValueError:
                continue
            yield finding


def _events(records: Sequence[Record], begin: int) -> Iterator[tuple[Event, State]]:
    """Events that changed something, with the state before."""
    state: State | None = None
    for position, record in enumerate(records):
        if isinstance(record, Decided):
            if position >= begin and state is not None and record.state != state:
                yield record.event, state
            state = record.state


def _unsaid(events: Iterable[tuple[Event, State]], said: Sequence[Finding]) -> list[Finding]:
    """What events say, and no finding."""
    found = []
    for event, before in events:
        finding = of_event(event, before)
        if finding is None:
            continue
        alike = _alike(finding.kind)
        if not any(
            other.kind in alike and (_whom(other) & _whom(finding) or other.evidence == finding.evidence) for other in said
        ):
            found.append(finding)
    return found


def _whom(finding: Finding) -> set[tuple[str, str]]:
    """Node and worker of each subject: a rank is known only while its group stands."""
    return {(subject.node, subject.worker) for subject in finding.subjects}


def _alike(kind: FaultKind) -> tuple[FaultKind, ...]:
    """Kinds of findings that say what an event of this kind says."""
    return next((kinds for kinds in (LOST, ENDED, RAISED) if kind in kinds), (kind,))


def of_event(event: Event, before: State) -> Finding | None:
    match event:
        case NodeLost():
            node = Subject(short(event.node))
            return _said(K.NODE_GONE, (node,), event.at, f"{node} is gone: {event.how}")
        case WorkerLost():
            who = _subject(event.worker, before)
            return _said(K.PROCESS_GONE, (who,), event.at, f"the process of {who} ended: {event.how}")
        case WorkerRaised():
            who, kind = _subject(event.worker, before), K.COLLECTIVE_BROKEN if event.collateral else K.EXCEPTION
            evidence = f"{who} raised after step {event.step}: {event.error}"
            return replace(_said(kind, (who,), event.at, evidence), step=event.step, error=event.error)
        case Hung():
            return _said(K.HANG, tuple(_subject(worker, before) for worker in event.workers), event.at, event.how)
        case Corrupted():
            return _said(K.CORRUPTION, tuple(_subject(worker, before) for worker in event.workers), event.at, event.how)
        case Diverged():
            kind = K.LOSS_SPIKE if event.how.startswith("loss") else K.NON_FINITE
            return replace(_said(kind, (), event.at, event.how), step=event.onset)
        case _:
            return None


def _of_machine(incident: Incident) -> Finding:
    """What nobody but the machine says: a timeout, a failed action, a loss while no supervisor watched."""
    worker = "/" in incident.subject
    subject = Subject(node_of(incident.subject), incident.subject) if worker else Subject(short(incident.subject))
    known = incident.kind not in (FailureKind.GROUP_BROKEN, FailureKind.START_TIMEOUT)
    return _said(KINDS[incident.kind], (subject,) if worker or known else (), incident.at, incident.detail)


def _said(kind: FaultKind, subjects: tuple[Subject, ...], at: float, evidence: str) -> Finding:
    return Finding(SUPERVISOR, kind, subjects, at, at, evidence)


def _is(finding: Finding, incident: Incident) -> bool:
    """Whether a finding is about what the machine holds for the cause."""
    if finding.stage != "confirmed" or finding.shadow:
        return False
    if finding.evidence == incident.detail:
        return True
    if finding.kind not in _alike(KINDS[incident.kind]):
        return False
    who = incident.subject, short(incident.subject)
    return any(subject.worker == who[0] or (subject.node == who[1] and not subject.worker) for subject in finding.subjects)


def _subject(worker: str, state: State) -> Subject:
    rank = state.order.index(worker) if worker in state.order else None
    return Subject(node_of(worker), worker, rank)


def short(node: str) -> str:
    """A node as its workers' names begin with it; Ray's ids are longer."""
    return f"{node[:8]}{node[-5:]}" if len(node) == ID_DIGITS else node
