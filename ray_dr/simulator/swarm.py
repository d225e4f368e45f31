"""What one seed's world is like: its size, its speeds, and which faults it has at which rates.

Every seed switches faults on and off by itself: where all are always on, one hides what another would show.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import StrEnum

from ray_dr.model.job import Job, MemoryTier, Recovery, StoreTier, Workers

DAY_S = 86_400.0


class Fault(StrEnum):
    """What can befall a world, again and again."""

    WORKER_CRASH = "worker_crash"
    WORKER_RAISE = "worker_raise"
    WORKER_HANG = "worker_hang"
    NODE_DEATH = "node_death"
    NODE_FREEZE = "node_freeze"
    NODE_CUT = "node_cut"
    """No way between a node and all others."""
    NODE_UNHEARD = "node_unheard"
    """No way between a node and the supervisor: training goes on."""
    NODE_SLOW = "node_slow"
    NODE_FLAP = "node_flap"
    PREEMPTION = "preemption"
    RACK_LOSS = "rack_loss"
    RACK_CUT = "rack_cut"
    STORE_DOWN = "store_down"
    STORE_SLOW = "store_slow"
    SUPERVISOR_KILL = "supervisor_kill"
    SUPERVISOR_CUT = "supervisor_cut"
    """Off the network for so long that another one takes the job over; then it is back, and goes on as if it were alone."""
    HEAD_LOSS = "head_loss"
    STOP_REQUEST = "stop_request"
    DIVERGENCE = "divergence"
    """Training goes wrong, and what was saved since is worth nothing."""
    CORRUPTION = "corruption"
    """One worker's parameters are wrong, or two differ and nobody knows which are."""


PER_NODE_DAY = {
    Fault.WORKER_CRASH: 0.004, Fault.WORKER_RAISE: 0.001, Fault.WORKER_HANG: 0.001, Fault.NODE_DEATH: 0.005,
    Fault.NODE_FREEZE: 0.001, Fault.NODE_CUT: 0.001, Fault.NODE_UNHEARD: 0.0005, Fault.NODE_SLOW: 0.002,
    Fault.NODE_FLAP: 0.0005, Fault.PREEMPTION: 0.002, Fault.RACK_LOSS: 0.0002, Fault.RACK_CUT: 0.0002,
}  # fmt: skip
"""Per node and day (Llama 3: 0.004 interrupts; Meta's RSC: 0.002 to 0.006)."""
PER_DAY = {
    Fault.STORE_DOWN: 0.3, Fault.STORE_SLOW: 0.5, Fault.SUPERVISOR_KILL: 0.3, Fault.SUPERVISOR_CUT: 0.05, Fault.HEAD_LOSS: 0.03,
    Fault.STOP_REQUEST: 0.02, Fault.DIVERGENCE: 0.02, Fault.CORRUPTION: 0.01,
}  # fmt: skip
"""Per job and day."""
AT_MOST = {Fault.HEAD_LOSS: 1.5, Fault.STOP_REQUEST: 0.5, Fault.RACK_LOSS: 2.0, Fault.SUPERVISOR_KILL: 4.0,
           Fault.SUPERVISOR_CUT: 2.0, Fault.DIVERGENCE: 1.0, Fault.CORRUPTION: 1.0}  # fmt: skip
"""Expected in any life beside those, however short; others: COMPRESSED."""
COMPRESSED = 6.0
MANY = 24
"""With more workers, what befalls each of them when something is done with all becomes less likely: or nothing would succeed."""
STANDBYS = 0.3
"""So often a job has standbys."""
CALM = 30.0
"""And so much less likely again in lives of days, which are to be like those of clusters."""


@dataclass(frozen=True, slots=True)
class Swarm:
    """Times in seconds, probabilities 0..1. `rates`: of each fault, per second.

    copy_s             from a part being sealed until the copies of it are there
    write_s            from a step's end until its version can be committed
    raises             a broken collective raises in the others (gloo); else they wait in it until they are aborted
    stuck              probability that a worker does not leave a broken step
    unruly             reports arrive twice and out of order
    call_lost          probability that a call without an answer does not arrive
    start_fails        probability that a worker ends before it is ready
    autoscale_s        mean time until a node asked for is there; inf: it never is
    reboot_s           mean time until a lost machine is back by itself; inf: never
    applied_yet_failed probability that a commit is made, and reported as failed
    poison             a step at which the program always raises, 0: none
    core_only          when the faults stop, no more than `min_nodes_to_run` nodes are left
    twins              every rank has all of the state: what one survivor has is enough
    torn               probability that what a worker leaves a broken step with is whole for nobody
    """

    job: Job
    machines: int
    racks: int
    duration_s: float
    rates: dict[Fault, float]
    step_s: float
    seal_s: float
    copy_s: float
    write_s: float
    delay_s: float
    raises: bool
    stuck: float
    unruly: bool
    call_lost: float
    worker_start_s: float
    start_fails: float
    autoscale_s: float
    reboot_s: float
    applied_yet_failed: float
    restart_s: float
    poison: int
    total_steps: int
    core_only: bool
    twins: bool = False
    torn: float = 0.0


