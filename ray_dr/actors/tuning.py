"""The cadence of a running job: asks `Pace` now and then, tells workers and the journal, and keeps count of what was lost."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from ray_dr.checkpoint.failures import COUNTED, count_losses
from ray_dr.errors import StoreError
from ray_dr.model.codec import to_json
from ray_dr.model.journal import Noted, Record
from ray_dr.model.recovery import Group
from ray_dr.telemetry.journal import ATTEMPTS, ROLLBACKS, read_tail

if TYPE_CHECKING:
    from ray_dr.actors.host import Host
    from ray_dr.actors.measuring import Measuring

COUNT_S = 120.0
"""The count is noted this often, and the attempt, so that a later life reads no more of the journal than what came since."""
SEGMENTS_MOST = 1000


class Tuning:
    """Called by the loop, but for `recall`'s thread, which only assigns."""

    def __init__(self, host: Host, measuring: Measuring | None = None) -> None:
        self._host, self._measuring = host, measuring
        self._recalled = False
        self._counted_at = time.monotonic()
        self._unmet = ""

    def recall(self) -> None:
        """Read what the lives before lost; a recovery does not wait for it."""
        threading.Thread(target=self._recall, name="recall", daemon=True).start()

    def heard(self, record: Record) -> None:
        """A record that may tell of a loss."""
        self._host.pace.losses.add(record)

    def tune(self, group: Group | None) -> None:
        """Count, and change the cadence of a group at work where there is a reason."""
        self._count()
        if group is None or self._host.progress.attempt != group.attempt:
            return
        host, pace = self._host, self._host.pace
        current = host.perform.cadence
        # One at a time: a rank that has not begun with the last one would never hear of it.
        settled = current.from_step <= host.progress.newest
        cadence = pace.next(host.job, current, host.progress.newest) if settled else None
        if cadence is not None:
            host.note("cadence.changed", memory_every=cadence.memory_every, store_every=cadence.store_every,
                      disk_every=cadence.disk_every, second_every=cadence.second_every,
                      from_step=cadence.from_step, step_s=pace.step_s, cost_s=pace.cost_s,
                      reason=pace.reason(host.job, current))  # fmt: skip
            host.perform.set_cadence(group, cadence)
        self._tell(pace.unmet(host.job, cadence or current))

    def _tell(self, unmet: str) -> None:
        """The objective cannot be met, or it can again: said when that changes, not whenever a number does."""
        if bool(unmet) == bool(self._unmet):
            return
        self._unmet = unmet
        if unmet:
            pace = self._host.pace
            self._host.note("rpo.unreachable", rpo_s=self._host.job.rpo_s, write_s=pace.write_s, reason=unmet)
        else:
            self._host.note("rpo.reachable", rpo_s=self._host.job.rpo_s)

    def _count(self) -> None:
        losses, now = self._host.pace.losses, time.monotonic()
        losses.until(time.time())
        if self._recalled and now - self._counted_at > COUNT_S and (fields := losses.note()) is not None:
            self._counted_at = now
            self._host.note(COUNTED, **fields, **{ATTEMPTS: self._host.state.attempt},
                            **{ROLLBACKS: to_json(self._host.state.rollbacks)})  # fmt: skip
            if self._measuring is not None:  # a later life reads no further back
                self._measuring.tell()

    def _recall(self) -> None:
        host = self._host
        try:
            records = read_tail(
                host.store, host.job.name, before=host.term, most=SEGMENTS_MOST,
                begins=lambda record: isinstance(record, Noted) and record.name == COUNTED,
            )  # fmt: skip
            host.pace.losses.past = count_losses(records)
            if self._measuring is not None:
                self._measuring.recall(records)
        except (StoreError, ValueError) as error:
            host.note("losses.unknown", error=str(error))  # the rates begin anew
        self._recalled = True
