"""What a job's journal says of its failures, for people: what happened, how it was known, what was tried, what it cost.

Everything is a fold over records, as in telemetry.timeline, whose incidents these are. Times are UTC seconds of the supervisor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ray_dr.detection.classify import Diagnosis
from ray_dr.model.actions import Action, FormGroup
from ray_dr.model.codec import from_json
from ray_dr.model.events import FirstStep
from ray_dr.model.job import Job, Workers
from ray_dr.model.journal import DataOpened, Decided, JobOpened, Record
from ray_dr.model.recovery import Failed, FailureKind, Finished, Incident, Phase, Queued, Recovering, State, Suspended
from ray_dr.model.signal import Finding, Subject
from ray_dr.recovery.fleet import usable_nodes
from ray_dr.recovery.witnesses import KINDS, diagnose, of_event, short
from ray_dr.telemetry.lineage import Step, steps
from ray_dr.telemetry.timeline import IncidentReport, incidents


@dataclass(frozen=True, slots=True)
class Tried:
    """One decision on the way out, or several alike in a row (`times`)."""

    at: float
    actions: tuple[Action, ...]
    reason: str
    times: int = 1


@dataclass(frozen=True, slots=True)
class Samples:
    """What the journal shows of the samples of the steps that were lost, in numbers of samples; `pending`: in steps that were
    not done again so far, or of which a rank's report is missing."""

    lost: int
    repeated: int
    pending: int


@dataclass(frozen=True, slots=True)
class Account:
    """One failure, and how the job got over it.

    number     in the order of the journal, from 1; `report.incident.number` begins anew with every term
    report     of the timeline; its incident is the one the machine came to hold for the cause
    first      the witness that spoke first
    began_at   when the failure began, as far as known; `decided_at` when something was done, `over_at` when the next step was
               done (None: not yet, or never); UTC seconds
    spans      name -> seconds, one after the other from `began_at` to `over_at`
    again_s    from then until the job was past the last step it had done before; None: not yet
    cut_by     the number of the failure that came before the next step; 0: none did
    samples    None: no step was lost, or the program's samples are not ray_dr's
    failures   in a row without a new step, with this one; 0: there was a new step before it, or it does not count
    """

    number: int
    report: IncidentReport
    diagnosis: Diagnosis
    first: Finding
    began_at: float
    decided_at: float
    over_at: float | None
    spans: dict[str, float]
    again_s: float | None
    cut_by: int
    tried: tuple[Tried, ...]
    samples: Samples | None
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """The job waits for capacity: for `need` nodes (0: how many is not known), `have` of which are there.

    workers  that have to be up on each; 0: any
    asked    nodes asked of the cluster, in all; 0: none, or all came
    failing  node -> how many of its processes in a row ended before they were ready
    """

    since: float
    phase: str
    need: int
    have: int
    workers: int
    asked: int
    failing: dict[str, int]


@dataclass(frozen=True, slots=True)
class Ended:
    """The job is over. `diagnosis`: of what it failed; None where nothing broke, or only the machine's patience did."""

    at: float
    phase: Finished | Failed
    reason: str
    diagnosis: Diagnosis | None = None


@dataclass(frozen=True, slots=True)
class Going:
    """The job is at it. `since`: in this phase."""

    since: float
    phase: str


@dataclass(frozen=True, slots=True)
class Story:
    """A job's failures, the oldest first, and where it stands: after which step, and when the journal's last record is of."""

    step: int
    standing: Waiting | Ended | Going
    accounts: tuple[Account, ...]
    heard_at: float


@dataclass(slots=True)
class _Window:
    """One failure's places in the journal: its witnesses stand in [begin, seen), what was done about it in [start, until)."""

    start: int
    incident: Incident
    begin: int = 0
    seen: int = 0
    until: int = 0
    over: bool = False
    cut_by: int = 0


def tell(records: Iterable[Record]) -> Story | None:
    """The whole story; None when nothing was ever decided."""
    kept = list(records)
    if not any(isinstance(record, Decided) for record in kept):
        return None
    reports = incidents(kept)
    windows = _windows(kept, reports)
    lineage, batch = steps(kept), next((r.global_batch for r in reversed(kept) if isinstance(r, DataOpened)), 0)
    accounts = tuple(
        _account(kept, number, report, window, _samples(report, lineage, batch))
        for number, (report, window) in enumerate(zip(reports, windows, strict=True), 1)
    )
    step = lineage[-1].number if lineage else 0
    return Story(step, _standing(kept, windows), accounts, max(record.at for record in kept))


