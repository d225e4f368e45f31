"""URL -> Store, and a check that a store does what it promises.

    file:///abs/path  or a plain path     a directory; `?shared=true` when every node mounts it
    s3://bucket/prefix                    `?endpoint=http://host:port`, `?region=...`, `?payload=signed`
    memory://name                         one process only, for tests

Each takes `?key=env:NAME`, `?key=file:/path` or `?key=kms:<id>`: its objects are encrypted then (`stores.sealed`).
"""

from __future__ import annotations

import dataclasses
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ray_dr.errors import AlreadyExists, StoreError
from ray_dr.stores.base import Store, Traits
from ray_dr.stores.retrying import Retrying

RACERS = 8
RACES = 3


def open_store(url: str) -> Store:
    """The store at `url`. Raises StoreError, saying what to write instead, for a URL that names none."""
    if "://" not in url:
        return _open_file(urlsplit(f"file://{_absolute(url)}"), {})
    parts = urlsplit(url)
    makers: dict[str, Callable[[SplitResult, dict[str, str]], Store]] = {
        "file": _open_file,
        "s3": _open_s3,
        "memory": _open_memory,
    }
    if parts.scheme not in makers:
        raise StoreError(f"unknown kind of store {parts.scheme!r} in {url!r}; write file://, s3:// or a path")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    source = options.pop("key", None)
    store = makers[parts.scheme](parts, options)
    return store if source is None else _seal(store, source)


def refuse_locked(store: Store) -> None:
    """Nothing, unless the store is encrypted and was opened without its key: WrongKey then."""
    from ray_dr.stores.keys import KEYS_PREFIX, WrongKey

    if next(iter(store.list(KEYS_PREFIX)), None) is not None:  # an opened one does not show them
        raise WrongKey(f"{store.url} is encrypted: add ?key=env:NAME, ?key=file:/path or ?key=kms:<id> to its URL")


def rotate_key(url: str, to: str) -> int:
    """Wrap the data keys of the encrypted store at `url` with the key that `to` names instead of the URL's; how many.
    Raises WrongKey."""
    from ray_dr.stores.keys import WrongKey, find_key, rotate

    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if (old := options.pop("key", None)) is None:
        raise WrongKey("name the key that opens the store now in its URL: ?key=env:NAME")
    bare = open_store(parts._replace(query=urlencode(options)).geturl())
    return rotate(bare, find_key(old), find_key(to))


def _seal(store: Store, source: str) -> Store:
    from ray_dr.stores.keys import find_key, open_keys
    from ray_dr.stores.sealed import SealedStore

    return SealedStore(store, open_keys(store, find_key(source)))


def probe(store: Store) -> Traits:
    """The store's traits, tried out: reachable, writable, readable, and put-if-absent has one winner, also in a race.

    Writes and removes a few objects below `probe/`. Raises AccessDenied, StoreUnavailable, ... as the store does;
    StoreError when put-if-absent is not conditional, because two supervisors could then both believe to own a job.
    """
    refuse_locked(store)
    prefix = f"probe/{uuid.uuid4().hex}"
    try:
        _check_round_trip(store, f"{prefix}/object")
        _check_conditional(store, f"{prefix}/once")
        for number in range(RACES):
            _check_race(store, f"{prefix}/race-{number}")
    finally:
        _remove(store, prefix)
    return dataclasses.replace(store.traits, conditional_put=True)


def _check_round_trip(store: Store, key: str) -> None:
    store.put(key, b"ray_dr")
    if store.get(key) != b"ray_dr" or [entry.key for entry in store.list(key)] != [key]:
        raise StoreError(f"{store.url} does not give back what was just stored there; use a consistent store", key=key)


def _check_conditional(store: Store, key: str) -> None:
    store.put(key, b"first", if_absent=True)
    with suppress(AlreadyExists):
        store.put(key, b"second", if_absent=True)
        raise _not_conditional(store, "overwrites")


def _check_race(store: Store, key: str) -> None:
    together = threading.Barrier(RACERS)

    def race(number: int) -> bool:
        together.wait()
        try:
            store.put(key, f"racer {number}".encode(), if_absent=True)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        winners = sum(pool.map(race, range(RACERS)))
    if winners != 1:
        raise _not_conditional(store, f"lets {winners} of {RACERS} racing writers win")


def _not_conditional(store: Store, how: str) -> StoreError:
    remedy = "use a server with conditional writes (AWS S3, Ceph), an unversioned bucket, or a directory"
    return StoreError(f"{store.url} {how} on put-if-absent (If-None-Match: *), so commits would not be safe; {remedy}")


def _remove(store: Store, prefix: str) -> None:
    with suppress(StoreError):  # what the probe found is the news, not that it can't clean up
        for entry in list(store.list(f"{prefix}/")):
            store.delete(entry.key)


def _absolute(path: str) -> str:
    from os.path import abspath, expanduser
    from urllib.parse import quote

    return quote(abspath(expanduser(path)))


def _open_file(parts: SplitResult, options: dict[str, str]) -> Store:
    from ray_dr.stores.disk import FileStore

    _check_options(parts, options, {"shared"})
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise StoreError(f"a file store needs an absolute path: file:///{parts.netloc}{parts.path}")
    return FileStore(unquote(parts.path), shared=options.get("shared", "false") == "true")


def _open_s3(parts: SplitResult, options: dict[str, str]) -> Store:
    from ray_dr.stores.s3 import Bucket, S3Store

    _check_options(parts, options, {"endpoint", "region", "payload"})
    if "@" in parts.netloc:
        raise StoreError("credentials do not belong in a store's URL; use the AWS environment variables or a profile")
    if not parts.netloc:
        raise StoreError("an S3 store needs a bucket: s3://bucket/prefix")
    bucket = Bucket(
        name=parts.netloc,
        prefix=unquote(parts.path).strip("/"),
        endpoint=options.get("endpoint"),
        region=options.get("region"),
        sign_payload=options.get("payload") == "signed",
    )
    return Retrying(S3Store(bucket))


def _open_memory(parts: SplitResult, options: dict[str, str]) -> Store:
    from ray_dr.stores.memory import MemoryStore

    _check_options(parts, options, set())
    if not parts.netloc:
        raise StoreError("a memory store needs a name: memory://name")
    return MemoryStore(parts.netloc + parts.path)


def _check_options(parts: SplitResult, options: dict[str, str], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise StoreError(f"unknown option {unknown[0]!r} in a {parts.scheme}:// URL; known: {sorted(known) or 'none'}")
