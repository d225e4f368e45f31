"""What is left of a broken attempt goes to the agent as any save does: this rank's part, and those of lost ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ray_dr.errors import ConfigError
from ray_dr.train.link import Link
from ray_dr.train.staging import stage
from ray_dr.train.standing import Stood


def hand_over(stood: Stood, ranks: Sequence[int], copy_to: Sequence[str], link: Link) -> str:
    """Stage the parts of `ranks`, and have them copied to the agents `copy_to`; returns once this node's agent has taken them
    over. The reason, in words, when there is no memory for them. Raises StoreError when the agent is gone.

    The own part goes into a free slot, where there is one: the others hold what must not go before this is whole.
    """
    for rank in ranks:
        begun = time.monotonic()
        plan, part = stood.part(rank)
        own = link.take_slot(plan.size, 0.0) if rank == stood.rank and link.asked_for(plan.size) else None
        try:
            path, slot = ("", own[1]) if own else link.borrow(plan.size)
        except ConfigError as error:
            return str(error)
        stage(plan, stood.flat, slot)
        now = time.time()
        link.staged(own[0] if own else -1, part, staged_at=now, stall_s=time.monotonic() - begun, copy_to=copy_to, to={},
                    borrowed=path)  # fmt: skip
    link.agree()
    return ""
