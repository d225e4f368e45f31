"""The steps that count, and the proof of which samples they used.

A job may do a step more than once: an attempt that began from version (a, s) throws away whatever came after s. The
*lineage* is what is left, walked back from the newest attempt: its own steps, then those of the attempt it began from
up to the version's step, and so on. Step n (from 1) covers positions [(n - 1) * B, n * B) of the sample stream.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ray_dr.model.checkpoint import StepRecord, VersionId
from ray_dr.model.data import Order, digest, position_of
from ray_dr.model.journal import DataOpened, Decided, Record, Restored, Stepped
from ray_dr.model.recovery import Group

DIFFERENCES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the lineage: what each rank did, in rank order. `at`: UTC seconds of its last report."""

    number: int
    attempt: int
    at: float
    records: tuple[StepRecord, ...]

    @property
    def world(self) -> int:
        return max(record.world for record in self.records)

    @property
    def complete(self) -> bool:
        """Whether every rank of the attempt reported it."""
        return {record.rank for record in self.records} == set(range(self.world))


@dataclass(frozen=True, slots=True)
class DataReport:
    """What the journal proves about the samples used, in numbers of samples.

    lost         not used by a step that all ranks reported
    repeated     used more than once
    unwitnessed  belonging to a step of which a rank's report is missing: neither proven used nor lost
    mismatched   reports whose digest is not that of the indices the job's order has at their positions
    epochs       epoch -> samples used
    skipped      of those used, in steps that all ranks skipped: they taught nothing
    quarantined  left out because training had gone wrong on them: neither lost nor used
    differences  the first of whatever is wrong, in words
    """

    steps: int
    global_batch: int
    used: int
    lost: int
    repeated: int
    unwitnessed: int
    mismatched: int
    epochs: dict[int, int] = field(default_factory=dict)
    differences: tuple[str, ...] = ()
    skipped: int = 0
    quarantined: int = 0

    @property
    def ok(self) -> bool:
        """Every sample exactly once, in the job's one order, with a witness for each."""
        return not (self.lost or self.repeated or self.unwitnessed or self.mismatched or self.differences)


def groups(records: Iterable[Record]) -> dict[int, Group]:
    """Every attempt's group that the machine formed or found running."""
    found: dict[int, Group] = {}
    for record in records:
        if isinstance(record, Decided):
            for source in (record.state.phase, *record.actions):
                group = getattr(source, "group", None)
                if isinstance(group, Group):
                    found[group.attempt] = group
    return found


def bases(records: Sequence[Record]) -> dict[int, VersionId | None]:
    """The version each attempt began from; None is from scratch."""
    found: dict[int, VersionId | None] = {r.attempt: r.version for r in records if isinstance(r, Restored)}
    found.update({attempt: group.restore for attempt, group in groups(records).items()})
    return found


def steps(records: Iterable[Record]) -> tuple[Step, ...]:
    """The surviving lineage, in ascending order of step."""
    kept = list(records)
    began = bases(kept)
    by_attempt = _by_attempt(kept)
    lineage: list[Step] = []
    attempt, last = max((*by_attempt, *began), default=0), math.inf
    while attempt > 0:
        mine = by_attempt.get(attempt, {})
        lineage.extend(mine[number] for number in sorted(mine, reverse=True) if number <= last)
        base = began[attempt] if attempt in began else _likely_base(attempt, by_attempt)
        # Bases go back in attempts; one that did not would be a damaged journal, and must not keep us here for ever.
        attempt, last = (base.attempt, min(last, base.step)) if base and base.attempt < attempt else (0, 0)
    return tuple(reversed(_without_overlap(lineage)))


def loss_curve(records: Iterable[Record], name: str = "loss") -> tuple[tuple[int, float, float], ...]:
    """(step, loss, UTC seconds) over the lineage; ranks weigh as much as the samples they used."""
    points = ((step, _weighted(step.records, name)) for step in steps(records))
    return tuple((step.number, loss, step.at) for step, loss in points if loss is not None)


