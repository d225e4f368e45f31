"""The supervisor of one job: the Ray actor around the host of the job's machine."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import ray

from ray_dr.actors import cluster
from ray_dr.actors.host import Host
from ray_dr.model import codec
from ray_dr.model.events import StopRequested
from ray_dr.model.job import Job

LINGER_S = 20.0
"""After the end the supervisor stays this long for those who wait for the outcome."""


class Supervisor:
    """The Ray actor: detached, named by its job, restarted by Ray on another node when its own dies."""

    def __init__(self, job: Any, token: bytes, *train: bytes) -> None:
        self._host = Host(codec.from_json(Job, job), b"".join(train), token)
        self._host.start()
        threading.Thread(target=self._end, name="end", daemon=True).start()

    def snapshot(self) -> dict[str, Any]:
        """What is going on."""
        context = ray.get_runtime_context()
        return {**self._host.snapshot(), "supervisor": {"node": context.get_node_id(), "pid": os.getpid()}}

    def stop(self, within_s: float, why: str) -> None:
        """Ask the job to stop, keeping its state."""
        self._host.post(StopRequested(time.time(), within_s, why))

    def wait(self, timeout_s: float) -> Any:
        """The outcome as tagged JSON, or None when the job goes on."""
        if not self._host.wait(timeout_s):
            return None
        return codec.to_json(self._host.outcome, tagged=True)

    def _end(self) -> None:
        self._host.wait(float(threading.TIMEOUT_MAX))
        time.sleep(LINGER_S)
        mine = cluster.actor(cluster.supervisor_name(self._host.job.name))
        if mine is not None:
            cluster.kill(mine)

