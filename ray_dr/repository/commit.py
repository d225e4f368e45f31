"""The commit log: which checkpoints a job has, and whose word counts.

Theory of operation. A job's log is a row of objects numbered 1, 2, 3, ..., each put once, by put-if-absent at the next
free number. There are three kinds, and three more by which
jobs share chunks (see `sharing`):

    term        a supervisor takes the job: its term is higher than every term before
    checkpoint  a manifest: with this put, and not before, the checkpoint exists
    kept        the manifests that pruning leaves; it stands for everything before it
    hold        another job may name what a checkpoint names: its objects stay, also when it is dropped, until the
    release     of that hold
    base        the other job's checkpoint that is held for this one; the second time: it is needed no more

Whoever appends has read everything before the number at which it writes, so a put that succeeds was decided in full
knowledge: of two writers one gets the number, the other reads the winner's entry and decides anew. A checkpoint or kept
entry whose term is lower than the highest term before it is void. A supervisor that finds a higher term than its own is
fenced: it can never again commit, because each number it could take comes after that term entry. One conditional put is
thus both the commit and the fence, and needs no clock.

Checkpoints are appended in ascending order of version, higher than any that ever was in the log, and only while every
checkpoint whose chunks they reuse still exists: pruning needs no more than that (see `prune`).

Each entry carries the hash of its own contents and of the name it was put under, so that one put in another's place is
damaged too. A damaged or missing entry is skipped; as it may have been a term entry, the next term is chosen higher by
as many as there are damaged entries, so that no term is ever given out twice; and as it may have been a checkpoint,
`LogView.doubtful` says so to whoever wants the newest. Entries missing at the log's end are told by a *mark*, an empty
object whose name says that this number was there; a mark may be late or missing, but is never wrong. Old entries stay
(per checkpoint about a kilobyte per rank; reading stops at the newest `kept` entry): a number that was freed would be taken by
a writer that has slept since before it was, who would then believe to have committed, and not to be fenced. To tell that
apart would take a clock, or another look at the log after each put.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from blake3 import blake3

from ray_dr.errors import AlreadyExists, Fenced, NotFound, StoreError, StoreUnavailable
from ray_dr.model.checkpoint import Manifest, VersionId
from ray_dr.model.codec import from_json, to_json
from ray_dr.repository.layout import log_key, log_prefix, log_seq, mark_key
from ray_dr.stores.base import Store

FORMAT = 1
APPEND_TRIES = 1000
"""Numbers lost to other writers before an append gives up."""
_READERS = 16
_BATCH = 64


@dataclass(frozen=True, slots=True)
class TermEntry:
    """`nonce` makes the entry's bytes the writer's own: so a repeated put can tell that it had already succeeded."""

    term: int
    owner: str
    at: float
    nonce: str


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Pending:
    """A checkpoint that exists no more; its objects stay until then (UTC seconds), for those who are reading it."""

    manifest: Manifest
    until: float


@dataclass(frozen=True, slots=True)
class HoldEntry:
    """`holder`, a job of the same store, may name what the checkpoint of `version` names."""

    holder: str
    version: VersionId


@dataclass(frozen=True, slots=True)
class ReleaseEntry:
    """The hold has ended."""

    holder: str
    version: VersionId


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold in force, and the checkpoint it is about."""

    holder: str
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """A checkpoint of another job whose chunks this one's may name; without it that has ended, for good."""

    job: str
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class KeptEntry:
    """After pruning: the highest term and version so far, and the manifests that are left, oldest first."""

    term: int
    highest: int
    manifests: tuple[Manifest, ...]
    damaged: int = 0
    newest: VersionId | None = None
    pending: tuple[Pending, ...] = ()
    holds: tuple[Hold, ...] = ()
    base: BaseEntry | None = None


