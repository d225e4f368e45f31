"""Which versions are whole, and where: a fold over the reports of nodes that they hold a part."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby

from ray_dr.model.actions import FormGroup
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import NodeLost
from ray_dr.model.journal import Decided, Noted, PartSaved, Record, Where

KEPT = 8
"""Newest versions remembered for each place. Counted per place: memory moves on many steps while a store writes one."""
COPIES_KEPT = "copies.kept"
"""The note with which a supervisor says how many `peers` keep a copy of each part from now on."""
IN_MEMORY = (Where.MEMORY, Where.PEER)
NODE_LOCAL = (*IN_MEMORY, Where.DISK)


@dataclass(frozen=True, slots=True)
class Row:
    """The known copies of one version in one kind of place, as (rank, node that holds it). `wanted`: copies of each rank's
    part, on different nodes, that make it whole there."""

    version: VersionId
    where: Where
    world: int
    copies: frozenset[tuple[int, str]] = frozenset()
    wanted: int = 1

    @property
    def parts(self) -> int:
        """Ranks whose part has all its copies here."""
        ranks = [rank for rank, _ in self.copies]
        return sum(ranks.count(rank) >= self.wanted for rank in range(self.world))

    @property
    def complete(self) -> bool:
        """Every rank's part has its copies."""
        return len(self.copies) >= self.world * self.wanted and self.parts == self.world


@dataclass(frozen=True, slots=True)
class Completeness:
    """What is known of the newest versions. `rows` ascend by version within each place.

    peers   copies on other nodes that each part is to have; versions seen from now on are judged by it
    """

    rows: tuple[Row, ...] = ()
    peers: int = 1

    def add(
        self, version: VersionId, rank: int, world: int, where: Where, node: str
    ) -> tuple[Completeness, tuple[tuple[VersionId, Where], ...]]:
        """With one more copy known, and the versions that this made complete.

        The same copy twice changes nothing; a version older than the kept ones is ignored. Raises ValueError for a
        rank outside of its world, or a version reported with two worlds.
        """
        wanted = self.peers if where is Where.PEER else 1
        before = self._row(version, where) or Row(version, where, world, wanted=wanted)
        if not 0 <= rank < world or before.world != world:
            raise ValueError(f"{version}: rank {rank} of {world}, known with world {before.world}")
        after = dataclasses.replace(before, copies=before.copies | {(rank, node)})
        others = [row for row in self.rows if (row.version, row.where) != (version, where)]
        kept = dataclasses.replace(self, rows=_newest([*others, after]))
        new = after.complete and not before.complete and after in kept.rows
        return kept, (((version, where),) if new else ())

    def without(self, node: str) -> Completeness:
        """After the loss of a node: its memory and its disk are gone, stores are not."""
        rows = [_forget(row, node) if row.where in NODE_LOCAL else row for row in self.rows]
        return dataclasses.replace(self, rows=tuple(row for row in rows if row.copies))

    def forget(self, version: VersionId, where: Where) -> Completeness:
        """As if nothing was known of a version there: what is reported again counts again."""
        rows = tuple(row for row in self.rows if (row.version, row.where) != (version, where))
        return dataclasses.replace(self, rows=rows)

    def begin(self, keep: VersionId | None) -> Completeness:
        """A new attempt goes on from `keep`: the agents let go of every other version in memory."""
        rows = tuple(row for row in self.rows if row.where not in IN_MEMORY or row.version == keep)
        return dataclasses.replace(self, rows=rows)

    def complete(self, where: Where) -> tuple[VersionId, ...]:
        """The kept versions that are whole there, newest first."""
        return tuple(row.version for row in reversed(self.rows) if row.where == where and row.complete)

    def nodes(self, version: VersionId, where: Where) -> frozenset[str]:
        """Who holds parts of a version there."""
        row = self._row(version, where)
        return frozenset(node for _, node in row.copies) if row else frozenset()

    def orphans(self, version: VersionId, nodes: Collection[str]) -> frozenset[int]:
        """Ranks whose own node is not among `nodes`: only copies of their parts of a version can be left in memory."""
        row = self._row(version, Where.MEMORY)
        held = {rank for rank, node in row.copies if node in nodes} if row else set()
        return frozenset(range(row.world)) - held if row else frozenset()

    def armed(self) -> VersionId | None:
        """The newest version of which every part has all its copies in memory: what a loss within the promise costs is the
        work since. None before the first."""
        return next(iter(self.complete(Where.PEER if self.peers else Where.MEMORY)), None)

    def _row(self, version: VersionId, where: Where) -> Row | None:
        return next((row for row in self.rows if (row.version, row.where) == (version, where)), None)


def fold(records: Iterable[Record]) -> Completeness:
    """What a journal says is held where."""
    found = Completeness(peers=0)
    for record in records:
        match record:
            case PartSaved():
                with contextlib.suppress(ValueError):
                    found, _ = found.add(record.version, record.rank, record.world, record.where, record.node)
            case Noted(name=name, fields={"peers": int(peers)}) if name == COPIES_KEPT:
                found = dataclasses.replace(found, peers=peers)
            case Decided():
                if isinstance(record.event, NodeLost):
                    found = found.without(record.event.node)
                for action in record.actions:
                    if isinstance(action, FormGroup):
                        found = found.begin(action.group.restore)
            case _:
                pass
    return found


def _forget(row: Row, node: str) -> Row:
    return dataclasses.replace(row, copies=frozenset(copy for copy in row.copies if copy[1] != node))


def _newest(rows: list[Row]) -> tuple[Row, ...]:
    ordered = sorted(rows, key=lambda row: (row.where, row.version.attempt, row.version.step))
    return tuple(row for _, same in groupby(ordered, key=lambda row: row.where) for row in list(same)[-KEPT:])
