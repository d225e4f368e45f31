"""What the demo found out, as values: from the journals of two runs to what the table and the report show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ray_dr.cli.compare import Comparison
from ray_dr.cli.timeline import moments
from ray_dr.model.checkpoint import StepRecord
from ray_dr.model.events import NodeJoined
from ray_dr.model.journal import Decided, JobOpened, PartSaved, Record, Stepped
from ray_dr.telemetry.lineage import DataReport
from ray_dr.telemetry.timeline import IncidentReport, incidents, loss_curve, status, verify_data


@dataclass(frozen=True, slots=True)
class Done:
    """One step that every rank of its attempt has done. `at`: UTC seconds of the last of them."""

    at: float
    attempt: int
    step: int
    world: int


@dataclass(frozen=True, slots=True)
class RunFindings:
    """One run. Times in UTC seconds, sizes in bytes.

    curve     (step, loss) over the surviving lineage
    done      every step done, also those done again, in order of time
    saved     place -> number of versions; moved: place -> bytes that were sent there
    """

    name: str
    phase: str
    began_at: float
    ended_at: float
    curve: tuple[tuple[int, float], ...]
    done: tuple[Done, ...]
    saved: dict[str, int]
    moved: dict[str, int]
    data: DataReport

    @property
    def first_step_at(self) -> float:
        """When its first step was done; its beginning when there was none."""
        return self.done[0].at if self.done else self.began_at


@dataclass(frozen=True, slots=True)
class Kill:
    """What was done to the disturbed run. `at`: when the kill was ordered; finding the node's processes takes a moment
    of it. `step`: the last that was done by then."""

    at: float
    node: str
    step: int


@dataclass(frozen=True, slots=True)
class Comeback:
    """Getting over the kill, in seconds since it; None for what did not happen.

    stepped_s     the next attempt's first step is done by all its ranks
    node_s        the replacement's agent is up
    full_s        a step is done by as many workers as before
    """

    stepped_s: float | None = None
    node_s: float | None = None
    full_s: float | None = None
    world_before: int = 0
    world_after: int = 0


@dataclass(frozen=True, slots=True)
class Findings:
    """The demo's outcome.

    leaked    kind -> what was left behind; empty when nobody counted
    reasons   (seconds since the kill, state, reason) of the disturbed run's decisions
    trouble   what ended the demo early, in words
    """

    runs: tuple[RunFindings, ...]
    kill: Kill | None
    comeback: Comeback
    incidents: tuple[IncidentReport, ...]
    comparison: Comparison | None
    leaked: dict[str, tuple[str, ...]]
    reasons: tuple[tuple[float, str, str], ...]
    environment: dict[str, str] = field(default_factory=dict)
    took_s: float = 0.0
    trouble: str = ""

    @property
    def survived(self) -> bool:
        """Whether the disturbed run lost a node, went on, and finished."""
        over = len(self.runs) == 2 and all(run.phase == "finished" for run in self.runs)
        return over and self.kill is not None and self.comeback.stepped_s is not None

    @property
    def bit_identical(self) -> bool:
        """Whether both runs ended with the same bytes."""
        return self.comparison is not None and self.comparison.identical

    @property
    def data_exact(self) -> bool:
        """Whether both journals prove every sample used exactly once."""
        return len(self.runs) == 2 and all(run.data.ok for run in self.runs)

    @property
    def samples_lost(self) -> int | None:
        """Over both runs; None when there were not two."""
        return sum(run.data.lost for run in self.runs) if len(self.runs) == 2 else None

    @property
    def samples_repeated(self) -> int | None:
        """Over both runs; None when there were not two."""
        return sum(run.data.repeated for run in self.runs) if len(self.runs) == 2 else None

    @property
    def leaks(self) -> int | None:
        """How many things were left behind; None when nobody counted."""
        return sum(len(items) for items in self.leaked.values()) if self.leaked else None

    @property
    def steps_lost(self) -> int:
        """Steps that had to be done again."""
        return sum(report.steps_lost for report in self.incidents)

    @property
    def ok(self) -> bool:
        """Whether all that the demo promises came true."""
        return self.survived and self.bit_identical and self.data_exact and self.leaks == 0 and not self.trouble


def find_run(name: str, records: Sequence[Record]) -> RunFindings:
    """What one run's journal says."""
    told = status(records)
    moved: Counter[str] = Counter()
    for record in records:
        if isinstance(record, PartSaved):
            moved[str(record.where)] += record.sent
    return RunFindings(
        name=name,
        phase=told.phase,
        began_at=next((record.at for record in records if isinstance(record, JobOpened)), 0.0),
        ended_at=told.updated_at,
        curve=tuple((step, loss) for step, loss, _ in loss_curve(records)),
        done=tuple(all_done(records)),
        saved=dict(told.saved),
        moved=dict(moved),
        data=verify_data(records),
    )


def all_done(records: Iterable[Record]) -> Iterator[Done]:
    """Every step that all ranks of its attempt have done, in order of time."""
    ranks: dict[tuple[int, int], dict[int, tuple[float, StepRecord]]] = {}
    for record in records:
        if isinstance(record, Stepped):
            did = record.record
            ranks.setdefault((did.attempt, did.step), {}).setdefault(did.rank, (record.at, did))
    whole = (found for found in ranks.values() if len(found) == next(iter(found.values()))[1].world)
    yield from sorted((_done(found) for found in whole), key=lambda done: (done.at, done.attempt, done.step))


def _done(ranks: dict[int, tuple[float, StepRecord]]) -> Done:
    _, did = next(iter(ranks.values()))
    return Done(max(at for at, _ in ranks.values()), did.attempt, did.step, did.world)


def find_comeback(records: Sequence[Record], kill: Kill) -> Comeback:
    """How a run got over the kill."""
    done = tuple(all_done(records))
    before = [each for each in done if each.at <= kill.at]
    if not before:
        return Comeback()
    broken, world = before[-1].attempt, before[-1].world
    later = [each for each in done if each.attempt > broken]
    joined = (record.event.at for record in records if isinstance(record, Decided)
              and isinstance(record.event, NodeJoined) and record.event.at > kill.at)  # fmt: skip
    full = (each.at for each in later if each.world >= world)
    return Comeback(
        stepped_s=later[0].at - kill.at if later else None,
        node_s=_since(kill.at, joined),
        full_s=_since(kill.at, full),
        world_before=world,
        world_after=later[0].world if later else 0,
    )


def find_incidents(records: Sequence[Record], kill: Kill | None) -> tuple[IncidentReport, ...]:
    """The incidents since the kill."""
    return tuple(report for report in incidents(records) if kill is not None and report.incident.at >= kill.at)


def find_reasons(records: Sequence[Record], kill: Kill | None) -> tuple[tuple[float, str, str], ...]:
    """Every decision's reason, in seconds since the kill (without one: since the first record)."""
    zero = kill.at if kill else next((record.at for record in records), 0.0)
    return tuple((at - zero, what, text) for at, what, text in moments(records))


def _since(zero: float, moments_at: Iterator[float]) -> float | None:
    at = next(moments_at, None)
    return None if at is None else at - zero
