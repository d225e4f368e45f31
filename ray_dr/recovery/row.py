"""What is asked of a job's row of nodes at every event, without walking along it.

The row is a value, a new one after each change: 16 384 nodes long, each walk along it costs more than all else in a decision.
So what the newest row is known to contain is kept beside it, and told of the one change that makes the next row. It is a
memory, not a state: of any other row it is found out anew, and the answers are the same.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter

from ray_dr.model.recovery import Node

Nodes = tuple[Node, ...]


class Row:
    """Of `nodes`: each one's place, and how many have so many workers up."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.places = {node.id: at for at, node in reversed(list(enumerate(nodes)))}
        self.ready = Counter(len(node.ready) for node in nodes)
        self._workers: tuple[str, ...] | None = None

    @property
    def workers(self) -> tuple[str, ...]:
        """All that are up, in the order of the nodes."""
        if self._workers is None:
            self._workers = tuple(itertools.chain.from_iterable([node.ready for node in self.nodes]))
        return self._workers

    def put(self, nodes: Nodes, old: Node | None, new: Node, at: int) -> None:
        """The row is `nodes` now: `new` stands at a place, where `old` was (None: it is the last now)."""
        self.nodes, self._workers = nodes, None
        if old is not None:
            self.ready[len(old.ready)] -= 1
        self.places.setdefault(new.id, at)
        self.ready[len(new.ready)] += 1

    def lacking(self, workers: int) -> int:
        """How many nodes have fewer workers up."""
        return sum(count for ready, count in self.ready.items() if ready < workers)


class Ranks:
    """The rank of each worker of `order`."""

    def __init__(self, order: tuple[str, ...]) -> None:
        self.order = order
        self.of = {worker: rank for rank, worker in enumerate(order)}


_newest = Row(())
_ranks = Ranks(())


def row_of(nodes: Nodes) -> Row:
    """What is known of a row."""
    global _newest
    if _newest.nodes is not nodes or not nodes:  # of all jobs the empty row is the same
        _newest = Row(nodes)
    return _newest


def place_of(worker: str, row: tuple[str, ...], order: tuple[str, ...]) -> int | None:
    """Where a worker stands in a row, which most often is in the order of the ranks in `order`; None where it does not."""
    global _ranks
    if _ranks.order is not order:
        _ranks = Ranks(order)
    of = _ranks.of
    at = bisect_left(row, of.get(worker, -1), key=lambda other: of.get(other, -1))
    if at < len(row) and row[at] == worker:
        return at
    return row.index(worker) if worker in row else None
