"""What of a job's spec its machine needs to know."""

from __future__ import annotations

from ray_dr.model.job import Job
from ray_dr.model.recovery import Policy


def policy_of(job: Job) -> Policy:
    """The policy that a spec says."""
    workers, recovery = job.workers, job.recovery
    return Policy(
        nodes_min=workers.nodes_min,
        nodes_max=workers.nodes_max,
        min_nodes_to_run=workers.min_nodes_to_run,
        workers_per_node=workers.per_node,
        unwind_s=recovery.unwind_s,
        start_s=recovery.start_s,
        settle_s=recovery.settle_s,
        attempts_without_progress=recovery.attempts_without_progress,
        standby_nodes=workers.standby_nodes,
        standby_processes=workers.standby_processes,
        rollbacks=job.health.rollbacks,
    )
