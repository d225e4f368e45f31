"""What the supervisor comes to hold for the cause while it gets over a failure, and what that makes the failure count as."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ray_dr.model.events import Diagnosed, WorkerLost
from ray_dr.model.journal import Decided, Noted, Record
from ray_dr.model.recovery import Recovering
from ray_dr.model.signal import FaultKind, Subject
from ray_dr.recovery import inquest
from ray_dr.recovery.inquest import Inquest
from ray_dr.recovery.machine import initial, step
from ray_dr.recovery.policy import policy_of
from ray_dr.recovery.why import tell
from tests.unit import lives
from tests.unit.lives import ECHO, A, B, five_steps, noted
from tests.unit.stored_life import SPEC

POLICY = policy_of(SPEC)


def verdicts(records: Sequence[Record]) -> list[Diagnosed]:
    """What is said while the records come about, as a host would that asks after each."""
    hearing, said, state = Inquest(), [], initial()
    for record in records:
        hearing.hear(record)
        state = record.state if isinstance(record, Decided) else state
        verdict = hearing.verdict(state, record.at)
        if verdict is not None:
            said.append(verdict)
    return said


def announced() -> list[Record]:
    """Node b is taken away 15 s after it was announced."""
    records = lives.lost_node()
    at = next(at for at, record in enumerate(records) if isinstance(record, Noted))
    words = "node b will be taken away in 30 s (spot)"
    notice = noted(90.0, FaultKind.PREEMPTION, Subject("b"), words, severity="warning", numbers={"left_s": 30.0})
    return [*records[:at], notice, *records[at:]]


@pytest.mark.parametrize(
    ("life", "cause"),
    [("killed_worker", []), ("lost_node", []), ("hang", []), ("frozen_node", [FaultKind.NODE_FROZEN]), ("same_error_twice", [])],
)
def test_only_a_cause_that_the_machine_does_not_hold_is_said(life: str, cause: list[FaultKind]) -> None:
    # Here the findings come again with every later record, and so does the verdict that nobody takes.
    assert list(dict.fromkeys(verdict.cause for verdict in verdicts(getattr(lives, life)()))) == cause


def test_a_node_that_was_announced_to_go_was_preempted() -> None:
    said = verdicts(announced())
    assert said[0].cause is FaultKind.PREEMPTION
    assert (said[0].incident, said[0].subject) == (1, "b")


@pytest.mark.parametrize("life", ["killed_worker", "lost_node", "hang", "frozen_node"])
def test_in_the_end_the_machine_holds_for_the_cause_what_why_says(life: str) -> None:
    hearing, held, state = Inquest(), None, initial()
    for record in getattr(lives, life)():
        hearing.hear(record)
        if isinstance(record, Decided):
            state = step(state, record.event, POLICY).state
        verdict = hearing.verdict(state, record.at)
        if verdict is not None:
            state = step(state, verdict, POLICY).state
        held = state.phase.incident.cause if isinstance(state.phase, Recovering) else held
    told = tell(getattr(lives, life)())
    assert told is not None
    assert held is told.accounts[0].diagnosis.kind


def test_a_thousand_echoes_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    seen = inquest.diagnose
    monkeypatch.setattr(inquest, "diagnose", lambda records, *rest: asked.append(len(records)) or seen(records, *rest))
    life = five_steps()
    life.meet(WorkerLost(105.0, "b/0.1", "b", "killed", 5))
    hearing = Inquest()
    for record in life.records:
        hearing.hear(record)
    assert hearing.verdict(life.state, 105.0) is None  # type: ignore[arg-type]
    assert len(asked) == 1
    for _ in range(1000):
        hearing.hear(noted(105.1, FaultKind.COLLECTIVE_BROKEN, A, "rank 0 raised", error=ECHO))
        hearing.hear(noted(105.1, FaultKind.STRAGGLER, A, "rank 0 is slow", severity="warning"))
        hearing.verdict(life.state, 105.1)  # type: ignore[arg-type]
    assert len(asked) == 1
    for _ in range(1000):
        hearing.hear(noted(105.1, FaultKind.EXCEPTION, B, "rank 1 raised", error="ValueError"))
        hearing.verdict(life.state, 105.1)  # type: ignore[arg-type]
    assert len(asked) == inquest.VERDICTS_MOST
    assert max(asked) <= inquest.RECORDS_MOST


def test_a_note_of_another_version_is_no_witness() -> None:
    strange = {"kind": "of another version", "stage": "confirmed", "severity": "critical"}
    assert verdicts([Noted(90.0, "finding", strange), *lives.lost_node()]) == []
