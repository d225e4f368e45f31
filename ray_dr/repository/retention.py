"""Which checkpoints stay: a function of what there is and of what the job wants kept. Without a clock.

Every rule takes the good checkpoints only, and a checkpoint stays when any rule wants it:

    last      the newest n
    hourly    the newest of each of the last n hours that have one; daily, weekly (from Monday): the same. In UTC
    within    all that are at most this much older than the newest (so a job that rests loses nothing meanwhile)

The newest good one always stays. Damaged ones count for nothing and go, so that no later save builds on their chunks;
but when there is no good one, nothing goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ray_dr.model.checkpoint import Manifest, VersionId
from ray_dr.model.job import Keep

HOUR_S, DAY_S = 3600, 86400


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why one checkpoint is kept or dropped."""

    manifest: Manifest
    reason: str


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """Oldest first."""

    keep: tuple[Verdict, ...]
    drop: tuple[Verdict, ...]


def plan_prune(manifests: Sequence[Manifest], keep: Keep, damaged: Mapping[VersionId, str] | None = None) -> PrunePlan:
    """Which of `manifests` (oldest first) stay, and why. `damaged` says of versions what is wrong with them."""
    bad = damaged or {}
    good = [manifest for manifest in manifests if manifest.version not in bad]
    if not good:
        return PrunePlan(tuple(Verdict(each, f"{bad[each.version]}, but none is better") for each in manifests), ())
    wanted: dict[VersionId, list[str]] = {}
    for version, reason in _wanted(good[::-1], keep):
        wanted.setdefault(version, []).append(reason)
    kept = tuple(Verdict(each, "; ".join(wanted[each.version])) for each in good if each.version in wanted)
    dropped = tuple(
        Verdict(each, bad.get(each.version) or "no rule wants it") for each in manifests if each.version not in wanted
    )
    return PrunePlan(kept, dropped)


def _wanted(newest_first: Sequence[Manifest], keep: Keep) -> Iterator[tuple[VersionId, str]]:
    """What each rule wants, with the reason."""
    last = max(1, keep.last)
    for number, manifest in enumerate(newest_first[:last], 1):
        yield manifest.version, f"number {number} of the last {last}"
    yield from _spread(newest_first, keep.hourly, "hour", lambda at: int(at // HOUR_S))
    yield from _spread(newest_first, keep.daily, "day", lambda at: int(at // DAY_S))
    yield from _spread(
        newest_first, keep.weekly, "week", lambda at: int(at // DAY_S + 3) // 7
    )  # 1970 began on a Thursday
    since = max(manifest.created_at for manifest in newest_first) - keep.within_s
    for manifest in newest_first:
        if keep.within_s and manifest.created_at >= since:
            yield manifest.version, "young enough"


def _spread(
    newest_first: Sequence[Manifest], count: int, span: str, slot: Callable[[float], int]
) -> Iterator[tuple[VersionId, str]]:
    """The newest of each of the last `count` spans of time that have any."""
    newest: dict[int, Manifest] = {}
    for manifest in newest_first:
        newest.setdefault(slot(manifest.created_at), manifest)
    for number, at in enumerate(sorted(newest, reverse=True)[:count], 1):
        yield newest[at].version, f"newest of its {span}, {number} of {count}"