# ------------------------------------------------------------------------------------------------------- one failure


def _windows(records: Sequence[Record], reports: Sequence[IncidentReport]) -> list[_Window]:
    """Where each failure begins and ends, with what it was held for in the end."""
    found: dict[tuple[int, int], _Window] = {}
    for position, record in enumerate(records):
        if isinstance(record, Decided) and isinstance(record.state.phase, (Recovering, Suspended)):
            incident = record.state.phase.incident
            if incident is not None and incident.number > 0:
                window = found.setdefault((record.term, incident.number), _Window(position, incident))
                window.incident = incident
    windows, free = list(found.values()), 0
    for at, (window, report) in enumerate(zip(windows, reports, strict=True)):
        following = windows[at + 1].start if at + 1 < len(windows) else len(records)
        end = _end(records, window.start, following, report.attempt)
        window.begin, window.over = free, end is not None
        window.until = following if end is None else end + 1
        window.cut_by = at + 2 if end is None and at + 1 < len(windows) else 0
        # Findings are noted before what is decided on them: those about the next group are no longer about this failure.
        formed = _formed(records, window)
        window.seen = free = formed + 1 if end is None and formed is not None else window.until
    return windows


def _formed(records: Sequence[Record], window: _Window) -> int | None:
    """Where the next group was formed."""
    for position in range(window.start, window.until):
        record = records[position]
        if isinstance(record, Decided) and any(isinstance(action, FormGroup) for action in record.actions):
            return position
    return None


def _end(records: Sequence[Record], start: int, following: int, attempt: int) -> int | None:
    """Where the first step of the attempt that got over it stands, if it comes before the next failure."""
    for position in range(start, following):
        event = record.event if isinstance(record := records[position], Decided) else None
        if isinstance(event, FirstStep) and event.attempt == attempt:
            return position
    return None


def _account(
    records: Sequence[Record], number: int, report: IncidentReport, window: _Window, samples: Samples | None
) -> Account:
    report = replace(report, incident=window.incident)
    diagnosis = diagnose(records[: window.seen], window.begin, window.incident)
    decided_at = records[window.start].at
    echoes = [aside.finding for aside in diagnosis.aside if aside.finding.stage == "confirmed" and not aside.finding.shadow]
    first = min([diagnosis.root, *echoes], key=lambda finding: finding.at)
    # Clocks of nodes differ, and what an event says of its time is the node's.
    first = replace(first, at=min(first.at, decided_at))
    began_at = min(diagnosis.since, first.at)
    ends = {name: report.incident.at + after for name, after in report.phases.items() if name != "detected"}
    again_at = ends.pop("caught_up", None)
    ends |= _capacity(records, window)
    over_at = ends.get("first_step") if window.over else None
    until = over_at if over_at is not None else records[window.until - 1].at
    ends = {"noticed": first.at, **{name: at for name, at in ends.items() if at <= until}}
    return Account(
        number=number,
        report=report,
        diagnosis=diagnosis,
        first=first,
        began_at=began_at,
        decided_at=decided_at,
        over_at=over_at,
        spans=_spans(began_at, ends),
        again_s=max(0.0, again_at - over_at) if again_at is not None and over_at is not None else None,
        cut_by=window.cut_by,
        tried=tuple(_tried(records, window)),
        samples=samples,
        failures=_failures(records, window),
    )


def _failures(records: Sequence[Record], window: _Window) -> int:
    """As they were counted when all was known of it."""
    states = [r.state for r in records[window.start : window.until] if isinstance(r, Decided)]
    open_ = [state for state in states if isinstance(state.phase, Recovering | Suspended)]
    return open_[-1].failures if open_ else 0


def _capacity(records: Sequence[Record], window: _Window) -> dict[str, float]:
    """When a job that had to wait for nodes had them."""
    phases = [record.state.phase for record in records[window.start : window.until] if isinstance(record, Decided)]
    formed = _formed(records, window)
    waited = any(isinstance(phase, Suspended) for phase in phases)
    return {"capacity": records[formed].at} if waited and formed is not None else {}


def _spans(began_at: float, ends: Mapping[str, float]) -> dict[str, float]:
    spans, before = {}, began_at
    for name, at in sorted(ends.items(), key=lambda item: item[1]):
        spans[name] = max(0.0, at - before)
        before = max(before, at)
    return spans


