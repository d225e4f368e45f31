"""Where to go on from: the newest version of which every part is still held by somebody, and who holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ray_dr.model.checkpoint import Held, VersionId
from ray_dr.model.recovery import Rollback
from ray_dr.recovery.quarantine import usable


def choose_version(
    held: Sequence[Held], committed: VersionId | None, rollbacks: Sequence[Rollback] = ()
) -> VersionId | None:
    """The newest version that can be restored, or None when there is none.

    held        parts in the memory and on the disks of the node agents that are alive, in any order
    committed   the newest version in the store, complete by definition
    rollbacks   what they say is of no use is not taken

    Newest is by (attempt, step): a later attempt went on from an earlier one's version, so its state supersedes
    whatever the earlier attempt did beyond that, even where its step is lower.
    """
    candidates = [*_complete(held), *([committed] if committed else [])]
    return max((version for version in candidates if usable(version, rollbacks)), key=_age, default=None)


def copies(held: Sequence[Held], version: VersionId, *, disk: bool = False) -> Mapping[int, tuple[str, ...]]:
    """Nodes that hold each rank's part of a version in memory, or on disk: the rank's own node first, then peers by name."""
    holders: dict[int, set[tuple[bool, str]]] = {}
    for part in held:
        if part.version == version and part.disk == disk:
            holders.setdefault(part.rank, set()).add((not part.own, part.node))
    return {rank: _distinct(node for _, node in sorted(found)) for rank, found in sorted(holders.items())}


def stays_behind(held: Sequence[Held], version: VersionId, wanted: int) -> VersionId | None:
    """The older version in memory that must not go yet, because `version` has not got `wanted` copies of each part; None where
    it has, or there is no older one: that with the most copies, and of these the newest."""
    in_memory = [part for part in held if not part.disk]
    if _fewest(in_memory, version) >= wanted:
        return None
    older = {other for other in _complete(in_memory) if _age(other) < _age(version)}
    return max(older, key=lambda other: (min(_fewest(in_memory, other), wanted), _age(other)), default=None)


def _fewest(held: Sequence[Held], version: VersionId) -> int:
    """On how many nodes the part of a version is that is on the fewest; ranks of which there is nothing are not known here."""
    return min(map(len, copies(held, version).values()), default=0)


def _complete(held: Sequence[Held]) -> Iterator[VersionId]:
    """Versions with every rank from 0 to world - 1 held by somebody."""
    ranks: dict[tuple[VersionId, int], set[int]] = {}
    for part in held:
        ranks.setdefault((part.version, part.world), set()).add(part.rank)
    return (version for (version, world), present in ranks.items() if present >= set(range(world)))


def _age(version: VersionId) -> tuple[int, int]:
    return version.attempt, version.step


def _distinct(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
