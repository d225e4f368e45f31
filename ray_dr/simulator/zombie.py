"""A supervisor that is taken for lost, and is not: when it is back it goes on as if it were alone, and must be stopped."""

from __future__ import annotations

from ray_dr.model.checkpoint import VersionId
from ray_dr.simulator.breach import must
from ray_dr.simulator.host import Supervisor
from ray_dr.simulator.world import World


def cut_off(world: World, lasts_s: float, *, back_after_s: float) -> None:
    """The supervisor reaches nobody for some time; another one begins meanwhile, `back_after_s` seconds from now."""
    supervisor = world.supervisor
    if supervisor is not None and supervisor.opened:
        held = world.versions()
        world.supervisor_dies(back_after_s=back_after_s)
        world.clock.after(max(lasts_s, back_after_s), _is_back, world, supervisor, held[-1].id if held else None)


def _is_back(world: World, zombie: Supervisor, held: VersionId | None) -> None:
    """It commits what it was about to commit: the store must refuse it, and it must end of that. Raises Breach."""
    if world.over or zombie.outcome is not None:
        return
    if zombie.term == world.bucket.term or world.bucket.down:
        world.clock.after(max(1.0, world.swarm.restart_s), _is_back, world, zombie, held)
        return
    held = held or VersionId(zombie.state.attempt, zombie.progress)
    zombie.alive = True
    world.say(f"supervisor of term {zombie.term} is back, and commits {held}")
    world.tally.met["zombie"] += 1
    world.commit(held, True, by=zombie)
    must(zombie.outcome is not None, f"I3: the supervisor of term {zombie.term} goes on beside that of {world.bucket.term}")
