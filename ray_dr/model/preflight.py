"""What a node's examination measured, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU, as its driver describes it.

    uncorrected   memory errors since the driver was loaded that nothing corrected
    pending       memory is to be retired or remapped at the next reset; failed: it could not be
    slowed        its clocks are held down by its hardware: heat, power
    error         why the driver could not say; empty: it could
    """

    index: int
    name: str = ""
    uncorrected: int = 0
    pending: bool = False
    failed: bool = False
    slowed: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """A node's figures.

    costs      what one unit of work takes, in seconds, the best of several tries: less is better. Keys: compute (10^9
               floating-point operations of one thread), memory (copying 1 GB), disk (writing 4 MB down to the disk), store
               (a small object there, back and away), peer (sending 1 GB to another node's agent). What was not measured
               is not there
    troubles   by the same keys: what could not be done at all, and why
    gpus       what the driver says of each
    took_s     the whole examination
    offset_s   how far the node's wall clock is ahead of the supervisor's, give or take `offset_error_s`; None: not measured
    """

    node: str
    costs: Mapping[str, float] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[GpuState, ...] = ()
    took_s: float = 0.0
    offset_s: float | None = None
    offset_error_s: float = 0.0
