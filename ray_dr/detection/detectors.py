"""All detectors, and one value that feeds them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from ray_dr.detection.corruption import Corruption
from ray_dr.detection.gpu import Gpu
from ray_dr.detection.hang import Hang
from ray_dr.detection.loss_spike import LossSpike
from ray_dr.detection.network_cut import NetworkCut
from ray_dr.detection.node_frozen import NodeFrozen
from ray_dr.detection.node_gone import NodeGone
from ray_dr.detection.non_finite import NonFinite
from ray_dr.detection.notice import Preemption
from ray_dr.detection.process_gone import ProcessGone
from ray_dr.detection.raised import Exceptions, OutOfMemory
from ray_dr.detection.storage import Storage
from ray_dr.detection.straggler import Straggler
from ray_dr.errors import ConfigError
from ray_dr.model.signal import Finding, Formed, Sample, StepDone, WholeStep

STEPS_OPEN = 64
"""Steps that some ranks have done and others have not; older ones are given up, as a report got lost."""


class Detector(Protocol):
    """Samples in, findings out. What it remembers is small, and follows from the samples alone: no clock, no dice.

    name    in `Finding.detector`, and to put it in the shadow
    hears   the samples it wants; others are not shown to it
    """

    @property
    def name(self) -> str: ...

    @property
    def hears(self) -> tuple[type, ...]: ...

    def observe(self, sample: Sample) -> Iterable[Finding]: ...


DETECTORS = (
    ProcessGone, NodeGone, NodeFrozen, NetworkCut, Hang, Straggler, NonFinite, LossSpike, Corruption, Preemption,
    Exceptions, OutOfMemory, Storage, Gpu,
)  # fmt: skip


class Detection:
    """One job's detectors.

    shadow   names of detectors that are on trial: their findings are marked, so that nobody acts on them
    off      names of detectors that are not asked
    more     detectors besides the usual ones
    Raises ConfigError for a name that no detector has.
    """

    def __init__(self, *, shadow: Collection[str] = (), off: Collection[str] = (), more: Iterable[Detector] = ()) -> None:
        everyone: Sequence[Detector] = (*(detector() for detector in DETECTORS), *more)
        names = [detector.name for detector in everyone]
        for key, given in (("detection.shadow", shadow), ("detection.off", off)):
            unknown = sorted(set(given) - set(names))
            if unknown:
                raise ConfigError(f"no detector is named {unknown[0]!r}", key=key, remedy=f"one of {', '.join(names)}")
        self._detectors = tuple(detector for detector in everyone if detector.name not in off)
        self._shadow = frozenset(shadow)
        self._hearers: dict[type, tuple[Detector, ...]] = {}
        self._attempt, self._world = 0, 0
        self._open: dict[int, dict[int, StepDone]] = {}

    def observe(self, sample: Sample) -> tuple[Finding, ...]:
        """What follows from one more sample. Samples come in the order of their `at`."""
        if isinstance(sample, Formed):
            self._attempt, self._world, self._open = sample.attempt, len(sample.members), {}
        if not isinstance(sample, StepDone):
            return self._show(sample)
        whole = self._put_together(sample)
        return self._show(whole) if whole is not None else ()

    def _show(self, sample: Sample) -> tuple[Finding, ...]:
        kind = type(sample)
        if kind not in self._hearers:
            self._hearers[kind] = tuple(detector for detector in self._detectors if kind in detector.hears)
        found = [finding for detector in self._hearers[kind] for finding in detector.observe(sample)]
        if self._shadow and found:
            return tuple(replace(finding, shadow=finding.detector in self._shadow) for finding in found)
        return tuple(found)

    def _put_together(self, done: StepDone) -> WholeStep | None:
        """The step, once the last rank's word about it is in."""
        if done.attempt != self._attempt or not 0 <= done.rank < self._world:
            return None
        ranks = self._open.setdefault(done.step, {})
        ranks[done.rank] = done
        if len(ranks) < self._world:
            if len(self._open) > STEPS_OPEN:
                del self._open[min(self._open)]
            return None
        del self._open[done.step]
        return WholeStep(done.at, done.attempt, done.step, tuple(ranks[rank] for rank in range(self._world)))
