"""How long does a job stand still, and how many steps does it lose, when a worker or a node of it is killed?

`python -m benchmarks.recovery [--quick] [--json]`, beside Ray Train on the same model and the same kind of cluster.
Two DDP workers on gloo, one per node of one CPU; each case is one job under which the same thing is killed again and
again, each time from full size. See README.md for the method and what was seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from benchmarks import kills, ray_train_peer
from benchmarks.figures import environment, median, memcpy_s, p95, say, table
from benchmarks.kills import Case, Measured

SMALL, LARGE = 4, 20
"""Layers: 200 MB and 1 GB of parameters and Adam moments."""
SIZES = {SMALL: "200 MB", LARGE: "1 GB"}
STANDBY_NODE, STANDBY_WORKER = "node, standby", "worker, standby"


def cases(quick: bool, repetitions: int) -> list[Case]:
    """What is killed under ray_dr."""
    kinds = [("worker", "worker", False), ("node", "node", False), ("node, spare", "node", True)]
    if quick:
        return [
            *(Case(name, kind, spare, SMALL, min(repetitions, 3)) for name, kind, spare in kinds[:2]),  # type: ignore[arg-type]
            Case(STANDBY_NODE, "node", False, SMALL, min(repetitions, 3), standby=True),
        ]
    return [
        Case(name, kind, spare, depth, repetitions)  # type: ignore[arg-type]
        for depth in (SMALL, LARGE)
        for name, kind, spare in kinds
    ] + [
        Case(name, kind, False, SMALL, repetitions, standby=True)  # type: ignore[arg-type]
        for name, kind in ((STANDBY_NODE, "node"), (STANDBY_WORKER, "worker"))
    ]


def peer_cases(quick: bool, repetitions: int) -> list[Case]:
    """What is killed under Ray Train: nodes; with a spare is its best case."""
    if quick:
        return [Case("node, spare", "node", True, SMALL, repetitions)]
    return [
        Case("node, spare", "node", True, SMALL, repetitions),
        Case("node", "node", False, SMALL, repetitions),
        Case("node, spare", "node", True, LARGE, repetitions),
    ]


def row(system: str, measured: Measured) -> list[str]:
    """One line of the table."""
    case = measured.case
    unknown = any(value != value for value in measured.detected)
    return [
        system, case.name, SIZES[case.depth], f"{len(measured.first_step)} of {case.kills}",
        _both([] if unknown else measured.detected), _both(measured.first_step), _both(measured.steps_lost, "g"),
        _both(measured.back), f"{median(measured.step_s):.2f}" if measured.step_s else "-",
    ]  # fmt: skip


def _both(values: list[Any], form: str = ".2f") -> str:
    return "-" if not values else f"{median(values):{form}} / {p95(values):{form}}"


def lists(measured: Measured) -> dict[str, Any]:
    """A case's single values."""
    known = [value for value in measured.detected if value == value]
    return {
        "case": measured.case.name, "state_bytes": measured.case.state_bytes, "detected_s": known,
        "first_step_s": measured.first_step, "steps_lost": measured.steps_lost, "back_at_full_size_s": measured.back,
        "step_s": measured.step_s, "phases": measured.phases, "failed": measured.failed,
    }  # fmt: skip


def result(ours: list[Measured], theirs: list[Measured]) -> dict[str, Any]:
    """What the last line says: medians, at 200 MB. Raises StopIteration when a case is missing."""
    worker, node = _find(ours, "worker"), _find(ours, "node")
    found: dict[str, Any] = {
        "worker_killed_s": median(worker.first_step), "worker_killed_p95_s": p95(worker.first_step),
        "node_killed_s": median(node.first_step), "node_killed_p95_s": p95(node.first_step),
        "steps_lost": median(node.steps_lost), "steps_lost_p95": p95(node.steps_lost),
    }  # fmt: skip
    for name, key in ((STANDBY_NODE, "standby_node_killed"), (STANDBY_WORKER, "standby_worker_killed")):
        for full in [m.first_step for m in ours if m.case.name == name and m.first_step]:
            found |= {f"{key}_s": median(full), f"{key}_p95_s": p95(full), f"{key}_kills": len(full)}
    small = [m for m in theirs if m.case.depth == SMALL and m.first_step]
    if small:
        best = min(small, key=lambda m: median(m.first_step))
        found |= {
            "ray_train_node_killed_s": median(best.first_step), "ray_train_node_killed_p95_s": p95(best.first_step),
            "ray_train_case": best.case.name, "ratio": median(best.first_step) / median(node.first_step),
        }  # fmt: skip
    return found


def _find(measured: list[Measured], name: str) -> Measured:
    return next(m for m in measured if m.case.name == name and m.case.depth == SMALL)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 MB only, few kills, under four minutes")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--kills", type=int, default=0, help="per case of ray_dr (default 5; 3 with --quick)")
    parser.add_argument("--peer-kills", type=int, default=0, help="per case of Ray Train (default 3; 1 with --quick)")
    parser.add_argument("--only", choices=["ray_dr", "ray_train"], help="one side only")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    if asked.only != "ray_dr":
        ray_train_peer.check_installed()
    begun, seen = time.monotonic(), environment()
    say(json.dumps(seen))
    repetitions, peer = asked.kills or (3 if asked.quick else 5), asked.peer_kills or (1 if asked.quick else 3)
    ours = [_run(kills.measure, c, "ray_dr") for c in cases(asked.quick, repetitions) if asked.only != "ray_train"]
    peers = peer_cases(asked.quick, peer)
    theirs = [_run(ray_train_peer.measure, c, "Ray Train") for c in peers if asked.only != "ray_dr"]
    head = ["system", "killed", "state", "kills", "detected s", "first step s", "steps lost", "back at 2 s", "step s"]
    print(table(head, [*(row("ray_dr", m) for m in ours), *(row("Ray Train", m) for m in theirs)]))
    floors = {SIZES[m.case.depth]: memcpy_s(m.case.state_bytes) for m in (*ours, *theirs)}
    told = ", ".join(f"{size} {seconds:.2f} s" for size, seconds in floors.items())
    print(f"median / p95; the floor, one copy of the state in memory: {told}")
    if asked.json:
        found = result(ours, theirs) if ours else {}
        detail = {"ray_dr": [lists(m) for m in ours], "ray_train": [lists(m) for m in theirs]}
        beside = {"memcpy_s": floors, "took_s": time.monotonic() - begun, "environment": seen}
        print(json.dumps({**found, **beside, **detail}))
    sys.exit(any(m.failed for m in (*ours, *theirs)))


def _run(measure: Any, case: Case, system: str) -> Measured:
    say(f"{system}: {case.name}, {SIZES[case.depth]}, {case.kills} kills")
    measured: Measured = measure(case)
    return measured


if __name__ == "__main__":
    main()
