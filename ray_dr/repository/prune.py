"""Letting old checkpoints go: first a plan with reasons, then its execution.

Theory of operation. Three kinds of object belong to a checkpoint: its entry in the commit log, its part lists and its
chunks. A chunk lies in the folder of the save that put it; a later save may name it instead of putting it again. So an
object may go when no checkpoint names it *and none ever will*. That needs no clock, no lease and no lock, because of
two rules of the commit log, which decides each append in full knowledge of everything before it:

    ascending   a checkpoint's version is higher than every version that exists at that point of the log
    grounded    when a checkpoint is appended, every part list whose chunks it reuses (PartRef.base) is named by a
                checkpoint that exists at that point of the log

Let a pruner have read the log up to some entry; K are the checkpoints that exist there, `oldest` the lowest version of
K. It removes only objects whose folder is of a version below `oldest` and which no part list of K names. Claim: no
checkpoint of K, nor any that is appended later, names such an object. Those of K do not, by choice. Take the first M
appended later that does. What M's save put itself lies in the folder of M's version, which is above all of K
(ascending; the newest of K exists until a newer one is appended), so it was not removed. What M reuses is named by a
part list that a checkpoint B names which exists when M is appended (grounded); B is of K or was appended between, as
entries only ever drop checkpoints; so B names the object too, and M was not the first. QED.

It follows that a pruner may be as slow as it likes, may belong to a fenced supervisor (its K is only older), may stop
anywhere and may run beside any number of saves and other pruners; a save may take any time. A save too slow for its
base is not damaged but refused at its commit, and the next one takes a newer base; a save that reuses nothing is never
refused for that. What a fenced writer still puts is in a folder of an old version, and is found by a later sweep.

Assumed: attempts are never numbered twice; entries of the log are not damaged; a `list` shows every object whose put
had returned (else garbage stays a little longer). Whoever reads a checkpoint while it is dropped finds objects missing:
readers of old versions need a higher `keep_last`.

Costs per execution: a listing of the part lists, of the chunks of what was dropped, and their deletes. The whole job is
swept (all chunks listed, and the part lists of K read that reuse chunks) once per SWEEP_EVERY numbers of the log: that
finds what crashes, failed saves and fenced writers left, and chunks of older folders that lost their last name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_dr.errors import StoreUnavailable
from ray_dr.model.checkpoint import Manifest, PartRef, VersionId
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.layout import chunk_key, chunks_prefix, folder_of, parts_prefix, version_of
from ray_dr.repository.parts import read_part
from ray_dr.stores.base import Store

PLAN_TRIES = 20
SWEEP_EVERY = 16
"""Numbers of the log from one sweep of the whole job to the next: eight checkpoints, each with its `kept` entry."""
_THREADS = 8


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


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What becomes of listed objects, in order of listing: `remove` are keys; `stay` counts the rest by reason."""

    remove: tuple[str, ...]
    stay: dict[str, int]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What an execution did. `..._removed` count objects; `swept`: the whole job was looked at."""

    plan: PrunePlan
    parts_removed: int
    chunks_removed: int = 0
    swept: bool = False


def plan_prune(manifests: Sequence[Manifest], keep_last: int) -> PrunePlan:
    """Which of `manifests` (oldest first) stay: the last `keep_last`, at least 1."""
    assert keep_last >= 1, "a job without any checkpoint can't be restored"
    cut = max(0, len(manifests) - keep_last)
    keep = tuple(
        Verdict(manifest, f"number {len(manifests) - index} of the last {keep_last}")
        for index, manifest in enumerate(manifests)
        if index >= cut
    )
    drop = tuple(Verdict(manifest, f"{keep_last} newer checkpoints are kept") for manifest in manifests[:cut])
    return PrunePlan(keep, drop)


def plan_sweep(listed: Iterable[str], named: frozenset[str], oldest: VersionId) -> SweepPlan:
    """Which of the `listed` keys of part lists and chunks may go.

    named   keys that the kept checkpoints name, at least all those of versions before `oldest`
    oldest  the lowest version kept
    """
    remove: list[str] = []
    stay: dict[str, int] = {}
    for key in listed:
        why = _why_it_stays(key, named, oldest)
        if why:
            stay[why] = stay.get(why, 0) + 1
        else:
            remove.append(key)
    return SweepPlan(tuple(remove), stay)


def execute(store: Store, log: CommitLog, job: str, *, keep_last: int, term: int) -> Pruned:
    """Drop all but the last `keep_last` checkpoints of a job. Raises Fenced when the job has a newer owner.

    The log says first what is kept; only then objects are removed, chunks after the part lists that name them. What a
    crash in between leaves is found by a later sweep.
    """
    for _ in range(PLAN_TRIES):
        seen = log.refresh()
        plan = plan_prune(seen.checkpoints, keep_last)
        kept = tuple(verdict.manifest for verdict in plan.keep)
        if not plan.drop or log.keep(kept, term=term, seen=seen):
            whole = seen.tail % SWEEP_EVERY < 2  # the log grows by one or two numbers per checkpoint
            dropped = tuple(verdict.manifest for verdict in plan.drop)
            return Pruned(plan, *_remove(store, job, kept, dropped, whole), swept=whole)
    raise StoreUnavailable("the commit log grows faster than it can be pruned", key=job)


def sweep(store: Store, job: str, kept: Sequence[Manifest]) -> tuple[int, int]:
    """Remove everything that no checkpoint can name any more: how many (part lists, chunks).

    `kept` are the checkpoints that exist at some point of the log, the present one or an earlier.
    """
    return _remove(store, job, kept, (), True)


def _remove(
    store: Store, job: str, kept: Sequence[Manifest], dropped: Sequence[Manifest], whole: bool
) -> tuple[int, int]:
    if not kept:
        return 0, 0
    oldest = min(manifest.version for manifest in kept)
    # Read before anything is removed: when a part list can't be read, nothing is.
    refs = [ref for manifest in kept for ref in manifest.parts]
    reusing = [ref for ref in refs if ref.base]
    named = _chunks_named(store, job, reusing) if whole else frozenset[str]()
    parts = plan_sweep(_keys(store, parts_prefix(job)), frozenset(ref.key for ref in refs), oldest)
    _delete(store, parts.remove)
    if whole:
        prefixes = {chunks_prefix(job)}
    elif reusing:
        return len(parts.remove), 0  # the sweep of the whole job tells which chunks are still named
    else:
        prefixes = {chunks_prefix(job, folder_of(ref.key)) for manifest in dropped for ref in manifest.parts}
    chunks = plan_sweep((key for prefix in sorted(prefixes) for key in _keys(store, prefix)), named, oldest)
    _delete(store, chunks.remove)
    return len(parts.remove), len(chunks.remove)


def _why_it_stays(key: str, named: frozenset[str], oldest: VersionId) -> str:
    """Empty when it may go."""
    version = version_of(key)
    if version is None:
        return "not an object of a save"
    if version >= oldest:
        return "of a kept version, or of a save under way"
    return "named by a kept checkpoint" if key in named else ""


def _chunks_named(store: Store, job: str, refs: Sequence[PartRef]) -> frozenset[str]:
    """Keys of all chunks that part lists name."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="prune") as pool:
        parts = pool.map(lambda ref: read_part(store, ref), refs)
        return frozenset(chunk_key(job, chunk) for part in parts for chunk in part.chunks)


def _keys(store: Store, prefix: str) -> Iterable[str]:
    return (entry.key for entry in store.list(prefix))


def _delete(store: Store, keys: Sequence[str]) -> None:
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="prune") as pool:
        for _ in pool.map(store.delete, keys):
            pass
