"""What the scheduler of a cluster decides about: jobs that want machines, machines, and who gets which.

A *machine* is one node of the cluster as the scheduler sees it. A job takes `nodes` of them, each at most once, and of
each the processors and GPUs that its workers there need, so that small jobs can share one. Times are UTC seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Machine:
    """A node. `kind`: its node type; `usable`: False when it is quarantined or about to go; `spot`: can be taken away."""

    id: str
    kind: str = ""
    cpus: float = 1.0
    gpus: float = 0.0
    zone: str = ""
    rack: str = ""
    spot: bool = False
    usable: bool = True


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step on n nodes: `divided_s / n + fixed_s + per_node_s * (n - 1)`, the global batch being the same.

    divided_s    computation, which the nodes share
    fixed_s      what each does in any case
    per_node_s   what every further node adds to communication
    """

    divided_s: float = 1.0
    fixed_s: float = 0.0
    per_node_s: float = 0.0

    def on(self, nodes: float) -> float:
        """Seconds on so many nodes, at least one."""
        return self.divided_s / nodes + self.fixed_s + self.per_node_s * (nodes - 1)


@dataclass(frozen=True, slots=True)
class Wanting:
    """A job that has machines, or waits for some.

    nodes_min, nodes_max   it runs on these many, and on any number between that is a multiple of `multiple`
    priority      higher goes first, for its minimum and for more; among equals who runs, then who came first
    weight        of its speed against that of others of the same priority
    cpus, gpus    it needs of each node
    kinds         node types it may run on; empty: any, but all its nodes are of one
    on_demand_min so many of its nodes are not spot: they hold at least one copy of every shard
    times         its step on each kind of node, as measured; "" for kinds that were not
    steps_left    until it is through; inf: nobody knows
    resize_s      without a step, per resize, as measured
    held          ids of the machines it has
    changed_at    when it last got or lost one
    deadline_at   when it is to be through: among equals that wait, the earliest goes first
    """

    name: str
    user: str
    submitted_at: float
    nodes_min: int
    nodes_max: int
    multiple: int = 1
    priority: int = 0
    weight: float = 1.0
    cpus: float = 1.0
    gpus: float = 0.0
    kinds: tuple[str, ...] = ()
    on_demand_min: int = 0
    times: Mapping[str, StepTime] = field(default_factory=lambda: {"": StepTime()})
    steps_left: float = math.inf
    resize_s: float = 1.0
    held: tuple[str, ...] = ()
    changed_at: float = 0.0
    deadline_at: float = math.inf

    def time_on(self, kind: str) -> StepTime:
        """Its step on a kind of node; as on others where that was never measured."""
        return self.times.get(kind) or self.times.get("") or next(iter(self.times.values()))


@dataclass(frozen=True, slots=True)
class Rules:
    """How the cluster is shared.

    quotas       nodes that a user may have at a time, in all jobs; without an entry: any number
    starve_s     a job that has waited so long is not overtaken any more by later ones of its priority
    horizon_s    a resize must pay within so long
    gain_least   and be worth such a share of the job's speed per doubling of its nodes (0..1)
    stay         nodes that a job has count so many times what they would be worth to it, lest it lose and win them in turn
    settle_s     a job that was resized is not grown again before
    """

    quotas: Mapping[str, int] = field(default_factory=dict)
    starve_s: float = 1800.0
    horizon_s: float = 600.0
    gain_least: float = 0.05
    stay: float = 1.25
    settle_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Allocation:
    """The machines a job is to have from now on (none: it waits, or is suspended), and why, in words."""

    job: str
    nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Round:
    """One look at everything. `missing`: nodes of each kind ("": of any) that would be used if they were there."""

    allocations: tuple[Allocation, ...]
    missing: Mapping[str, int]
