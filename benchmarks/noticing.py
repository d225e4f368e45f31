"""How soon does a job notice what does not announce itself, and does it keep still when nothing is wrong?

`python -m benchmarks.noticing [--quick] [--json] [--minutes M]`. One job of two workers per case, on a local cluster; steps'
times are lognormal with a 99th percentile of five medians, drawn by each rank for itself.

    frozen       SIGSTOP to all of a node's processes: seconds until it is taken for lost
    hung         one rank waits for a file in the middle of a step: seconds until that rank is named
    supervisor   SIGKILL to the supervisor: steps done again, and the longest step while it is away against the median of those
                 before; in this case steps take equally long
    undisturbed  M minutes of nothing at all: findings above suspicion (there must be none)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks import kills, program
from benchmarks.figures import environment, median, p95, say, table
from benchmarks.kills import NODES, Story
from ray_dr.actors import cluster as names
from ray_dr.actors.launch import submit
from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.events import NodeLost
from ray_dr.model.job import Job, StoreTier, Workers
from ray_dr.model.journal import Decided, Noted, Stepped

if TYPE_CHECKING:
    from ray_dr.train.context import Context

MEDIAN_S, SIGMA = 0.05, 0.692
"""Of a step's time: lognormal, exp(2.326 x 0.692) = 5 medians at the 99th percentile."""
LEARNED = 120
"""Steps before something is done: limits are learned from those of an attempt so far."""
AFTER_S = 8.0
CASES = ("frozen", "hung", "supervisor")


def train(ctx: Context) -> None:
    """Steps that take most of their time asleep; a rank whose number is in the file `hold` waits until it is not."""
    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    data = ctx.data(program.Samples(64), global_batch=kills.BATCH, collate=program.same)
    state = ctx.restore(model=model, optimizer=optimizer, data=data)
    hold, chance = Path(str(ctx.settings["hold"])), random.Random(f"{ctx.world.attempt} {ctx.world.rank}")
    for batch in ctx.steps(state, until=10**7):
        time.sleep(chance.lognormvariate(0.0, float(ctx.settings["sigma"])) * MEDIAN_S)
        while hold.exists() and hold.read_text() == str(ctx.world.rank):
            time.sleep(0.02)
        program.learn(model, optimizer, batch)


@dataclass(slots=True)
class Seen:
    """Of one case, an entry per repetition. `alarms`: findings that nothing was behind."""

    case: str
    noticed_s: list[float] = field(default_factory=list)
    limit_s: list[float] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)
    """The longest step around it over the median of those before."""
    alarms: list[str] = field(default_factory=list)
    minutes: float = 0.0


class Bench:
    """One job and its journal on one cluster."""

    def __init__(self, cluster: LocalCluster, folder: Path, sigma: float = SIGMA) -> None:
        self.cluster, self.hold = cluster, folder / "hold"
        job = Job(kills.JOB, StoreTier(f"file://{folder / 'store'}"), Workers(NODES, NODES, 1),
                  settings={"hold": str(self.hold), "sigma": sigma})  # fmt: skip
        submit(train, job)
        self.story = Story(job)

    def frozen(self, seen: Seen) -> None:
        """A node that stands still, until another one is in its place."""
        self._settle()
        group = self.story.group
        members = kills.members_of(group)
        rank = next(rank for rank in range(NODES) if not kills.hosts_supervisor(self.cluster, members[rank]["node"]))
        node, before = members[rank]["node"], time.time()
        self.cluster.freeze_node(node)
        self.story.until(lambda: self._lost(node, before) is not None, "the frozen node to be noticed")
        seen.noticed_s.append((self._lost(node, before) or 0.0) - before)
        seen.limit_s.append(2.0)
        self.cluster.kill_node(node)
        self.cluster.add_node()
        self.story.until(lambda: self.story.first_step(group.attempt, NODES) is not None, "two workers again")

    def hung(self, seen: Seen) -> None:
        """A rank that waits for what never comes, until it is let go on."""
        self._settle()
        attempt, p99_s = self.story.group.attempt, statistics.quantiles(self._took(), n=100)[-1]
        rank, before = len(seen.noticed_s) % NODES, time.time()
        self.hold.write_text(str(rank))
        self.story.until(lambda: self._named(rank, before) is not None, "the hung rank to be named")
        seen.noticed_s.append((self._named(rank, before) or 0.0) - before)
        seen.limit_s.append(max(5.0, 3 * p99_s))
        self.hold.unlink()
        newest = max(self.story.steps_done(attempt))
        self.story.until(lambda: max(self.story.steps_done(attempt)) > newest + LEARNED, "steps after it was let go on")

    def supervisor(self, seen: Seen) -> None:
        """The supervisor's process ends, and another one takes over."""
        self._settle()
        attempt, usual_s = self.story.group.attempt, statistics.median(self._took())
        handle = ray.get_actor(names.supervisor_name(kills.JOB), namespace=names.NAMESPACE)
        killed = time.time()
        os.kill(ray.get(handle.snapshot.remote())["supervisor"]["pid"], signal.SIGKILL)
        newest = max(self.story.steps_done(attempt))
        time.sleep(AFTER_S)
        self.story.until(lambda: max(self.story.steps_done(self.story.group.attempt)) > newest + LEARNED, "steps after it")
        again = newest - min(self.story.steps_done(attempt + 1), default=newest + 1) + 1
        seen.steps_lost.append(max(0, again))
        longest = max(r.record.took_s for r in self.story.records if isinstance(r, Stepped) and r.at > killed)
        seen.longest.append(longest / usual_s)

    def undisturbed(self, seen: Seen, minutes: float) -> None:
        """Nothing happens."""
        self._settle()
        until = time.time() + 60 * minutes
        while time.time() < until:
            newest = max(self.story.steps_done(self.story.group.attempt))
            self.story.until(lambda least=newest: self._steps() > least, "the next steps")
            time.sleep(1.0)
            self.story.records = [r for r in self.story.records if not isinstance(r, Stepped) or r.at > time.time() - 60]
        seen.minutes = minutes
        seen.alarms = [json.dumps(note.fields) for note in self._findings(0.0)]
        seen.steps_lost.append(len(self.story.groups) - 1)

    def _settle(self) -> None:
        self.story.until(lambda: self.story.settled(LEARNED), f"two workers at work for {LEARNED} steps")

    def _steps(self) -> int:
        return max(self.story.steps_done(self.story.group.attempt))

    def _took(self) -> list[float]:
        return [r.record.took_s for r in self.story.records if isinstance(r, Stepped)]

    def _lost(self, node: str, since: float) -> float | None:
        decided = (r for r in self.story.records if isinstance(r, Decided) and isinstance(r.event, NodeLost))
        return next((r.at for r in decided if r.at > since and r.event.node == node), None)  # type: ignore[union-attr]

    def _named(self, rank: int, since: float) -> float | None:
        worker = self.story.group.members[rank]
        for note in self._findings(since):
            subjects = note.fields.get("subjects")
            if note.fields.get("kind") == "hang" and isinstance(subjects, list) and any(s["worker"] == worker for s in subjects):
                return note.at
        return None

    def _findings(self, since: float) -> Iterator[Noted]:
        for record in self.story.records:
            if isinstance(record, Noted) and record.name == "finding" and record.at > since and not record.fields.get("shadow"):
                yield record