Entry = TermEntry | CheckpointEntry | KeptEntry | HoldEntry | ReleaseEntry | BaseEntry
_KINDS: dict[str, type[Entry]] = {
    "term": TermEntry, "checkpoint": CheckpointEntry, "kept": KeptEntry,
    "hold": HoldEntry, "release": ReleaseEntry, "base": BaseEntry,
}  # fmt: skip
_LATER = ("holds", "base")
"""Members of a kept entry that are written only where they say something: who doesn't know them needn't."""
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class LogView:
    """The log up to and with number `tail` (0: empty).

    damaged   how many entries could not be read, ever
    unread    the numbers of those that no `kept` entry has made irrelevant since
    settled   number of the last entry that says which checkpoint is the newest
    newest    the highest version that ever was in the log
    pending   dropped checkpoints whose objects still stay
    holds     checkpoints, dropped or not, whose objects stay because other jobs name them
    base      None: never was one
    """

    tail: int = 0
    term: int = 0
    checkpoints: tuple[Manifest, ...] = ()
    damaged: int = 0
    unread: tuple[int, ...] = ()
    settled: int = 0
    newest: VersionId | None = None
    pending: tuple[Pending, ...] = ()
    holds: tuple[Hold, ...] = ()
    base: BaseEntry | None = None

    @property
    def doubtful(self) -> tuple[int, ...]:
        """Numbers of unreadable entries any of which may have been a newer checkpoint than all that are known."""
        return tuple(number for number in self.unread if number > self.settled)


def extend(view: LogView, entry: Entry | None) -> LogView:
    """The view after one more entry; None stands for a damaged one. Void entries change nothing but the tail."""
    view = replace(view, tail=view.tail + 1)
    match entry:
        case None:
            return replace(view, damaged=view.damaged + 1, unread=(*view.unread, view.tail))
        case TermEntry():
            return replace(view, term=max(view.term, entry.term))
        case CheckpointEntry() if entry.manifest.term >= view.term:
            version = entry.manifest.version
            known = (*view.checkpoints, entry.manifest)
            return replace(view, checkpoints=known, settled=view.tail, newest=max(view.newest or version, version))
        case KeptEntry() if entry.term >= view.term and entry.highest >= view.term:
            newest = entry.newest or max((left.version for left in entry.manifests), default=view.newest)
            return LogView(
                view.tail, entry.highest, entry.manifests, entry.damaged, (), view.tail, newest, entry.pending,
                entry.holds, entry.base,
            )  # fmt: skip
        case HoldEntry():
            held = [Hold(entry.holder, each) for each in view.checkpoints if each.version == entry.version]
            return replace(view, holds=(*view.holds, *held))
        case ReleaseEntry():
            return replace(view, holds=tuple(hold for hold in view.holds if not _is_of(hold, entry)))
        case BaseEntry() if view.base is None or entry.manifest is None:
            return replace(view, base=entry)
        case _:
            return view


def _is_of(hold: Hold, entry: HoldEntry | ReleaseEntry) -> bool:
    return (hold.holder, hold.manifest.version) == (entry.holder, entry.version)


def too_late(manifest: Manifest, view: LogView) -> str:
    """Why a checkpoint may not be appended to the log as seen; empty when it may. `prune` relies on both reasons."""
    if view.newest is not None and manifest.version <= view.newest:
        return f"step {manifest.version.step} of attempt {manifest.version.attempt} is not newer than {view.newest}"
    base = (view.base.manifest,) if view.base and view.base.manifest else ()
    named = {ref.digest for known in (*view.checkpoints, *base) for ref in known.parts}
    if any(ref.base and ref.base not in named for ref in manifest.parts):
        return f"step {manifest.version.step} reuses chunks of a checkpoint that was dropped meanwhile"
    return ""


def encode(entry: Entry, place: str = "") -> bytes:
    """An entry's bytes: one JSON object with sorted keys that carries the hash of the rest as `digest`.

    place   the object's name, which becomes part of what is hashed
    """
    fields = to_json(entry)
    if isinstance(entry, KeptEntry):
        fields = {name: value for name, value in fields.items() if value or name not in _LATER}
    body = {"entry": _NAMES[type(entry)], "format": FORMAT, **fields}
    return _sealed({**body, "place": place} if place else body)


