"""A part into the store: the chunks that changed since the newest checkpoint, then the list that names them all."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass, replace

from ray_dr.errors import CheckpointError, StoreError
from ray_dr.model.checkpoint import Chunk, Manifest, Part, PartRef
from ray_dr.repository.chunks import KnownChunks, folders, put_chunk
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.layout import save_folder
from ray_dr.repository.parts import parse_part, read_list, write_part
from ray_dr.stores.base import Store

LISTS_MAX = 16
"""Part lists read after a change of the world size: what of a share comes from further ranks is put again."""


@dataclass(frozen=True, slots=True)
class SavedPart:
    """A part in the store; `sent` counts bytes of chunks that had to be put."""

    ref: PartRef
    sent: int


def save_part(
    store: Store,
    log: CommitLog | None,
    job: str,
    part: Part,
    stream: memoryview,
    *,
    term: int,
    known: KnownChunks,
    pool: Executor | None = None,
    chunks: Iterable[Chunk] | None = None,
    each: Callable[[int, int], None] = lambda done, sent: None,
) -> SavedPart:
    """Store a sealed part (its chunks have their ids) whose bytes are `stream`.

    Chunks that the newest checkpoint names are not sent again, as far as the lists of `_likely` ranks tell; `PartRef.base`
    says so, and the commit is refused should that checkpoint have been dropped by then (the reason why is in `prune`).
    Costs two small reads besides the puts, and a few more where the world has changed since. Raises StoreError; doing it
    again sends only what is missing.

    log      None: nothing is reused
    pool     puts several chunks at a time; none is under way any more when this returns or raises
    chunks   the part's chunks as they are sealed, where `part` has none yet: each is put when it comes
    each   is told (bytes that are there, bytes of them that moved), first of what is reused, then of each chunk by the thread
           that put it
    """
    base, there = _reusable(store, log, part, known) if log else ("", {})
    folder = save_folder(part.version, term)
    placed: list[Chunk] = []

    def new() -> Iterator[Chunk]:
        seen = set(there)
        for chunk in part.chunks if chunks is None else chunks:
            placed.append(replace(chunk, folder=there.get(chunk.id, folder)))
            if chunk.id in seen:
                each(chunk.size, 0)
                continue
            seen.add(chunk.id)
            yield placed[-1]

    def put(chunk: Chunk) -> int:
        moved = _put(store, job, chunk, stream, known)
        each(chunk.size, moved)
        return moved

    sent = _put_all(new(), put, pool)
    reuses = any(chunk.id in there for chunk in placed)
    listed = replace(part, chunks=tuple(placed))
    ref = write_part(store, job, listed, term=term, base=base if reuses else "")
    known.wrote_list(ref.digest, placed)
    return SavedPart(ref, sent)


def _reusable(store: Store, log: CommitLog, part: Part, known: KnownChunks) -> tuple[str, Mapping[str, str]]:
    """The digest of one part list of the newest checkpoint, and id -> folder of chunks that it names. A job without a
    checkpoint takes the one of another job that it is based on, if any.

    Older checkpoints that are kept are not looked at: what they have and the newest lacks has changed since.
    """
    view = log.refresh()
    newest = view.checkpoints[-1] if view.checkpoints else view.base and view.base.manifest
    base, there = "", dict[str, str]()
    for ref in _likely(newest, part) if newest else ():
        with contextlib.suppress(StoreError, CheckpointError):  # dropped meanwhile or damaged: its chunks are put again
            there |= _named(store, ref, known)
            base = base or ref.digest
    if newest and not view.checkpoints:
        there = {id_: folder if "/" in folder else f"{newest.job}/{folder}" for id_, folder in there.items()}
    return base, there


def _named(store: Store, ref: PartRef, known: KnownChunks) -> Mapping[str, str]:
    """Id -> folder of the chunks that a list names. It is read in any case, as it may be damaged, but one that this process wrote
    itself says what it did then: a long list takes a hundred times as long to parse as to verify."""
    data = read_list(store, ref)
    found = known.named_by(ref.digest)
    return folders(parse_part(store, ref, data).chunks) if found is None else found


def _likely(newest: Manifest, part: Part) -> list[PartRef]:
    """The part lists that may name chunks of this part: the rank's own; from another world those of the same share of it,
    nearest first."""
    if newest.world == part.world:
        return [ref for ref in newest.parts if ref.rank == part.rank]
    middle = (part.rank + 0.5) / part.world
    return sorted(newest.parts, key=lambda ref: abs((ref.rank + 0.5) / newest.world - middle))[:LISTS_MAX]


def _put_all(chunks: Iterable[Chunk], put: Callable[[Chunk], int], pool: Executor | None) -> int:
    """Bytes sent: of all chunks, or an error. After one no further chunk is begun."""
    if pool is None:
        return sum(put(chunk) for chunk in chunks)
    failed = threading.Event()

    def put_unless_failed(chunk: Chunk) -> int:
        if failed.is_set():
            return 0
        try:
            return put(chunk)
        except BaseException:
            failed.set()
            raise

    under_way: list[Future[int]] = []
    errors: list[Exception] = []
    try:
        for chunk in chunks:
            if failed.is_set():
                break
            under_way.append(pool.submit(put_unless_failed, chunk))
    except RuntimeError:  # a pool that was shut down takes nothing more
        errors.append(_given_up())
    except CheckpointError as error:  # there is no more to come
        failed.set()
        errors.append(error)
    sent = 0
    for each in under_way:
        try:
            sent += each.result()
        except CancelledError:  # `wait` would not return for these
            errors.append(_given_up())
        except Exception as error:
            errors.insert(0, error)
    if errors:
        raise errors[0]
    return sent


def _given_up() -> StoreError:
    return StoreError("the save was given up: its writer is closing")


def _put(store: Store, job: str, chunk: Chunk, stream: memoryview, known: KnownChunks) -> int:
    sent = put_chunk(store, job, chunk, stream[chunk.at : chunk.at + chunk.size], known=known)
    return chunk.size if sent else 0
