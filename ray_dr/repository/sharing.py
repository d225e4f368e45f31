"""Chunks of one job that another job's checkpoints name: a fine-tune does not put again what its base has.

Theory of operation. Job B begins at a checkpoint K of job A in the same store. Two entries make it so, in this order: a
*hold* in A's log, appended in full knowledge of it, while K exists; then, once in B's life, the *base* K in B's log. As
long as the base is open, B's checkpoints may name chunks that K names; `too_late` refuses them before and after. When no
checkpoint of B that exists, waits or is itself held names a chunk of another job, B's log says so: the base is closed,
and never opens again. After that, and not before, A's log gets the *release*.

While a hold is in force no pruner of A removes an object that K names. One that has read A's log beyond the hold treats
K as named. One that has read less sees K exist or yet to come, and removes nothing that such a checkpoint names (see
`prune`). None has dropped K without having read the hold, as whoever appends has read all before.

A release never comes too early. It is appended only when B's log says of this very K that it is not based on it: closed,
or based on another one. Both stay true for ever, so it doesn't matter how old that knowledge is, nor how many release.

Closing is right. It is decided on all of B's log before it, when no checkpoint there names a foreign chunk. Take the
first one appended later that does. It has it from K: refused, as the base is closed. Or from a checkpoint that exists
when it is appended, which names it too: that one was there at the closing and did not, or came later and was first. QED.

B may stop anywhere: after the hold and before the base, objects of A stay for nothing until B begins again (it takes the
same hold, or another and releases this one); after closing and before the release, until its next sweep. K may itself name
chunks of a third job: A's base stays open while K is held. Assumed, besides what `prune` does: both jobs live in one store.
"""

from __future__ import annotations

from collections.abc import Iterable

from ray_dr.errors import CheckpointError, ConfigError, NoCheckpoint, NotFound, StoreUnavailable
from ray_dr.model.checkpoint import Manifest
from ray_dr.repository.commit import BaseEntry, CommitLog
from ray_dr.repository.parts import read_part
from ray_dr.stores.base import Store

TRIES = 20


def take_base(store: Store, log: CommitLog, job: str, other: str) -> Manifest | None:
    """Base `job`, which has no checkpoint yet, on the newest one of job `other`: it, or the one it was based on before.

    None: the job goes its own way already. Raises ConfigError for a job that shares with itself, NoCheckpoint when
    `other` has none.
    """
    if other == job:
        raise ConfigError(f"job {job!r} can't share with itself", key="share_with", remedy="the job it was tuned from")
    for _ in range(TRIES):
        view = log.refresh()
        if view.base is not None:
            open_at = view.base.manifest
            CommitLog(store, view.base.job).release(job, but=open_at.version if open_at else None)
            return open_at
        if view.newest is not None:
            return None
        theirs = CommitLog(store, other)
        newest = theirs.newest()
        if newest is None:
            raise NoCheckpoint(f"job {other} has no committed checkpoint in {store.url} that job {job} could share")
        if theirs.hold(newest, job):
            log.base(BaseEntry(other, newest), seen=view)
    raise StoreUnavailable("the logs grow faster than a base can be taken", key=job)


def let_go(store: Store, log: CommitLog, job: str) -> None:
    """Close the base of a job when nothing names its chunks any more, and release what was held for it."""
    view = log.refresh()
    if view.base is None:
        return
    if view.base.manifest is not None:
        alive = (
            *view.checkpoints, *(each.manifest for each in view.pending), *(hold.manifest for hold in view.holds)
        )  # fmt: skip
        if not alive or _names_others(store, alive) or not log.base(BaseEntry(view.base.job, None), seen=view):
            return
    CommitLog(store, view.base.job).release(job)


def _names_others(store: Store, manifests: Iterable[Manifest]) -> bool:
    """Whether a part list names a chunk of another job, or may, as it cannot be read."""
    refs = {ref.key: ref for manifest in manifests for ref in manifest.parts if ref.base}
    try:
        return any("/" in chunk.folder for ref in refs.values() for chunk in read_part(store, ref).chunks)
    except (CheckpointError, NotFound):
        return True
