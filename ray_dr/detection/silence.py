"""Since when a node has been silent, not counting the time in which the host itself did not listen."""

from __future__ import annotations

from dataclasses import dataclass, field

HOST_PAUSE_S = 0.5
"""A host says the time every 0.1 s or so. So long without a word, and it was the host that slept."""


@dataclass(slots=True)
class Hearing:
    """When each node was last heard. `advance` is to be called with the time of every sample, before anything else."""

    heard_at: dict[str, float] = field(default_factory=dict)
    _now: float = 0.0

    def advance(self, at: float) -> None:
        """It is `at` now. A pause of the host's is taken off every silence: nobody could have been heard in it."""
        pause_s, self._now = at - self._now, at
        if pause_s > HOST_PAUSE_S:
            for node in self.heard_at:
                self.heard_at[node] += pause_s

    def heard(self, node: str, at: float) -> float:
        """A node reports. How long it had been silent; 0 when it is new."""
        silent_s = at - self.heard_at.get(node, at)
        self.heard_at[node] = at
        return silent_s

    def forget(self, node: str) -> None:
        """The node is gone, or given back."""
        self.heard_at.pop(node, None)
