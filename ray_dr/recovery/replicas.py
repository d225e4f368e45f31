"""Which nodes keep copies of which node's memory.

All nodes stand in a ring, in order of domain and name, and node i's copies go to i + d1, i + d2, ...: so every node keeps
as many copies as it has made. The shifts are those with which the fewest copies lie in a domain that has one already: with
domains of equal size, none does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

Domain = tuple[str, ...]
"""Where a node fails together with others, from the largest to the smallest: region, zone, rack. Empty: not known."""


def replicas(domains: Mapping[str, Domain], copies: int) -> Mapping[str, tuple[str, ...]]:
    """For each node those that keep copies of its parts, in order of preference: `copies` - 1 of them, or all others when
    there are fewer. The same domains give the same answer."""
    ring = sorted(domains, key=lambda node: (domains[node], node))
    shared = _shared([domains[node] for node in ring]) if copies > 1 else []
    shifts: list[int] = []
    while len(shifts) < min(copies, len(ring)) - 1:
        free = [shift for shift in range(1, len(ring)) if shift not in shifts]
        # A further copy shares domains with the node's own part, at shift 0, and with every copy there is.
        shifts.append(min(free, key=lambda shift: (sum(shared[shift - other] for other in (0, *shifts)), shift)))
    return {node: tuple(ring[(at + shift) % len(ring)] for shift in shifts) for at, node in enumerate(ring)}


def _shared(ring: Sequence[Domain]) -> list[int]:
    """By distance in the ring: how many levels of domain two nodes so far apart share, over all nodes.

    The nodes of one domain, of whatever level, lie in a row there: it is enough to know how long the rows are. A name
    means something within its larger domain only, and the empty one nothing.
    """
    size = len(ring)
    depth = max(map(len, ring), default=0)
    prefixes = Counter(domain[:level] for level in range(1, depth + 1) for domain in ring if domain[level - 1 : level] > ("",))
    rows = Counter(prefixes.values())
    total = [0] * size
    for length, times in rows.items():
        for apart in range(1, length):
            total[apart] += times * (length - apart)
            total[size - apart] += times * (length - apart)
    return total