def draw(dice: random.Random, *, nodes: int | None = None, per_node: int | None = None,
         duration_s: float | None = None) -> Swarm:  # fmt: skip
    """One seed's world. `nodes`, `per_node` (workers) and `duration_s` of faults: by chance, and small, where not given. A life
    of a given length does not end before."""
    most = nodes or dice.randint(1, 8)
    least = dice.randint(1, most) if dice.random() < 0.7 else most
    run_least = dice.randint(1, least) if dice.random() < 0.7 else least
    workers = Workers(least, most, run_least, per_node or dice.choice((1, 1, 1, 2, 3)))
    recovery = Recovery(
        unwind_s=15.0, start_s=dice.choice((60.0, 300.0)), settle_s=dice.choice((1.0, 1.0, 10.0)),
        attempts_without_progress=dice.choice((3, 5, 5, 10)), silent_s=dice.choice((2.0, 5.0, 5.0)),
        hang_s=dice.choice((0.0, 30.0, 300.0)),
    )  # fmt: skip
    job = Job("sim", StoreTier("memory://"), workers, MemoryTier(copies=dice.choice((1, 2, 2, 2, 3))), recovery)
    long = duration_s is not None
    duration_s = duration_s or dice.uniform(600.0, 3600.0)
    step_s = dice.choice((0.2, 1.0, 5.0))
    crowd = max(1.0, most * workers.per_node / MANY) * (CALM if long else 1.0)
    return _with_standbys(Swarm(
        job=job, machines=most + dice.choice((0, 0, 1, 2, most // 8)), racks=max(1, most // dice.choice((1, 2, 4, 16))),
        duration_s=duration_s, rates=_rates(dice, most, duration_s), step_s=step_s, seal_s=step_s * dice.uniform(0.05, 1.5),
        copy_s=step_s * dice.uniform(0.05, 3.0), write_s=dice.uniform(0.5, 40.0), delay_s=dice.choice((0.001, 0.02, 0.3)),
        raises=dice.random() < 0.5, stuck=dice.choice((0.0, 0.0, 0.02, 0.3)) / crowd,
        unruly=dice.random() < 0.3, call_lost=dice.choice((0.0, 0.0, 0.001, 0.1)) / crowd,
        worker_start_s=dice.choice((3.0, 10.0, 30.0)), start_fails=dice.choice((0.0, 0.0, 0.05, 0.3)) / crowd,
        autoscale_s=dice.choice((60.0, 300.0, 900.0, float("inf"))), reboot_s=dice.choice((60.0, 300.0, float("inf"))),
        applied_yet_failed=dice.choice((0.0, 0.0, 0.1)), restart_s=dice.choice((0.5, 3.0, 20.0)),
        poison=dice.randint(1, max(1, int(duration_s / step_s))) if dice.random() < 0.05 and not long else 0,
        total_steps=int(duration_s / step_s * (10.0 if long else dice.choice((0.5, 1.0, 2.0, 10.0, 10.0, 10.0)))),
        core_only=dice.random() < 0.4, twins=int(1e3 * duration_s) % 2 == 0, torn=(0.0, 0.1, 1.0)[int(1e6 * duration_s) % 3],
    ))  # fmt: skip


def _with_standbys(swarm: Swarm) -> Swarm:
    """Some worlds' jobs have nodes or processes that stand by. That is drawn from what else was: the other worlds' dice fall
    as if there were none."""
    chance = random.Random(repr((swarm.job.workers, swarm.duration_s, swarm.seal_s)))
    if chance.random() >= STANDBYS:
        return swarm
    nodes, processes = chance.choice(((1, 0), (2, 0), (0, 1), (1, 1)))
    workers = replace(swarm.job.workers, standby_nodes=nodes, standby_processes=processes)
    machines = swarm.machines + chance.choice((0, nodes))
    return replace(swarm, job=replace(swarm.job, workers=workers), machines=machines)


def _rates(dice: random.Random, nodes: int, duration_s: float) -> dict[Fault, float]:
    days = duration_s / DAY_S
    on = dice.choice((0.15, 0.4, 0.8))
    rates = {}
    for fault in Fault:
        usual = nodes * days * PER_NODE_DAY.get(fault, 0.0) + days * PER_DAY.get(fault, 0.0)
        expected = usual * dice.uniform(0.3, 2.0) + AT_MOST.get(fault, COMPRESSED) * dice.random() ** 2
        if dice.random() < on:
            rates[fault] = expected / duration_s
    return rates
