"""What recoveries of this job took, for the machine to predict by: the host's policy is replaced when something is learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ray_dr.model.journal import Record
from ray_dr.model.ladder import Measured
from ray_dr.model.recovery import Running
from ray_dr.telemetry.phases import MEASURED, Phases, differs, note

if TYPE_CHECKING:
    from ray_dr.actors.host import Host


class Measuring:
    """Called by the loop, but for `recall`, which only assigns."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._phases = Phases()
        self._before: Measured | None = None

    def heard(self, record: Record) -> None:
        """One more record of this life."""
        self._phases.add(record)

    def recall(self, records: Iterable[Record]) -> None:
        """The end of the journal of the lives before."""
        past = Phases()
        for record in records:
            past.add(record)
        self._before = past.measured()

    def look(self) -> None:
        """Between failures: the next one is met with what is known by now."""
        host, phases = self._host, self._phases
        if not isinstance(host.state.phase, Running):
            return
        if self._before is not None:
            phases.before, self._before = self._before, None
        phases.step_s = host.pace.step_s
        measured = phases.measured()
        if differs(measured, host.policy.measured):
            host.policy = replace(host.policy, measured=measured)
            self.tell()

    def tell(self) -> None:
        """Note what is predicted with, for a replay and for a later life."""
        self._host.note(MEASURED, **note(self._host.policy.measured))
