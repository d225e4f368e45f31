"""URL -> Store, and a check that a store does what it promises.

    file:///abs/path  or a plain path     a directory; `?shared=true` when every node mounts it
    s3://bucket/prefix                    `?endpoint=http://host:port`, `?region=...`, `?payload=signed`
    memory://name                         one process only, for tests

Each takes `?key=env:NAME`, `?key=file:/path` or `?key=kms:<id>`: its objects are encrypted then (`stores.sealed`).
"""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import Callable
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ray_dr.errors import StoreError
from ray_dr.stores.base import Store, Traits
from ray_dr.stores.checks import PUT_IF_ABSENT, own_folder
from ray_dr.stores.examine import reach, try_out
from ray_dr.stores.retrying import Retrying
from ray_dr.stores.unconditional import Unconditional


def open_store(url: str, *, part_bytes: int | None = None) -> Store:
    """The store at `url`. Raises StoreError, saying what to write instead, for a URL that names none.

    part_bytes   parts of that size, for objects of twice as much and more, where the store has parts (S3: 5 MiB at least)
    """
    if "://" not in url:
        return _open_file(urlsplit(f"file://{_absolute(url)}"), {})
    parts = urlsplit(url)
    makers: dict[str, Callable[[SplitResult, dict[str, str]], Store]] = {
        "file": _open_file,
        "s3": functools.partial(_open_s3, part_bytes=part_bytes),
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
    """The store's traits, tried out: it takes and gives back, and whether put-if-absent has one winner, also in a race.

    Takes some twenty round trips; writes and removes a few objects below `probe/`. `conditional_put` is what was seen, not
    what the server claims. Raises AccessDenied, StoreUnavailable, ... as the store does; BrokenPromise when it does not
    give back what was put.
    """
    refuse_locked(store)
    with own_folder(store, f"probe/{uuid.uuid4().hex}") as (inside, folder):
        reach(inside, f"{folder}/reached")
        conditional = all(try_out(check, inside, f"{folder}/{check.run.__name__}").holds for check in PUT_IF_ABSENT)
    return dataclasses.replace(store.traits, conditional_put=conditional)


def proven(store: Store) -> Store:
    """The store as its probe finds it: itself, or without conditional writes `Unconditional`, whose traits say so.

    For those who commit. Raises as `probe` does.
    """
    return store if probe(store).conditional_put else Unconditional(store)


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


def _open_s3(parts: SplitResult, options: dict[str, str], *, part_bytes: int | None) -> Store:
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
    if part_bytes is not None:
        bucket = dataclasses.replace(bucket, part_bytes=part_bytes, parts_from_bytes=2 * part_bytes)
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
