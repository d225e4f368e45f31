"""Jobs' lives to be explained: the decisions are the machine's own, the findings are noted as the supervisor notes them."""

from __future__ import annotations

from ray_dr.model.checkpoint import VersionId
from ray_dr.model.codec import to_json
from ray_dr.model.events import (
    FirstStep,
    Hung,
    InventoryTaken,
    NodeJoined,
    NodeLost,
    Opened,
    Tick,
    WorkerLost,
    WorkerRaised,
    WorkerReady,
    WorkerStopped,
)
from ray_dr.model.job import Job, StoreTier, Workers
from ray_dr.model.journal import Marked, Noted, Record, Restored
from ray_dr.model.signal import FaultKind, Finding, Subject
from tests.unit.stored_life import NAME, Life, begun

A, B = Subject("a", "a/0.1", 0), Subject("b", "b/0.1", 1)
ECHO = "RuntimeError: Connection closed by peer"
ERROR = "ValueError: shape mismatch"
BOTH_NEEDED = Job(NAME, StoreTier("memory://unused"), Workers(2, 2, 2))


def noted(at: float, kind: FaultKind, subject: Subject, evidence: str, *, since: float | None = None, by: str = "",
          **more: object) -> Noted:  # fmt: skip
    """A finding in the journal; `at` in UTC seconds."""
    finding = Finding(by or kind.value, kind, (subject,), 0.0, 0.0, evidence, **more)  # type: ignore[arg-type]
    fields = {key: value for key, value in to_json(finding).items() if key not in ("at", "since")}
    return Noted(at, "finding", {**fields, "began": at if since is None else since})


def echo(at: float, subject: Subject, step: int = 5) -> tuple[Noted, WorkerRaised]:
    """A rank's broken collective: as it is noted, and as the machine hears it."""
    evidence = f"{subject} raised after step {step}: {ECHO}"
    finding = noted(at, FaultKind.COLLECTIVE_BROKEN, subject, evidence, by="exceptions", step=step, error=ECHO)
    return finding, WorkerRaised(at, subject.worker, 1, ECHO, True, step)


def five_steps(spec: Job | None = None) -> Life:
    """Two ranks that have done five steps, the third of which every node holds."""
    life = begun(spec) if spec else begun()
    life.do(1, range(2, 6), 2, since=99.9)
    return life


def go_on(life: Life, *, at: float, world: int, attempt: int = 2, base: int = 3) -> None:
    """The next group reads version `base`, does what was lost again, and one step more."""
    life.records += [
        Marked(at + 0.1, attempt, "group_formed", 0.1),
        *(Restored(at + 0.4, attempt, rank, VersionId(1, base), {"memory": 10}, 0.2, 0.1) for rank in range(world)),
    ]
    life.do(attempt, range(base + 1, base + 2), world, since=at + 0.6 - base - 1)
    life.meet(FirstStep(at + 0.6, attempt, base + 1))
    life.do(attempt, range(base + 2, 7), world, since=at + 0.6 - base - 1)


def killed_worker() -> list[Record]:
    """Rank 1's process is killed after step 5; rank 0's broken collective is heard of first; another process takes its place."""
    life = five_steps()
    finding, raised = echo(105.05, A)
    life.records.append(finding)
    life.meet(raised, WorkerLost(105.06, "b/0.1", "b", "its connection closed", 5), InventoryTaken(105.1, 1, VersionId(1, 3)))
    go_on(life, at=105.2, world=1)
    return life.records


def lost_node() -> list[Record]:
    """Node b is killed: a closed connection, the echo on rank 0, one rank goes on."""
    life = five_steps()
    life.records.append(noted(105.0, FaultKind.NODE_GONE, Subject("b"), "node b is gone: its agent's connection closed"))
    life.meet(NodeLost(105.01, "b", "its agent's connection closed", 5))
    finding, raised = echo(105.03, Subject("a", "a/0.1"))
    life.records.append(finding)
    life.meet(raised, InventoryTaken(105.1, 1, VersionId(1, 3)))
    go_on(life, at=105.2, world=1)
    return life.records