def measure(case: str, repetitions: int, minutes: float) -> Seen:
    """One case on a cluster of its own."""
    say(f"{case}: {minutes:g} minutes" if case == "undisturbed" else f"{case}: {repetitions} times")
    seen = Seen(case)
    size = kills.Case(case, "node", False, 1, 1)
    with tempfile.TemporaryDirectory(prefix="rdb-") as folder, kills.local_cluster(size) as cluster:
        ray.init(address=cluster.address, namespace=names.NAMESPACE, log_to_driver=False)
        bench = Bench(cluster, Path(folder), 0.0 if case == "supervisor" else SIGMA)
        if case == "undisturbed":
            bench.undisturbed(seen, minutes)
        else:
            for _ in range(repetitions):
                getattr(bench, case)(seen)
                longest = f"longest step {_last(seen.longest)} x median"
                say(f"  noticed {_last(seen.noticed_s)}, lost {_last(seen.steps_lost)}, {longest}")
        with contextlib.suppress(Exception):
            ray.shutdown()
    return seen


def _last(values: list[float] | list[int]) -> str:
    return f"{values[-1]:.2f}" if values else "-"


def row(seen: Seen) -> list[str]:
    """One line of the table."""
    noticed = f"{median(seen.noticed_s):.2f} / {p95(seen.noticed_s):.2f} / {max(seen.noticed_s):.2f}" if seen.noticed_s else "-"
    return [
        seen.case, str(max(len(seen.noticed_s), len(seen.longest))), noticed,
        f"{median(seen.limit_s):.2f}" if seen.limit_s else "-", str(max(seen.steps_lost, default="-")),
        f"{max(seen.longest):.2f}" if seen.longest else "-", str(len(seen.alarms)) if seen.minutes else "-",
    ]  # fmt: skip


def result(found: list[Seen]) -> dict[str, object]:
    """What the last line says."""
    of = {seen.case: seen for seen in found}
    out: dict[str, object] = {}
    for case in ("frozen", "hung"):
        if case in of:
            out |= {f"{case}_noticed_s": median(of[case].noticed_s), f"{case}_noticed_max_s": max(of[case].noticed_s)}
    if "supervisor" in of:
        seen = of["supervisor"]
        out |= {"supervisor_steps_lost": max(seen.steps_lost), "supervisor_longest_step": max(seen.longest)}
    if "undisturbed" in of:
        out |= {"minutes": of["undisturbed"].minutes, "false_alarms": len(of["undisturbed"].alarms)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three of each, and two minutes undisturbed")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--repetitions", type=int, default=0, help="of each case (default 20; 3 with --quick)")
    parser.add_argument("--minutes", type=float, default=-1.0, help="undisturbed (default 60; 2 with --quick; 0: not at all)")
    parser.add_argument("--only", choices=[*CASES, "undisturbed"], help="one case")
    asked = parser.parse_args()
    minutes = asked.minutes if asked.minutes >= 0 else (2.0 if asked.quick else 60.0)
    chosen = [asked.only] if asked.only else [*CASES, *(["undisturbed"] if minutes else [])]
    found = [measure(case, asked.repetitions or (3 if asked.quick else 20), minutes) for case in chosen]
    head = ["case", "times", "noticed s (median / p95 / most)", "limit s", "steps lost", "longest step / median", "false alarms"]
    print(table(head, [row(seen) for seen in found]))
    for alarm in itertools.chain.from_iterable(seen.alarms for seen in found):
        print(f"false alarm: {alarm}")
    if asked.json:
        print(json.dumps({**result(found), "environment": environment()}))
    sys.exit(any(seen.alarms for seen in found))


if __name__ == "__main__":
    main()
