"""What is told from a journal: where a job stands, what went wrong and how long each part of getting over it took.

Everything is a fold over records: no clock, no store. Durations are seconds on the supervisor's clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ray_dr.model.actions import Decision, FormGroup
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Event, FirstStep, InventoryTaken
from ray_dr.model.journal import (
    DataOpened,
    Decided,
    JobOpened,
    Marked,
    Noted,
    PartSaved,
    Record,
    Restored,
    Stepped,
    VersionSaved,
    Where,
)
from ray_dr.model.ladder import Measured, Plan
from ray_dr.model.recovery import Failed, Finished, Incident, Recovering, Resizing, Running, Starting, State, Suspended
from ray_dr.telemetry.lineage import bases, loss_curve, steps, verify_data
from ray_dr.telemetry.phases import MEASURED, read
from ray_dr.telemetry.preemptions import in_words, still_there
from ray_dr.telemetry.tiers import Row, fold

__all__ = ["IncidentReport", "JobStatus", "incidents", "loss_curve", "replay", "status", "steps", "verify_data"]

PHASES = (
    "detected", "decided", "unwound", "found", "provisioned", "fetched", "loaded", "first_step", "caught_up",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Where a job stands.

    phase        the name of the machine's state in small letters; "unknown" without a decision
    nodes, workers   alive, as the supervisor last knew
    step         last step of the surviving lineage
    newest       newest version per place: memory, peer, disk, store, second
    saved        number of versions that reached each place
    tiers        for the newest versions in each place, which parts are there
    armed        the newest version of which every part has all its copies in memory, and `at_risk` the steps done since
    samples      positions of the sample stream consumed
    reason       of the last decision; for a failed job, why it failed
    resubmit     whether running a failed job again can help
    cadence      why saves are as often as they are; empty before anything is measured
    leaving      nodes of the job that will be taken away, in words
    unmet        why the recovery point objective cannot be met; empty when it can
    """

    job: str = ""
    phase: str = "unknown"
    term: int = 0
    attempt: int = 0
    nodes: int = 0
    workers: int = 0
    step: int = 0
    loss: float | None = None
    newest: dict[str, VersionId] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    incidents: int = 0
    reason: str = ""
    drained: bool = False
    resubmit: bool = True
    opened_at: float = 0.0
    updated_at: float = 0.0
    tiers: tuple[Row, ...] = ()
    armed: VersionId | None = None
    at_risk: int = 0
    cadence: str = ""
    unmet: str = ""
    standbys: tuple[str, ...] = ()
    """Workers that are up beside the newest group, while there is one."""
    leaving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IncidentReport:
    """One failure and how the job got over it.

    phases       name (of PHASES, in order) -> seconds since the incident's `at`; what did not happen is absent
    attempt      the attempt that got over it, 0 if none did
    restored     the version it went on from (None: from scratch, or not yet)
    steps_lost   steps that had been done and had to be done again
    bytes        bytes read per kind of source
    reason       of the decision that began the recovery; `expectation`: of the one that formed the next group
    plan         the way that was chosen first, and what was expected of it; None: none was so far
    took_s       seconds from then until the next step: what `plan.way.next_step_s` predicts
    """

    incident: Incident
    term: int
    attempt: int
    restored: VersionId | None
    steps_lost: int
    phases: dict[str, float]
    bytes: dict[str, int]
    reason: str
    expectation: str
    plan: Plan | None = None
    took_s: float | None = None


def status(records: Iterable[Record]) -> JobStatus:
    """Where the job stands at the end of `records`."""
    kept = list(records)
    opened = [record for record in kept if isinstance(record, JobOpened)]
    decided = [record for record in kept if isinstance(record, Decided)]
    batch = next((record.global_batch for record in reversed(kept) if isinstance(record, DataOpened)), 0)
    lineage, curve = steps(kept), loss_curve(kept)
    step = lineage[-1].number if lineage else 0
    versions = _versions(kept)
    state = decided[-1].state if decided else None
    phase = state.phase if state else None
    tiers = fold(kept)
    armed = tiers.armed()
    return JobStatus(
        job=opened[-1].job if opened else "",
        phase=type(phase).__name__.lower() if phase else "unknown",
        term=max([0, *(record.term for record in opened), *(record.term for record in decided)]),
        attempt=state.attempt if state else 0,
        nodes=len(state.nodes) if state else 0,
        workers=sum(len(node.ready) for node in state.nodes) if state else 0,
        step=step,
        loss=curve[-1][1] if curve else None,
        newest={str(where): max(found, key=_age) for where, found in versions.items()},
        saved={str(where): len(found) for where, found in versions.items()},
        samples=step * batch,
        incidents=len(_incident_starts(kept)),
        reason=phase.reason if isinstance(phase, Failed) else (decided[-1].reason if decided else ""),
        drained=isinstance(phase, Finished) and phase.drained,
        resubmit=phase.resubmit if isinstance(phase, Failed) else True,
        opened_at=opened[0].at if opened else 0.0,
        updated_at=max((record.at for record in kept), default=0.0),
        tiers=tiers.rows,
        armed=armed,
        at_risk=max(0, step - armed.step) if armed else step,
        cadence=_told(kept, "cadence.changed"),
        unmet=_told(kept, "rpo.unreachable", "rpo.reachable"),
        standbys=_standbys(state) if state else (),
        leaving=tuple(f"node {one.node} is {in_words(one)}" for one in still_there(kept)),
    )


