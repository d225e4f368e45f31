"""One store of a job as its supervisor sees it: the commit log, the term there, the checkpoints that exist."""

from __future__ import annotations

import time

from ray_dr.errors import NoCheckpoint
from ray_dr.model.checkpoint import Manifest, PartRef, VersionId
from ray_dr.model.job import StoreTier
from ray_dr.repository import prune
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.sharing import take_base
from ray_dr.stores.base import Store
from ray_dr.stores.open import open_store, proven


class Depot:
    """Opening one takes the job there: every writer of a lower term is fenced from then on. Raises StoreError.

    `alone` says why it shares nothing with the job it was to share with; empty otherwise.
    `stored` are the checkpoints that exist, oldest first, as far as this supervisor knows: a recovery must not wait for
    the store.
    """

    def __init__(self, tier: StoreTier, job: str, owner: str) -> None:
        self.tier, self.job = tier, job
        self.store = proven(open_store(tier.url))
        self.log = CommitLog(self.store, job)
        self.term = self.log.take_term(owner, time.time())
        self.alone = _share(self.store, self.log, job, tier.share_with) if tier.share_with else ""
        self.log.mark()
        seen = self.log.refresh()
        self.stored, self.doubtful = seen.checkpoints, seen.doubtful
        self._refs: dict[VersionId, dict[int, PartRef]] = {}

    def arrived(self, version: VersionId, ref: PartRef) -> None:
        """A part list is in the store."""
        self._refs.setdefault(version, {})[ref.rank] = ref

    def manifest(self, version: VersionId, world: int, position: int) -> Manifest | None:
        """What to commit for a version, None unless all of its parts have arrived; older ones that never will are forgotten."""
        parts = self._refs.get(version, {})
        if set(parts) != set(range(world)):
            return None
        self._refs = {v: refs for v, refs in self._refs.items() if v >= version}
        refs = tuple(parts[rank] for rank in sorted(parts))
        return Manifest(1, self.job, self.term, version, world, position, refs, time.time())

    def after(self, manifest: Manifest) -> tuple[VersionId, ...]:
        """The newest versions, which retention leaves in any case, once this one is there."""
        return tuple(known.version for known in (*self.stored, manifest)[-self.tier.keep_last :])

    def committed(self, manifest: Manifest, *, held: bool = False) -> None:
        """It exists. `held`: retention waits, so that older ones do as well."""
        self.stored = (*self.stored, manifest)[0 if held else -self.tier.keep_last :]

    def prune(self) -> None:
        """Apply the tier's retention. Raises StoreError, CheckpointError, Fenced."""
        prune.execute(self.store, self.log, self.job, keep=self.tier.keep, term=self.term)

    def strike(self, version: VersionId) -> None:
        """Take a version that can't be read out of the log, where there is another: a later save must not reuse its chunks.
        Raises StoreError, Fenced."""
        seen = self.log.refresh()
        kept = [manifest for manifest in seen.checkpoints if manifest.version != version]
        if kept and len(kept) < len(seen.checkpoints):
            self.log.keep(kept, term=self.term, seen=seen)

    def refs(self, version: VersionId) -> tuple[PartRef, ...]:
        """The part lists of a checkpoint; none when it is not there."""
        return next((manifest.parts for manifest in self.stored if manifest.version == version), ())




def _share(store: Store, log: CommitLog, job: str, other: str) -> str:
    try:
        take_base(store, log, job, other)
    except NoCheckpoint as error:
        return str(error)
    return ""
