"""Seeds, one after the other: each a life in two phases. In the first, faults; in the second none, and all must be well.

Safety: the machine's invariants hold after every event, and the world's whenever what they speak of happens. Liveness: once
faults stop and enough nodes are well, the job runs, or is over, within `bound_s` of virtual time, and nothing is left over.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ray_dr.detection.hang import UNKNOWN_S
from ray_dr.model.recovery import Running
from ray_dr.simulator.breach import Breach
from ray_dr.simulator.faults import Faults
from ray_dr.simulator.listening import SLOWER
from ray_dr.simulator.promises import expect_well
from ray_dr.simulator.swarm import Swarm, draw
from ray_dr.simulator.training import Doing
from ray_dr.simulator.world import FROM_STORE_S, KEPT_EVENTS, RESUBMIT_S, World

LIVES_LEFT = 3
"""A job that faults had driven close to its end may be closed, and submitted again, so often afterwards."""
MORE, MORE_S = 20, 7.0


@dataclass(frozen=True, slots=True)
class Life:
    """One seed's. `broken`: what did not hold, empty when all did; `last`: the last events then, oldest first.

    virtual_s   seconds lived; lost_steps: done, lost and done again; worst_lost_steps: at once
    found       by which detector, how often; false_alarms: nodes taken for lost that were well
    faults      that took effect, by kind
    """

    seed: int
    virtual_s: float
    events: int
    attempts: int
    breaks: int
    killed: int
    lost_steps: int
    worst_lost_steps: int
    false_alarms: int
    found: Mapping[str, int]
    faults: Mapping[str, int]
    broken: str = ""
    last: tuple[str, ...] = ()


def bound_s(swarm: Swarm) -> float:
    """Seconds after the last fault within which a job with enough nodes runs: it may just have begun a start that cannot
    succeed, wait for a hung worker until it is sure that it hangs, and then make a whole start, twice."""
    recovery, start_s = swarm.job.recovery, 3 * swarm.worker_start_s + 2 * FROM_STORE_S
    once = recovery.start_s + recovery.unwind_s + recovery.settle_s + recovery.silent_s + start_s + swarm.restart_s
    hang_s = (1 + SLOWER) * UNKNOWN_S + recovery.hang_s
    return hang_s + 3 * once + 2 * swarm.write_s + RESUBMIT_S * LIVES_LEFT + 10 * swarm.step_s


def live(seed: int, *, nodes: int | None = None, per_node: int | None = None, duration_s: float | None = None,
         trace: int | None = KEPT_EVENTS) -> tuple[Life, World]:  # fmt: skip
    """One seed's life, and the world at its end. The same arguments give the same life."""
    dice = random.Random(seed)
    swarm = draw(dice, nodes=nodes, per_node=per_node, duration_s=duration_s)
    world = World(swarm, dice, trace=trace)
    start, broken = world.clock.now, ""
    try:
        faults = Faults(world)
        world.clock.run(start + swarm.duration_s, lambda: world.over)
        if not world.over:
            world.say("no more faults")
            workers = swarm.job.workers
            begun = world.bucket.attempt > 0  # else it waits for as many nodes as it is to start with
            faults.heal(workers.min_nodes_to_run if swarm.core_only and begun else workers.nodes_min)
            world.clock.run(world.clock.now + bound_s(swarm), lambda: world.over)
            _expect_well(world)
    except Breach as breach:
        broken = str(breach)
    except AssertionError as error:
        broken = f"an assertion of the machine or of the world: {error!r}"
    tally = world.tally
    last = tuple(f"{at - start:12.3f}  {what}{'  ->  ' + why if why else ''}" for at, what, why in world.trace) if broken else ()
    return Life(seed, world.clock.now - start, tally.events, tally.attempts, tally.breaks_seen, tally.killed,
                tally.lost_steps, tally.worst_lost_steps, tally.false_alarms,
                dict(sorted(tally.found.items())), dict(sorted(tally.met.items())), broken, last), world  # fmt: skip


def sweep(seeds: range, *, nodes: int | None = None, per_node: int | None = None,
          duration_s: float | None = None) -> Iterator[Life]:  # fmt: skip
    """Life after life."""
    for seed in seeds:
        yield live(seed, nodes=nodes, per_node=per_node, duration_s=duration_s)[0]


def _expect_well(world: World) -> None:
    """Raises Breach where a job that had enough time is not well. It may be growing just now, or ending: it is given more."""
    for _ in range(MORE):
        if world.over or _runs(world):
            break
        world.clock.run(world.clock.now + MORE_S, lambda: world.over)
    if world.over:
        return
    expect_well(world, f"{bound_s(world.swarm):.0f} s after the last fault")


def _runs(world: World) -> bool:
    """Whether it is said to run, and does: its last step may be done, and nobody have said so yet."""
    supervisor, run = world.supervisor, world.run
    said = supervisor is not None and isinstance(supervisor.state.phase, Running)
    return said and run is not None and run.doing is Doing.GOING