def _standbys(state: State) -> tuple[str, ...]:
    if not isinstance(state.phase, Starting | Running | Resizing | Recovering):
        return ()
    members = frozenset(state.order)
    return tuple(worker for node in state.nodes for worker in node.ready if worker not in members)


def _told(records: Sequence[Record], *names: str) -> str:
    """The reason in the newest note of these names, of the supervisor at work; empty when it gives none."""
    for record in reversed(records):
        if isinstance(record, JobOpened):
            return ""
        if isinstance(record, Noted) and record.name in names:
            return str(record.fields.get("reason", ""))
    return ""


def incidents(records: Iterable[Record]) -> tuple[IncidentReport, ...]:
    """Every failure, in order, with its recovery as far as it has come."""
    kept = list(records)
    return tuple(_report(kept, position) for position in _incident_starts(kept))


def replay(
    records: Iterable[Record], step_fn: Callable[[State, Event, JobOpened | None, Measured], Decision], initial: State
) -> tuple[str, ...]:
    """How the journal's decisions differ from those `step_fn` takes now, in words; empty when they are the same.

    Each term begins from `initial`; each event is decided on the state the journal recorded before it, so that one
    difference does not hide the next. `step_fn` gets the term's JobOpened, whose spec holds the policy, and what was measured
    so far.
    """
    opened: dict[int, JobOpened] = {}
    states: dict[int, State] = {}
    differences: list[str] = []
    measured = Measured()
    for record in records:
        if isinstance(record, JobOpened):
            opened[record.term] = record
            measured = Measured()
        if isinstance(record, Noted) and record.name == MEASURED:
            measured = read(record.fields) or measured
        if isinstance(record, Decided):
            decision = step_fn(states.get(record.term, initial), record.event, opened.get(record.term), measured)
            differences += _differences(record, decision)
            states[record.term] = record.state
    return tuple(differences)


def _differences(record: Decided, decision: Decision) -> Iterator[str]:
    for name in ("state", "actions", "reason"):
        then, now = getattr(record, name), getattr(decision, name)
        if then != now:
            event = type(record.event).__name__
            yield f"term {record.term}, decision {record.seq} on {event}: {name} was {then!r}, is now {now!r}"


def _age(version: VersionId) -> tuple[int, int]:
    return version.attempt, version.step


def _versions(records: Iterable[Record]) -> dict[Where, set[VersionId]]:
    """Versions that are whole in each place: said so, or with all their parts there."""
    found: dict[Where, set[VersionId]] = {}
    parts: dict[tuple[Where, VersionId], set[int]] = {}
    for record in records:
        if isinstance(record, VersionSaved):
            found.setdefault(record.where, set()).add(record.version)
        # Parts in the store are no version until its manifest is committed.
        if isinstance(record, PartSaved) and record.where is not Where.STORE:
            ranks = parts.setdefault((record.where, record.version), set())
            ranks.add(record.rank)
            if len(ranks) == record.world:
                found.setdefault(record.where, set()).add(record.version)
    return found


def _incident_of(record: Record) -> Incident | None:
    if isinstance(record, Decided) and isinstance(record.state.phase, (Recovering, Suspended)):
        incident = record.state.phase.incident
        return incident if incident and incident.number > 0 else None
    return None


def _incident_starts(records: Sequence[Record]) -> list[int]:
    """Positions of the decisions that began each incident."""
    starts: dict[tuple[int, int], int] = {}
    for position, record in enumerate(records):
        incident = _incident_of(record)
        if incident is not None and isinstance(record, Decided):
            starts.setdefault((record.term, incident.number), position)
    return list(starts.values())


