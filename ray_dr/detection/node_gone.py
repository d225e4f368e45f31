"""A node is gone: its agent's connection closed, or Ray says that it is dead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ray_dr.model.signal import Closed, FaultKind, Finding, RayWord, Released, Report, Sample, Subject


@dataclass(slots=True)
class NodeGone:
    """One word is enough: a closed connection is seen within milliseconds of a kill, Ray's word comes 15 to 55 s after a
    silent end. The second word about the same end is no finding; a report makes the node a living one again.

    False alarms: none from statistics. A connection that breaks while the node lives is one (the agent ends with its
    raylet, so this takes a network that resets connections); Ray's own health check errs only where the node was
    unreachable for longer than its 15 s at least, which is a failure by itself.
    """

    name: ClassVar[str] = "node_gone"
    hears: ClassVar[tuple[type, ...]] = (Report, Closed, RayWord, Released)

    _living: dict[str, bool] = field(default_factory=dict)
    """Of every node that was ever heard of: whether its end would be news."""

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """One finding for each node that goes unasked."""
        match sample:
            case Report():
                self._living[sample.node] = True
            case Released():
                self._living[sample.name] = False
            case Closed() if self._living.get(sample.node, True):
                yield self._finding(sample.node, sample.at, "its agent's connection closed")
            case RayWord(alive=False) if self._living.get(sample.node, False):
                yield self._finding(sample.node, sample.at, "Ray says that it is dead")

    def _finding(self, node: str, at: float, how: str) -> Finding:
        self._living[node] = False
        return Finding(self.name, FaultKind.NODE_GONE, (Subject(node),), at, at, f"node {node} is gone: {how}")
