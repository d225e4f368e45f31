"""`ray-dr why` of training that went wrong by itself, and of a replica that is wrong."""

from __future__ import annotations

from ray_dr.cli.why import describe, standing
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.codec import to_json
from ray_dr.model.events import Corrupted, Diverged, InventoryTaken, Tick, WorkerStopped
from ray_dr.model.journal import Noted, Record
from ray_dr.model.signal import FaultKind, Finding
from ray_dr.recovery.why import tell
from tests.unit.lives import B, five_steps, go_on, noted

LOST = "steps 3 to 5 were skipped one after the other: gradients were not finite"


def diverged(kind: FaultKind = FaultKind.NON_FINITE, words: str = LOST) -> list[Record]:
    """Three skipped steps, and back to step 2."""
    life = five_steps()
    finding = to_json(Finding("divergence", kind, (), 0.0, 0.0, words, numbers={"onset": 3.0}, step=5))
    life.records.append(Noted(105.0, "finding", {k: v for k, v in finding.items() if k not in ("at", "since")}))
    life.meet(
        Diverged(105.01, 1, 3, words, 5, 8), WorkerStopped(105.05, "a/0.1", 1, 5), WorkerStopped(105.05, "b/0.1", 1, 5),
        InventoryTaken(105.1, 1, VersionId(1, 2)),
    )  # fmt: skip
    go_on(life, at=105.2, world=2, base=2)
    return life.records


def text(records: list[Record]) -> str:
    told = tell(records)
    assert told is not None
    return " ".join(describe(told.accounts[-1], told, now=180.0).split())


def test_numbers_that_are_not_finite_step_after_step() -> None:
    told = text(diverged())
    assert "after step 5: training met numbers that are not finite, step after step" in told
    assert f"{LOST} (divergence)" in told
    assert "3 steps lost and done again" in told
    assert "with the samples that come behind: those that led there are left out" in told
    assert "the same samples" not in told


def test_a_loss_that_did_not_come_back() -> None:
    told = text(diverged(FaultKind.LOSS_SPIKE, "loss 9 at step 5, usually 1, and above since step 3"))
    assert "after step 5: the loss jumped, and did not come back" in told


def test_a_replica_that_is_wrong_is_named() -> None:
    life = five_steps()
    words = "parameters after step 5 differ on rank 1: 2 of 3 replicas agree"
    life.records.append(noted(105.0, FaultKind.CORRUPTION, B, words, step=5))
    life.meet(
        Corrupted(105.01, 1, 3, ("b/0.1",), words, 5), WorkerStopped(105.05, "a/0.1", 1, 5),
        InventoryTaken(105.1, 1, VersionId(1, 3)),
    )  # fmt: skip
    go_on(life, at=105.2, world=1)
    told = text(life.records)
    assert "rank 1 (worker b/0.1) held wrong parameters" in told
    assert "give node b back" in told
    assert "with the same samples: none lost, none used twice" in told


def test_two_replicas_of_which_nobody_knows() -> None:
    life = five_steps()
    words = "parameters after step 5 differ on rank 0, 1: no majority: replay the step to find out whose"
    life.meet(
        Corrupted(105.01, 1, 3, (), words, 5), WorkerStopped(105.05, "a/0.1", 1, 5), WorkerStopped(105.05, "b/0.1", 1, 5),
        InventoryTaken(105.1, 1, VersionId(1, 3)),
    )  # fmt: skip
    go_on(life, at=105.2, world=2)
    assert "replicas came to differ, and nobody can tell which is wrong" in text(life.records)


def test_the_end_names_steps_and_samples_and_is_not_to_be_run_again() -> None:
    life = five_steps()
    for attempt, (onset, last) in enumerate(((3, 5), (4, 6), (3, 5), (4, 6)), 1):
        at = 100.0 + 10 * attempt
        life.meet(Diverged(at, attempt, onset, f"gradients of steps {onset} to {last}", last, 8))
        for worker in ("a/0.1", "b/0.1"):
            life.meet(WorkerStopped(at + 0.1, worker, attempt, last))
        life.meet(InventoryTaken(at + 0.2, attempt, VersionId(attempt, onset - 1)))
        life.meet(Tick(at + 8.0))  # what fails again and again is not tried again at once
    told = tell(life.records)
    assert told is not None
    said = " ".join(standing("night", told, now=180.0).split())
    assert "exit code" in said
    assert "do not resubmit" in said
    reason = getattr(told.standing, "reason", "")
    assert "after 3 steps back" in reason
    assert "samples left out: 16 to " in reason