def verify_data(records: Iterable[Record]) -> DataReport:
    """Whether the lineage used every sample exactly once per epoch, in the job's one order."""
    kept = list(records)
    opened = [record for record in kept if isinstance(record, DataOpened)]
    lineage = steps(kept)
    if not opened:
        return DataReport(len(lineage), 0, 0, 0, 0, 0, 0, differences=("the journal does not say what data was used",))
    data = opened[-1]
    differences = list(_changes(opened))
    used: Counter[int] = Counter()
    lost, unwitnessed, mismatched = 0, 0, 0
    order = Order(data.samples, data.seed, data.shuffle, data.left_out)
    present = {step.number: step for step in lineage}
    for number in range(1, max(present, default=0) + 1):
        step = present.get(number)
        positions = Counter(_positions(step.records if step else ()))
        used.update(positions)
        wanted = range((number - 1) * data.global_batch, number * data.global_batch)
        missing = sum(position not in positions for position in wanted)
        foreign = sum(position not in wanted for position in positions)
        if missing and step and step.complete:
            lost += missing
            differences.append(f"step {number}: {missing} of its {data.global_batch} samples were used by no rank")
        elif missing:
            unwitnessed += missing
            differences.append(f"step {number}: reports are missing for {missing} of its {data.global_batch} samples")
        if foreign:
            differences.append(f"step {number}: {foreign} samples belong to another step")
        for record in step.records if step else ():
            if digest(order.index(position) for position in _positions((record,))) != record.digest:
                mismatched += 1
                differences.append(f"step {number}: rank {record.rank} used other samples than its positions have")
    repeated = {position: times - 1 for position, times in used.items() if times > 1}
    differences += [f"position {at}: used {times + 1} times" for at, times in sorted(repeated.items())]
    return DataReport(
        steps=len(lineage), global_batch=data.global_batch, used=used.total(), lost=lost,
        repeated=sum(repeated.values()), unwitnessed=unwitnessed, mismatched=mismatched,
        epochs=dict(sorted(Counter(position_of(at, data.left_out) // data.samples for at in used.elements()).items())),
        differences=tuple(differences[:DIFFERENCES_SHOWN]),
        skipped=sum(1 for step in lineage for r in step.records if r.skipped for _ in _positions((r,))),
        quarantined=sum(last - first for first, last in data.left_out),
    )  # fmt: skip


def _by_attempt(records: Iterable[Record]) -> dict[int, dict[int, Step]]:
    """attempt -> step -> what its ranks did; a report that came twice counts once."""
    reports: dict[int, dict[int, dict[int, Stepped]]] = {}
    for record in records:
        if isinstance(record, Stepped):
            done = record.record
            reports.setdefault(done.attempt, {}).setdefault(done.step, {}).setdefault(done.rank, record)
    return {
        attempt: {number: _step(number, attempt, ranks) for number, ranks in numbers.items()}
        for attempt, numbers in reports.items()
    }


def _step(number: int, attempt: int, ranks: dict[int, Stepped]) -> Step:
    ordered = [ranks[rank] for rank in sorted(ranks)]
    return Step(number, attempt, max(item.at for item in ordered), tuple(item.record for item in ordered))


def _likely_base(attempt: int, by_attempt: dict[int, dict[int, Step]]) -> VersionId | None:
    """Where an attempt must have begun of which no decision is known: just before its first step."""
    first = min(by_attempt.get(attempt, {0: None}))
    earlier = max((other for other in by_attempt if other < attempt), default=0)
    return VersionId(earlier, first - 1) if earlier and first > 1 else None


def _without_overlap(descending: list[Step]) -> list[Step]:
    """Each step number once: the newest attempt's, which comes first."""
    seen: dict[int, Step] = {}
    for step in descending:
        seen.setdefault(step.number, step)
    return [seen[number] for number in sorted(seen, reverse=True)]


def _positions(records: Iterable[StepRecord]) -> Iterator[int]:
    return (position for record in records for first, last in record.ranges for position in range(first, last))


def _changes(opened: Sequence[DataOpened]) -> Iterator[str]:
    """What differs between attempts in the data they opened; it must be the same data all along."""
    first = opened[0]
    for data in opened[1:]:
        for name in ("samples", "global_batch", "seed", "shuffle"):
            if getattr(data, name) != getattr(first, name):
                yield f"attempt {data.attempt}: {name} is {getattr(data, name)}, was {getattr(first, name)}"


def _weighted(records: Sequence[StepRecord], name: str) -> float | None:
    reports = [(sum(last - first for first, last in r.ranges), r.logs[name]) for r in records if name in r.logs]
    samples = sum(weight for weight, _ in reports)
    if not reports:
        return None
    if not samples:
        return math.fsum(value for _, value in reports) / len(reports)
    return math.fsum(weight * value for weight, value in reports if weight) / samples