def hang() -> list[Record]:
    """Rank 1 is stuck in a forward pass: suspected, confirmed, and ended when recovery.hang is over."""
    life = five_steps()
    words = "rank 1 in forward of step 6 for 5.0 s; 1 wait for it"
    life.records += [
        noted(109.9, FaultKind.HANG, B, words, since=104.9, stage="suspected", step=6),
        noted(110.2, FaultKind.HANG, B, words.replace("5.0", "5.3"), since=104.9, step=6),
    ]
    life.meet(
        Hung(164.9, 1, ("b/0.1",), words.replace("5.0", "5.3"), 5), WorkerStopped(165.0, "a/0.1", 1, 5),
        InventoryTaken(165.1, 1, VersionId(1, 3)),
    )  # fmt: skip
    go_on(life, at=165.2, world=1)
    return life.records


def frozen_node() -> list[Record]:
    """Node b is stopped: nothing comes from it, and it is given up; rank 0's collective breaks only then."""
    life = five_steps()
    words = "node b has said nothing for 1.50 s (suspicion 11)"
    life.records.append(noted(106.4, FaultKind.NODE_FROZEN, Subject("b"), words, since=104.9))
    life.meet(NodeLost(106.4, "b", words, 5))
    finding, raised = echo(106.45, Subject("a", "a/0.1"))
    life.records.append(finding)
    life.meet(raised, InventoryTaken(106.5, 1, VersionId(1, 3)))
    go_on(life, at=106.6, world=1)
    return life.records


def same_error_twice() -> list[Record]:
    """Rank 1 raises at step 5, and again where it comes there the second time."""
    life = five_steps()
    life.records.append(
        noted(105.0, FaultKind.EXCEPTION, B, f"rank 1 raised after step 5: {ERROR}", by="exceptions", step=5, error=ERROR)
    )
    life.meet(
        WorkerRaised(105.0, "b/0.1", 1, ERROR, False, 5), WorkerStopped(105.1, "a/0.1", 1, 5),
        InventoryTaken(105.15, 1, VersionId(1, 3)),
    )  # fmt: skip
    life.records += [Restored(105.6, 2, rank, VersionId(1, 3), {"memory": 10}, 0.2, 0.1) for rank in range(2)]
    life.do(2, range(4, 5), 2, since=101.8)
    life.meet(FirstStep(105.8, 2, 4))
    life.do(2, range(5, 6), 2, since=101.8)
    life.records.append(
        noted(107.0, FaultKind.EXCEPTION, B, f"rank 1 raised after step 5: {ERROR}", by="exceptions", step=5, error=ERROR)
    )
    life.meet(WorkerRaised(107.0, "b/0.1", 2, ERROR, False, 5))
    return life.records


def suspended() -> list[Record]:
    """Node b is lost, and the job needs two."""
    life = five_steps(BOTH_NEEDED)
    life.meet(
        NodeLost(105.0, "b", "its agent's connection closed", 5), WorkerStopped(105.1, "a/0.1", 1, 5),
        InventoryTaken(105.2, 1, VersionId(1, 3)), Tick(120.0),
    )  # fmt: skip
    return life.records


def resumed() -> list[Record]:
    """The same, and after a minute another node comes."""
    life = five_steps(BOTH_NEEDED)
    life.meet(
        NodeLost(105.0, "b", "its agent's connection closed", 5), WorkerStopped(105.1, "a/0.1", 1, 5),
        InventoryTaken(105.2, 1, VersionId(1, 3)), NodeJoined(163.0, "c"), WorkerReady(165.0, "c/0.1", "c"),
        InventoryTaken(165.1, 1, VersionId(1, 3)),
    )  # fmt: skip
    go_on(life, at=165.2, world=2)
    return life.records


def queued() -> list[Record]:
    """Two nodes are wanted, one is there."""
    life = Life()
    life.open()
    life.meet(Opened(99.0, 1, 0), NodeJoined(99.1, "a"), WorkerReady(99.3, "a/0.1", "a"))
    return life.records
