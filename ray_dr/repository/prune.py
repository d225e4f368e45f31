"""Letting old checkpoints go: first a plan with reasons, then its execution.

Theory of operation. Three kinds of object belong to a checkpoint: its entry in the commit log, its part lists and its
chunks. A chunk lies in the folder of the save that put it; a later save may name it instead of putting it again. So an
object may go when no checkpoint names it *and none ever will*. That needs no clock, no lease and no lock, because of
two rules of the commit log, which decides each append in full knowledge of everything before it:

    ascending   a checkpoint's version is higher than every version that was ever in the log before it
    grounded    when a checkpoint is appended, each checkpoint whose chunks it reuses exists at that point of the log;
                PartRef.base says which: the digest of one of its part lists, which are no other checkpoint's, as they
                hold its version

Let a pruner have read the log up to some entry; K are the checkpoints that exist there, `newest` the highest version of
K. It removes only objects whose folder is of a version below `newest` and which no part list of K names. Claim: no
checkpoint of K, nor any that is appended later, names such an object. Those of K do not, by choice. Take the first M
appended later that does. What M's save put itself lies in the folder of M's version, which is above all of K
(ascending), so it was not removed. What M reuses is named by a part list of a checkpoint B that exists when M
is appended (grounded); B is of K or was appended between, as entries only ever drop checkpoints; so B names the object
too, and M was not the first. QED. (Whole folders of K's saves are left alone besides, as not all part lists are read.)

It follows that a pruner may be as slow as it likes, may belong to a fenced supervisor (its K is only older), may stop
anywhere and may run beside any number of saves and other pruners; a save may take any time. A save too slow for its
base is not damaged but refused at its commit, and the next one takes a newer base; a save that reuses nothing is never
refused for that. What a fenced writer still puts is in a folder of an old version, and is found by a later sweep.

For readers, dropping has two phases: the `kept` entry takes the checkpoint out of the log, and names it as *pending*
until a time; prunes before that time leave its objects alone, one after it removes them. A reader that began before the
first phase thus has that grace to finish. It is for readers only: a wrong clock makes one fail, and damages nothing.
Without grace (as a job prunes by itself) it finds objects missing, and says so.

Checkpoints that other jobs hold (see `sharing`) keep their objects like those of K, whether they exist or not.

Assumed: attempts are never numbered twice; entries of the log are not damaged; a `list` shows every object whose put
had returned (else garbage stays a little longer).

Costs per execution: a listing of the part lists, of the chunks of what was dropped, and their deletes. The whole job is
swept (all chunks listed, and the part lists of K read that reuse chunks) once per SWEEP_EVERY numbers of the log: that
finds what crashes, failed saves and fenced writers left, and chunks of older folders that lost their last name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_dr.errors import CheckpointError, NotFound, StoreUnavailable
from ray_dr.model.checkpoint import Manifest, PartRef, VersionId
from ray_dr.model.job import Keep
from ray_dr.repository.commit import CommitLog, Pending
from ray_dr.repository.layout import chunk_key, chunks_prefix, folder_of, parts_prefix, version_of
from ray_dr.repository.parts import read_part
from ray_dr.repository.retention import PrunePlan, plan_prune
from ray_dr.repository.sharing import let_go
from ray_dr.stores.base import Store

PLAN_TRIES = 20
SWEEP_EVERY = 16
"""Numbers of the log from one sweep of the whole job to the next: eight checkpoints, each with its `kept` entry."""
_THREADS = 8


Judge = Callable[[Sequence[Manifest]], Mapping[VersionId, str]]
"""Says of checkpoints which are damaged, and how."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What becomes of listed objects, in order of listing: `remove` are keys; `stay` counts the rest by reason."""

    remove: tuple[str, ...]
    stay: dict[str, int]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What an execution did. `..._removed` count objects; `swept`: the whole job was looked at; `pending`: what is dropped,
    now or before, and whose objects still stay."""

    plan: PrunePlan
    parts_removed: int
    chunks_removed: int = 0
    swept: bool = False
    pending: tuple[Pending, ...] = ()


def plan_sweep(
    listed: Iterable[str], named: frozenset[str], newest: VersionId, folders: frozenset[str] = frozenset()
) -> SweepPlan:
    """Which of the `listed` keys of part lists and chunks may go.

    named     keys that the kept checkpoints name, at least all those that lie in none of `folders`
    newest    the highest version kept
    folders   of the saves that are kept: left alone
    """
    remove: list[str] = []
    stay: dict[str, int] = {}
    for key in listed:
        why = _why_it_stays(key, named, newest, folders)
        if why:
            stay[why] = stay.get(why, 0) + 1
        else:
            remove.append(key)
    return SweepPlan(tuple(remove), stay)


def execute(
    store: Store,
    log: CommitLog,
    job: str,
    *,
    keep: Keep,
    term: int | None,
    judge: Judge | None = None,
    grace_s: float = 0.0,
    now: float | None = None,
    whole: bool | None = None,
) -> Pruned:
    """Drop the checkpoints of a job that no rule wants. Raises Fenced when `term` is given and the job has a newer owner.

    The log says first what is kept; only then objects are removed, chunks after the part lists that name them. What a
    crash in between leaves is found by a later sweep.
    judge     says which checkpoints are damaged; None: none is
    grace_s   how long the objects of dropped checkpoints stay for readers
    now       UTC seconds
    whole     whether to look at the whole job; None: now and then
    """
    at = time.time() if now is None else now
    for _ in range(PLAN_TRIES):
        seen = log.refresh()
        plan = plan_prune(seen.checkpoints, keep, judge(seen.checkpoints) if judge else None)
        dropped = [Pending(verdict.manifest, at + grace_s) for verdict in plan.drop]
        gone = [each.manifest for each in (*seen.pending, *dropped) if each.until <= at]
        waiting = tuple(each for each in (*seen.pending, *dropped) if each.until > at)
        kept = tuple(verdict.manifest for verdict in plan.keep)
        if not (plan.drop or gone) or log.keep(kept, term=term, seen=seen, pending=waiting):
            all_of_it = (
                seen.tail % SWEEP_EVERY < 2 if whole is None else whole
            )  # the log grows by one or two per checkpoint
            held = [hold.manifest for hold in seen.holds]
            removed = _remove(store, job, kept, gone, all_of_it, [each.manifest for each in waiting], held)
            if all_of_it:
                let_go(store, log, job)
            return Pruned(plan, *removed, swept=all_of_it, pending=waiting)
    raise StoreUnavailable("the commit log grows faster than it can be pruned", key=job)


def sweep(
    store: Store,
    job: str,
    kept: Sequence[Manifest],
    *,
    waiting: Sequence[Manifest] = (),
    held: Sequence[Manifest] = (),
) -> tuple[int, int]:
    """Remove everything that no checkpoint can name any more: how many (part lists, chunks).

    `kept` are the checkpoints that exist at some point of the log, the present one or an earlier; `waiting` do not exist any
    more, but their objects are to stay; `held` are those that other jobs hold at that point.
    """
    return _remove(store, job, kept, (), True, waiting, held)


def _remove(
    store: Store,
    job: str,
    kept: Sequence[Manifest],
    dropped: Sequence[Manifest],
    whole: bool,
    waiting: Sequence[Manifest] = (),
    held: Sequence[Manifest] = (),
) -> tuple[int, int]:
    if not kept:
        return 0, 0
    newest = max(manifest.version for manifest in kept)
    # Read before anything is removed: when a part list can't be read, nothing is.
    refs = list({ref.key: ref for manifest in (*kept, *waiting, *held) for ref in manifest.parts}.values())
    folders = frozenset(folder_of(ref.key) for ref in refs)
    reusing = [ref for ref in refs if ref.base]
    damaged_may_be = {ref.digest for manifest in waiting if manifest not in held for ref in manifest.parts}
    named = _chunks_named(store, job, reusing, damaged_may_be) if whole else frozenset[str]()
    parts = plan_sweep(_keys(store, parts_prefix(job)), frozenset(ref.key for ref in refs), newest, folders)
    _delete(store, parts.remove)
    if whole:
        prefixes = {chunks_prefix(job)}
    elif reusing:
        return len(parts.remove), 0  # the sweep of the whole job tells which chunks are still named
    else:
        prefixes = {chunks_prefix(job, folder_of(ref.key)) for manifest in dropped for ref in manifest.parts}
    listed = (key for prefix in sorted(prefixes) for key in _keys(store, prefix))
    chunks = plan_sweep(listed, named, newest, folders)
    _delete(store, chunks.remove)
    return len(parts.remove), len(chunks.remove)


def _why_it_stays(key: str, named: frozenset[str], newest: VersionId, folders: frozenset[str]) -> str:
    """Empty when it may go."""
    version = version_of(key)
    if version is None:
        return "not an object of a save"
    if version >= newest or folder_of(key) in folders:
        return "of a kept version, or of a save under way"
    return "named by a kept checkpoint" if key in named else ""


def _chunks_named(store: Store, job: str, refs: Sequence[PartRef], damaged_may_be: set[str]) -> frozenset[str]:
    """Keys of all chunks that part lists name. Only those of the digests `damaged_may_be` need not be readable."""

    def named(ref: PartRef) -> list[str]:
        try:
            return [chunk_key(job, chunk) for chunk in read_part(store, ref).chunks]
        except (CheckpointError, NotFound):
            if ref.digest in damaged_may_be:
                return []
            raise

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="prune") as pool:
        return frozenset(key for keys in pool.map(named, refs) for key in keys)


def _keys(store: Store, prefix: str) -> Iterable[str]:
    return (entry.key for entry in store.list(prefix))


def _delete(store: Store, keys: Sequence[str]) -> None:
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="prune") as pool:
        for _ in pool.map(store.delete, keys):
            pass
