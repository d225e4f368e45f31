"""Which nodes keep copies of which node's memory.

All nodes stand in a ring, in order of domain and name, and node i's copies go to i + d1, i + d2, ...: so every node keeps
as many copies as it has made. The shifts are those with which the fewest copies lie in a domain that has one already: with
domains of equal size, none does.
"""

from __future__ import annotations

from collections.abc import Mapping

Domain = tuple[str, ...]
"""Where a node fails together with others, from the largest to the smallest: region, zone, rack. Empty: not known."""


def replicas(domains: Mapping[str, Domain], copies: int) -> Mapping[str, tuple[str, ...]]:
    """For each node those that keep copies of its parts, in order of preference: `copies` - 1 of them, or all others when
    there are fewer. The same domains give the same answer."""
    ring = sorted(domains, key=lambda node: (domains[node], node))
    shifts: list[int] = []
    while len(shifts) < min(copies, len(ring)) - 1:
        free = [shift for shift in range(1, len(ring)) if shift not in shifts]
        shifts.append(min(free, key=lambda shift: (_shared(ring, domains, shifts, shift), shift)))
    return {node: tuple(ring[(at + shift) % len(ring)] for shift in shifts) for at, node in enumerate(ring)}


def _shared(ring: list[str], domains: Mapping[str, Domain], shifts: list[int], shift: int) -> int:
    """How much a further shift puts together: levels of domain that a new copy shares with one there, over all nodes."""
    total = 0
    for at in range(len(ring)):
        new = domains[ring[(at + shift) % len(ring)]]
        total += sum(_common(domains[ring[(at + other) % len(ring)]], new) for other in (0, *shifts))
    return total


def _common(one: Domain, other: Domain) -> int:
    """Levels that two domains share, from the largest on; a name means something within its larger domain only."""
    shared = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        shared += mine != ""
    return shared