def _tried(records: Sequence[Record], window: _Window) -> Iterator[Tried]:
    """Decisions that did something, or brought the job into another phase."""
    last: Tried | None = None
    phase: type[Phase] | None = None
    for record in records[window.start : window.until]:
        if not isinstance(record, Decided):
            continue
        changed, phase = phase is not type(record.state.phase), type(record.state.phase)
        if not record.actions and not changed:
            continue
        if last is not None and last.reason == record.reason:
            last = replace(last, times=last.times + 1)
            continue
        if last is not None:
            yield last
        last = Tried(record.at, record.actions, record.reason)
    if last is not None:
        yield last


def _samples(report: IncidentReport, lineage: Sequence[Step], batch: int) -> Samples | None:
    """Whether the steps that were lost have, as they were done again, each sample once."""
    if not batch or not report.steps_lost:
        return None
    base = report.restored.step if report.restored else 0
    lost = repeated = pending = 0
    present = {step.number: step for step in lineage}
    for number in range(base + 1, base + report.steps_lost + 1):
        step = present.get(number)
        if step is None or not step.complete:
            pending += batch
            continue
        at = (number - 1) * batch
        for first, last in sorted(pair for record in step.records for pair in record.ranges if pair[0] < pair[1]):
            lost, repeated = lost + max(0, first - at), repeated + max(0, min(at, last) - first)
            at = max(at, last)
        lost += max(0, number * batch - at)
    return Samples(lost, repeated, pending)


# ---------------------------------------------------------------------------------------------------- where it stands


def _standing(records: Sequence[Record], windows: Sequence[_Window]) -> Waiting | Ended | Going:
    """The phase the newest decision left the job in, and since when: a new term begins anew."""
    decided = [(at, record) for at, record in enumerate(records) if isinstance(record, Decided)]
    at, last = decided[-1]
    state, first = last.state, last
    for place, record in reversed(decided):
        if record.term != last.term or type(record.state.phase) is not type(state.phase):
            break
        at, first = place, record
    match state.phase:
        case Finished() as phase:
            return Ended(first.at, phase, first.reason)
        case Failed() as phase:
            return Ended(first.at, phase, phase.reason, _fatal(records, at, first, windows))
        case Queued() | Suspended() as phase:
            return _waiting(phase, state, _workers(records), first.at)
        case phase:
            return Going(first.at, type(phase).__name__.lower())


def _waiting(phase: Queued | Suspended, state: State, wanted: Workers | None, since: float) -> Waiting:
    failing = {short(node.id): node.failed_starts for node in state.nodes if node.failed_starts}
    name = type(phase).__name__.lower()
    if wanted is None:
        return Waiting(since, name, 0, len(state.nodes), 0, state.requested, failing)
    if isinstance(phase, Suspended):
        return Waiting(since, name, wanted.min_nodes_to_run, usable_nodes(state), 0, state.requested, failing)
    have = sum(len(node.ready) >= wanted.per_node for node in state.nodes)
    need = max(wanted.nodes_min, wanted.min_nodes_to_run)
    return Waiting(since, name, need, have, wanted.per_node, state.requested, failing)


def _workers(records: Sequence[Record]) -> Workers | None:
    """What the job wants, by its newest spec; None where the journal doesn't say so in words this version understands."""
    opened = next((record for record in reversed(records) if isinstance(record, JobOpened)), None)
    try:
        job: Job | None = from_json(Job, opened.spec) if opened else None
    except ValueError:
        return None
    return job.workers if job else None


def _fatal(records: Sequence[Record], at: int, end: Decided, windows: Sequence[_Window]) -> Diagnosis | None:
    """Of what the job failed at `at`, which the machine counts as no incident; None where it was no failure of a kind."""
    before = next((record.state for record in reversed(records[:at]) if isinstance(record, Decided)), end.state)
    finding = of_event(end.event, before)
    if finding is None:
        return None
    kind = next((kind for kind, fault in KINDS.items() if fault is finding.kind), FailureKind.DIVERGED)
    subject = finding.subjects[0] if finding.subjects else Subject(f"attempt {before.attempt}")
    incident = Incident(0, kind, subject.worker or subject.node, end.event.at, before.step, finding.evidence)
    past = [before.last_error] if before.last_error else []
    last = windows[-1] if windows else _Window(0, incident)
    return diagnose(records[: at + 1], last.seen if last.seen <= at else last.begin, incident, past)