def _report(records: Sequence[Record], start: int) -> IncidentReport:
    decided, after = records[start], records[start:]
    incident = _incident_of(decided)
    assert isinstance(decided, Decided)
    assert incident is not None
    broken = _broken_attempt(records[:start])
    formed = _next_group(after, broken)
    attempt = formed[1].group.attempt if formed else 0
    base = formed[1].group.restore if formed else None
    reached = _reached(records, broken, incident)
    moments = _moments(after, decided, incident, formed, reached)
    planned = _planned(after, decided.term, incident)
    stepped = moments.get("first_step")
    sources: Counter[str] = Counter()
    for record in after:
        if isinstance(record, Restored) and record.attempt == attempt:
            sources.update(record.sources)
    return IncidentReport(
        incident=_cause(after, decided.term, incident),
        term=decided.term,
        attempt=attempt,
        restored=base,
        steps_lost=max(0, reached - (base.step if base else 0)) if formed else 0,
        phases={name: moments[name] - incident.at for name in PHASES if name in moments},
        bytes=dict(sources),
        reason=decided.reason,
        expectation=formed[0].reason if formed else "",
        plan=planned[1] if planned else None,
        took_s=stepped - planned[0] if planned and stepped is not None else None,
    )


def _planned(after: Iterable[Record], term: int, incident: Incident) -> tuple[float, Plan] | None:
    """When a way out was first chosen, and which."""
    for record in after:
        plan = record.state.plan if isinstance(record, Decided) and record.term == term else None
        if plan is not None and plan.incident == incident.number:
            return record.at, plan
    return None


def _cause(after: Iterable[Record], term: int, incident: Incident) -> Incident:
    """The incident as it was last known: what it began with may have been a mere symptom."""
    known = (_incident_of(record) for record in after if isinstance(record, Decided) and record.term == term)
    return next((other for other in reversed([*known]) if other is not None and other.number == incident.number), incident)


def _broken_attempt(before: Sequence[Record]) -> int:
    return next((record.state.attempt for record in reversed(before) if isinstance(record, Decided)), 0)


def _next_group(after: Sequence[Record], broken: int) -> tuple[Decided, FormGroup] | None:
    """The first group formed since that did a step; while none has, the first formed."""
    formed = [
        (record, action)
        for record in after
        if isinstance(record, Decided)
        for action in record.actions
        if isinstance(action, FormGroup) and action.group.attempt > broken
    ]
    began = {event.attempt for event in _events(after) if isinstance(event, FirstStep)}
    return next((pair for pair in formed if pair[1].group.attempt in began), formed[0] if formed else None)


def _reached(records: Sequence[Record], broken: int, incident: Incident) -> int:
    """The last step the broken attempt is known to have done; where it began, if it did none."""
    done = [r.record.step for r in records if isinstance(r, Stepped) and r.record.attempt == broken]
    if done:
        return max(done)
    base = bases(records).get(broken)
    return base.step if base else (0 if broken else incident.step)


def _moments(
    after: Sequence[Record],
    decided: Decided,
    incident: Incident,
    formed: tuple[Decided, FormGroup] | None,
    reached: int,
) -> dict[str, float]:
    """UTC seconds at which each phase was over."""
    moments = {"detected": decided.event.at, "decided": decided.at}
    for record in after:
        if isinstance(record, Decided):
            _note(moments, "unwound", record.at, not _unwinding(record))
            _note(moments, "found", record.event.at, isinstance(record.event, InventoryTaken))
    if formed is None:
        return moments
    attempt = formed[1].group.attempt
    restored = [record for record in after if isinstance(record, Restored) and record.attempt == attempt]
    marks = {record.name: record.at for record in after if isinstance(record, Marked) and record.attempt == attempt}
    moments["provisioned"] = marks.get("group_formed", formed[0].at)
    if restored:
        moments["fetched"] = max(record.at - record.load_s for record in restored)
        moments["loaded"] = max(record.at for record in restored)
    for event in _events(after):
        _note(moments, "first_step", event.at, isinstance(event, FirstStep) and event.attempt == attempt)
    for record in after:
        beyond = isinstance(record, Stepped) and record.record.attempt >= attempt and record.record.step > reached
        _note(moments, "caught_up", record.at, beyond)
    return moments


def _unwinding(record: Decided) -> bool:
    return isinstance(record.state.phase, Recovering) and bool(record.state.phase.unwinding)


def _note(moments: dict[str, float], name: str, at: float, happened: bool) -> None:
    if happened:
        moments.setdefault(name, at)


def _events(records: Iterable[Record]) -> Iterator[Event]:
    return (record.event for record in records if isinstance(record, Decided))