def decode(data: bytes, place: str = "") -> Entry | None:
    """The entry; None when its bytes are damaged, or those of another place than `place` (older ones don't know theirs).

    Raises StoreError for a format this version doesn't know.
    """
    body = _unsealed(data)
    if body is None or (body.pop("place", place) != place and place):
        return None
    if (found := body.pop("format")) != FORMAT:
        raise StoreError(f"the commit log is of a newer format ({found}, known: {FORMAT}); use a newer ray_dr", key=place)
    try:
        entry: Entry = from_json(_KINDS[body.pop("entry")], body)
    except (ValueError, KeyError) as error:
        raise StoreError(f"the commit log has an entry that this version does not know ({error})") from error
    return entry


class CommitLog:
    """One job's log in one store, with the part that was read kept in memory. Thread-safe."""

    def __init__(self, store: Store, job: str) -> None:
        self._store = store
        self._job = job
        self._view: LogView | None = None
        self._mark = 0
        self._lock = threading.RLock()
        log_prefix(job)  # refuses a bad name early

    def take_term(self, owner: str, at: float) -> int:
        """Take the job: the new term, higher than any before. `at` is UTC seconds."""
        with self._lock:
            nonce = uuid.uuid4().hex
            view = self.refresh()
            for _ in range(APPEND_TRIES):
                term = view.term + view.damaged + 1
                if self._put(view, TermEntry(term, owner, at, nonce)):
                    return term
                view = self.refresh()
            raise self._contended()

    def commit(self, manifest: Manifest) -> Manifest:
        """Make a checkpoint exist; the manifest that stands for its version: this one, or one committed before.

        Raises Fenced when the job has a newer owner, StoreError when the checkpoint came too late: a newer one exists,
        or one whose chunks it reuses was dropped. Then the next save goes on.
        """
        with self._lock:
            view = self._view or self.refresh()
            for _ in range(APPEND_TRIES):
                self._require_term(manifest.term, view)
                if there := [known for known in view.checkpoints if known.version == manifest.version]:
                    return there[-1]
                if why := too_late(manifest, view):
                    raise StoreError(why, key=log_prefix(self._job))
                if self._put(view, CheckpointEntry(manifest)):
                    return manifest
                view = self.refresh()
            raise self._contended()

    def keep(
        self,
        manifests: Sequence[Manifest],
        *,
        term: int | None,
        seen: LogView,
        pending: Sequence[Pending] | None = None,
    ) -> bool:
        """Leave only `manifests`, decided on the log as `seen`. False: the log has grown since, decide anew.

        term      of the supervisor that decides; None for somebody who doesn't own the job and is never fenced
        pending   the dropped checkpoints whose objects stay; None: as they were
        """
        mine = seen.term if term is None else term
        waiting = seen.pending if pending is None else tuple(pending)
        with self._lock:
            self._require_term(mine, seen)
            entry = KeptEntry(
                mine, seen.term, tuple(manifests), seen.damaged, seen.newest, waiting, seen.holds, seen.base
            )
            if self._put(seen, entry):
                return True
            view = self.refresh()
            if term is not None:
                self._require_term(term, view)
            return False

    def hold(self, manifest: Manifest, holder: str) -> bool:
        """Have the objects of a checkpoint stay for another job. False: it does not exist (any more)."""
        with self._lock:
            for _ in range(APPEND_TRIES):
                view = self.refresh()
                if Hold(holder, manifest) in view.holds:
                    return True
                if manifest not in view.checkpoints:
                    return False
                if self._put(view, HoldEntry(holder, manifest.version)):
                    return True
            raise self._contended()

    def release(self, holder: str, *, but: VersionId | None = None) -> None:
        """End the holds of a job, except that of a version. The job's own log must have said before that it needs them no
        more, or never will (why: `sharing`)."""
        with self._lock:
            for _ in range(APPEND_TRIES):
                view = self.refresh()
                versions = [hold.manifest.version for hold in view.holds if hold.holder == holder]
                over = [version for version in versions if version != but]
                if not over:
                    return
                self._put(view, ReleaseEntry(holder, over[0]))
            raise self._contended()

    def base(self, base: BaseEntry, *, seen: LogView) -> bool:
        """Say on what this job is based, or that it is no more, decided on the log as `seen`. False: it has grown since."""
        with self._lock:
            return self._put(seen, base)

    def mark(self) -> None:
        """Say in the store how far the log has come, so that the loss of its last entries is noticed. Best effort."""
        with self._lock:
            before, now = self._mark, (self._view or self.refresh()).tail
            if now == before:
                return
            with suppress(StoreError):
                self._store.put(mark_key(self._job, now), b"")
                self._mark = now
                if before:
                    self._store.delete(mark_key(self._job, before))

    def checkpoints(self) -> tuple[Manifest, ...]:
        """All checkpoints that exist, oldest first."""
        return self.refresh().checkpoints

    def newest(self) -> Manifest | None:
        """The checkpoint committed last."""
        return (self.checkpoints() or (None,))[-1]

    def term(self) -> int:
        """The highest term; 0 when nobody ever took the job."""
        return self.refresh().term

    def refresh(self) -> LogView:
        """Read what was appended since the last time."""
        with self._lock:
            view = self._view or self._load()
            while (data := self._read(view.tail + 1)) is not None:
                view = extend(view, decode(data, log_key(self._job, view.tail + 1)))
            self._view = view
            return view

    def life(self) -> str:
        """What tells this log from any other of the same job name, in 12 hex characters: the hash of its first entry, which
        stays for ever. Empty when there is none."""
        data = self._read(1)
        return str(blake3(data).hexdigest())[:12] if data else ""

    def _put(self, view: LogView, entry: Entry) -> bool:
        key = log_key(self._job, view.tail + 1)
        try:
            self._store.put(key, encode(entry, key), if_absent=True)
        except AlreadyExists:
            return False
        self._view = extend(view, entry)
        return True

    def _load(self) -> LogView:
        """Read the log backwards, in batches, to the newest `kept` entry that counts, and fold it from there."""
        found = [log_seq(entry.key) for entry in self._store.list(log_prefix(self._job))]
        last = max((seq for seq in found if seq is not None), default=0)
        entries: dict[int, Entry | None] = {}
        with ThreadPoolExecutor(_READERS, thread_name_prefix="log") as pool:
            for high in range(last, 0, -_BATCH):
                numbers = range(max(1, high - _BATCH + 1), high + 1)
                entries.update(zip(numbers, pool.map(self._entry, numbers), strict=True))
                if any(isinstance(entry, KeptEntry) for entry in entries.values()):
                    break
        first = _first_needed(entries)
        view = LogView(tail=first - 1)
        for seq in range(first, last + 1):
            view = extend(view, entries[seq])
        return view

    def _entry(self, seq: int) -> Entry | None:
        data = self._read(seq)
        return None if data is None else decode(data, log_key(self._job, seq))

    def _read(self, seq: int) -> bytes | None:
        try:
            return self._store.get(log_key(self._job, seq))
        except NotFound:
            return None

    def _require_term(self, mine: int, view: LogView) -> None:
        if mine < view.term:
            raise Fenced(self._job, mine=mine, newest=view.term)
        assert mine <= view.term or view.damaged, f"term {mine} was never taken (the highest is {view.term})"

    def _contended(self) -> StoreError:
        return StoreUnavailable(f"{APPEND_TRIES} other writers were faster", key=log_prefix(self._job))


def _first_needed(entries: Mapping[int, Entry | None]) -> int:
    """Where folding starts: at the newest `kept` entry, else at the first.

    A kept entry that was put is never void: its writer had read all before it, and no higher term was there.
    """
    return max((seq for seq, entry in entries.items() if isinstance(entry, KeptEntry)), default=1)


def _sealed(body: dict[str, Any]) -> bytes:
    return _dump({**body, "digest": _digest(body)})


def _unsealed(data: bytes) -> dict[str, Any] | None:
    """What was sealed, without its digest; None when the bytes are damaged."""
    try:
        body: dict[str, Any] = json.loads(data)
        digest = body.pop("digest")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None
    return body if digest == _digest(body) else None


def _digest(body: dict[str, Any]) -> str:
    return str(blake3(_dump(body)).hexdigest())


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
