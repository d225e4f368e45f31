"""What Ray says of a worker that ended: the one death that only Ray knows the cause of is by its own memory watch.

Asked after the loss is decided on, and beside it: the answer adds a finding to the journal, and delays nothing.
"""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.exceptions import OutOfMemoryError

from ray_dr.actors import cluster
from ray_dr.actors.sensing import short, write_down
from ray_dr.model.signal import FaultKind, Finding, Subject

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

DETAIL_CHARS = 300


def ask(host: Host, worker: str, node: str, handle: Any, pool: Executor) -> None:
    """Ask why a worker ended, with a call that can't be answered any more; then end what is left of it: earlier, that would be
    the cause that Ray knows."""
    cluster.when_done(handle.describe.remote(), partial(_told, host, worker, node, handle), pool)


def _told(host: Host, worker: str, node: str, handle: Any, answer: Future[Any]) -> None:
    error = answer.exception()
    cluster.kill(handle)
    if not isinstance(error, OutOfMemoryError):
        return
    said = " ".join(str(error).split())[:DETAIL_CHARS]
    evidence = f"worker {worker} was ended for the memory it used: Ray's memory watch says {said}"
    now = time.monotonic()
    subject = Subject(short(node), worker)
    write_down(host, Finding("out_of_memory", FaultKind.OUT_OF_MEMORY, (subject,), now, now, evidence))
