"""Keys of an encrypted store: a data key that encrypts objects, kept in the store itself, wrapped by a key that is not.

    ?key=env:NAME       64 hex digits (or base64 of 32 bytes) in an environment variable of every node
    ?key=file:/path     the same in a file
    ?key=kms:<id>       a key of AWS KMS, which never leaves it (`stores.kms`)

The wrapping key can be changed without touching data (`rotate`): the data keys are wrapped anew. An object names the
data key it was sealed with, so a store may hold several of them. Wrapped keys lie at `keys/<data key>-<wrapper>.json`.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ray_dr.errors import AlreadyExists, NotFound, StoreError
from ray_dr.stores.base import Store

KEY_BYTES = 32
ID_BYTES = 8
NONCE_BYTES = 12
KEYS_PREFIX = "keys/"
FORMAT = 1
REMEDY = "64 hex digits, as `openssl rand -hex 32` prints them"


class WrongKey(StoreError):
    """The key given does not open the store, or none was given for a store that is encrypted."""


@dataclass(frozen=True, slots=True)
class DataKey:
    """What objects are sealed with. `id` counts from 1; `repository` (hex) names the store the key was made for."""

    id: int
    repository: str
    secret: bytes


class Wrapper(Protocol):
    """A key that wraps data keys. `fingerprint` (hex) tells keys apart and says nothing about them."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def note(self) -> str:
        """What whoever gave the wrong key should know of fingerprints of this kind."""

    def wrap(self, secret: bytes, context: str) -> bytes: ...

    def unwrap(self, wrapped: bytes, context: str) -> bytes:
        """Raises WrongKey."""


class LocalKey:
    """A wrapping key in this process's memory: AES-256-GCM, 12-byte random nonce first."""

    note = ""

    def __init__(self, secret: bytes) -> None:
        self._cipher = AESGCM(secret)
        self.fingerprint = derive(secret, b"", b"ray_dr fingerprint", ID_BYTES).hex()

    def wrap(self, secret: bytes, context: str) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret, context.encode())

    def unwrap(self, wrapped: bytes, context: str) -> bytes:
        try:
            return self._cipher.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], context.encode())
        except (InvalidTag, ValueError) as error:
            raise WrongKey("the wrapped data key was changed, or is of another store") from error


def find_key(source: str) -> Wrapper:
    """The wrapping key that `env:NAME`, `file:/path` or `kms:<id>` names. Raises WrongKey, saying what to do."""
    kind, _, name = source.partition(":")
    if kind == "env" and name:
        text = os.environ.get(name, "")
        if not text.strip():
            raise WrongKey(f"the store's key is to come from ${name}, which is not set here; set it to {REMEDY}")
    elif kind == "file" and name:
        try:
            text = Path(name).read_text()
        except OSError as error:
            raise WrongKey(f"the store's key is to come from {name}, which cannot be read: {error}") from error
    elif kind == "kms" and name:
        from ray_dr.stores.kms import KmsKey

        return KmsKey(name)
    else:
        raise WrongKey(f"no source of keys: {source!r}; write key=env:NAME, key=file:/path or key=kms:<id>")
    return LocalKey(_parse(text.strip(), source))


def open_keys(store: Store, wrapper: Wrapper) -> tuple[DataKey, ...]:
    """The store's data keys, the one to seal with last; a first one is made in an empty store.

    Raises WrongKey when `wrapper` opens none of them, and for a store that holds objects in clear.
    """
    if found := _unwrap_all(store, wrapper):
        return found
    if any(True for _ in store.list(KEYS_PREFIX)):
        others = ", ".join(sorted({entry.key.rpartition("-")[2].removesuffix(".json") for entry in store.list(KEYS_PREFIX)}))
        raise WrongKey(
            f"{store.url} was encrypted with another key (fingerprint {others}; the one given has {wrapper.fingerprint}"
            f"{wrapper.note})"
        )
    if next(iter(store.list("jobs/")), None) is not None:
        raise WrongKey(f"{store.url} holds jobs that are not encrypted; use an empty prefix for encrypted ones")
    made = DataKey(1, secrets.token_hex(ID_BYTES), secrets.token_bytes(KEY_BYTES))
    with suppress(AlreadyExists):  # of several that open an empty store at once, one makes the key for all
        _put(store, wrapper, made, if_absent=True)
    return _unwrap_all(store, wrapper)


def rotate(store: Store, old: Wrapper, new: Wrapper) -> int:
    """Wrap every data key with `new` and remove what `old` had wrapped; how many. No object is read or written.

    Cut off at any point, the store opens with one of the two, and rotating again completes it.
    """
    keys = {key.id: key for wrapper in (new, old) for key in _unwrap_all(store, wrapper)}
    if not keys:
        raise WrongKey(f"neither the old key ({old.fingerprint}) nor the new one opens {store.url}")
    for key in keys.values():
        _put(store, new, key)
    if new.fingerprint != old.fingerprint:
        for key in keys.values():
            store.delete(_name(key.id, old))
    return len(keys)


def derive(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(SHA256(), size, salt, info).derive(secret)


def _name(key: int, wrapper: Wrapper) -> str:
    return f"{KEYS_PREFIX}{key:04d}-{wrapper.fingerprint}.json"


def _put(store: Store, wrapper: Wrapper, key: DataKey, *, if_absent: bool = False) -> None:
    wrapped = wrapper.wrap(key.secret, _context(key.id, key.repository))
    body = {"format": FORMAT, "id": key.id, "repository": key.repository, "wrapped": base64.b64encode(wrapped).decode()}
    store.put(_name(key.id, wrapper), json.dumps(body, sort_keys=True).encode(), if_absent=if_absent)


def _unwrap_all(store: Store, wrapper: Wrapper) -> tuple[DataKey, ...]:
    end = f"-{wrapper.fingerprint}.json"
    names = [entry.key for entry in store.list(KEYS_PREFIX) if entry.key.endswith(end)]
    return tuple(_unwrap(store, name, wrapper) for name in names)


def _unwrap(store: Store, name: str, wrapper: Wrapper) -> DataKey:
    try:
        body = json.loads(store.get(name))
        if body["format"] != FORMAT:
            raise WrongKey(f"{store.url} has keys of a newer format; use a newer ray_dr", key=name)
        wrapped, key, repository = base64.b64decode(body["wrapped"], validate=True), int(body["id"]), str(body["repository"])
    except NotFound:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise WrongKey(f"a wrapped key of {store.url} is damaged ({error}); restore it from a copy", key=name) from error
    return DataKey(key, repository, wrapper.unwrap(wrapped, _context(key, repository)))


def _context(key: int, repository: str) -> str:
    return f"ray_dr data key {FORMAT}|{repository}|{key}"


def _parse(text: str, source: str) -> bytes:
    for decode in (bytes.fromhex, lambda said: base64.b64decode(said, validate=True)):
        with suppress(ValueError, binascii.Error):
            secret = decode(text)
            if len(secret) == KEY_BYTES:
                return secret
    raise WrongKey(f"the key from {source} is not a 256-bit key; give {REMEDY}")
