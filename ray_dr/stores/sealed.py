"""A store whose objects are encrypted: a wrapper around any other store. Names and sizes stay visible, bytes do not.

Each object has a key and a nonce of its own, derived from the store's data key and a random salt (HKDF-SHA256), and is
cut into segments of SEGMENT_BYTES, each sealed with AES-256-GCM, so that ranges can be read without the rest:

    "RDs1" | data key, 4 bytes big-endian | salt, 16 bytes | segment | segment | ...
    segment: ciphertext, as long as its plaintext (the last one may be shorter, or empty), then a 16-byte tag

A segment's nonce is the object's 7 bytes, its number (4 bytes, big-endian), and 1 for the last segment or else 0: segments
can be neither reordered nor cut off (Hoang, Reyhanitabar, Rogaway, Vizár: "Online Authenticated-Encryption and its
Nonce-Reuse Misuse-Resistance", CRYPTO 2015, the STREAM construction). The associated data are the repository's id and
the object's name, which begins with its kind: an object put in another one's place does not open.

An old object under its own name does open: what is newest, the commit log says, whose entries are never overwritten.
"""

from __future__ import annotations

import mmap
import secrets
import struct
import threading
from collections.abc import Iterator, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ray_dr.errors import ObjectTooShort, StoreError
from ray_dr.stores.base import Buffer, Entry, Store, Traits
from ray_dr.stores.keys import KEY_BYTES, KEYS_PREFIX, DataKey, WrongKey, derive

MAGIC = b"RDs1"
HEADER = struct.Struct(">4sI16s")
SEGMENT_BYTES = 2**20
TAG_BYTES = 16
_SEALED_SEGMENT = SEGMENT_BYTES + TAG_BYTES
_NONCE_PREFIX = 7


class BrokenSeal(StoreError):
    """An object was changed, cut off, or put under another name after it was sealed."""


class _Cipher:
    """One object's key, nonces and context."""

    def __init__(self, key: DataKey, salt: bytes, name: str) -> None:
        material = derive(key.secret, salt, b"ray_dr object 1", KEY_BYTES + _NONCE_PREFIX)
        self._aead = AESGCM(material[:KEY_BYTES])
        self._prefix = material[KEY_BYTES:]
        self._context = f"{key.repository}|{name}".encode()
        self.name = name

    def seal(self, number: int, last: bool, plain: memoryview, into: memoryview) -> None:
        self._aead.encrypt_into(self._nonce(number, last), plain, self._context, into)

    def open(self, number: int, last: bool, sealed: memoryview, into: memoryview) -> None:
        try:
            self._aead.decrypt_into(self._nonce(number, last), sealed, self._context, into)
        except InvalidTag as error:
            raise BrokenSeal("the object was changed, cut off or moved after it was sealed", key=self.name) from error

    def _nonce(self, number: int, last: bool) -> bytes:
        return self._prefix + number.to_bytes(4, "big") + bytes([last])


class SealedStore:
    """`inner`, encrypted with the last of `keys`; objects sealed with any of them open."""

    def __init__(self, inner: Store, keys: Sequence[DataKey]) -> None:
        self._inner, self._keys, self._newest = inner, {key.id: key for key in keys}, keys[-1]
        self._room = threading.local()

    @property
    def traits(self) -> Traits:
        return self._inner.traits

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        _check_free(key)
        plain = memoryview(data).cast("B")
        salt = secrets.token_bytes(16)
        cipher = _Cipher(self._newest, salt, key)
        room = self._buffer(_sealed_size(plain.nbytes))
        HEADER.pack_into(room, 0, MAGIC, self._newest.id, salt)
        count = _segments(plain.nbytes)
        for number in range(count):
            piece = plain[number * SEGMENT_BYTES : (number + 1) * SEGMENT_BYTES]
            at = HEADER.size + number * _SEALED_SEGMENT
            cipher.seal(number, number == count - 1, piece, room[at : at + piece.nbytes + TAG_BYTES])
        self._inner.put(key, room, if_absent=if_absent)

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        sealed, first, complete, cipher = self._fetch(key, start, size)
        plain = bytearray(_plain_size(sealed.nbytes))
        self._open(cipher, sealed, first, complete, memoryview(plain))
        skip = start - first * SEGMENT_BYTES
        return bytes(plain[skip:] if size is None else plain[skip : skip + size])

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        room = into.cast("B")
        sealed, first, complete, cipher = self._fetch(key, start, room.nbytes)
        there, skip = _plain_size(sealed.nbytes), start - first * SEGMENT_BYTES
        if there - skip < room.nbytes:
            raise ObjectTooShort(f"{room.nbytes} bytes asked for at {start}, {max(0, there - skip)} there", key=key)
        if skip == 0 and there == room.nbytes:
            self._open(cipher, sealed, first, complete, room)
            return
        plain = memoryview(bytearray(there))
        self._open(cipher, sealed, first, complete, plain)
        room[:] = plain[skip : skip + room.nbytes]

    def list(self, prefix: str) -> Iterator[Entry]:
        for entry in self._inner.list(prefix):
            if not entry.key.startswith(KEYS_PREFIX):
                yield Entry(entry.key, _plain_size(max(0, entry.size - HEADER.size)))

    def delete(self, key: str) -> None:
        _check_free(key)
        self._inner.delete(key)

    def _fetch(self, key: str, start: int, size: int | None) -> tuple[memoryview, int, bool, _Cipher]:
        """The sealed segments that hold [start, start + size): (segments, number of the first, whether they go to the
        object's end, its cipher). One request when the range begins in the first segment, else two."""
        first = start // SEGMENT_BYTES
        if size is None:
            span = None
        else:
            segments = -(-(start + size) // SEGMENT_BYTES) - first if size else 1
            span = max(1, segments) * _SEALED_SEGMENT + 1  # one more byte tells whether the object goes on
        if first == 0:
            blob = self._inner.get(key, size=None if span is None else HEADER.size + span)
            head, body = blob[: HEADER.size], memoryview(blob)[HEADER.size :]
        else:
            head = self._inner.get(key, size=HEADER.size)
            body = memoryview(self._inner.get(key, start=HEADER.size + first * _SEALED_SEGMENT, size=span))
        complete = span is None or body.nbytes < span
        return (body if complete or span is None else body[: span - 1]), first, complete, self._cipher(key, head)

    def _cipher(self, key: str, head: bytes) -> _Cipher:
        if len(head) < HEADER.size or head[:4] != MAGIC:
            newer = "is of a newer format (then use a newer ray_dr)" if head[:3] == MAGIC[:3] else "is not encrypted"
            raise BrokenSeal(f"the object {newer}, or its beginning was changed", key=key)
        _, number, salt = HEADER.unpack(head)
        if number not in self._keys:
            raise BrokenSeal(f"the object was sealed with data key {number}, which the store does not have", key=key)
        return _Cipher(self._keys[number], salt, key)

    def _open(self, cipher: _Cipher, sealed: memoryview, first: int, complete: bool, into: memoryview) -> None:
        count = -(-sealed.nbytes // _SEALED_SEGMENT)
        if (count or not first) and sealed.nbytes - max(0, count - 1) * _SEALED_SEGMENT < TAG_BYTES:
            raise BrokenSeal("the object is cut off", key=cipher.name)
        for index in range(count):
            piece = sealed[index * _SEALED_SEGMENT : (index + 1) * _SEALED_SEGMENT]
            at = index * SEGMENT_BYTES
            cipher.open(first + index, complete and index == count - 1, piece, into[at : at + piece.nbytes - TAG_BYTES])

    def _buffer(self, size: int) -> memoryview:
        """This thread's room for sealed bytes, reused: fresh memory costs more than the encryption. It begins a page, so
        that a disk takes it without a copy."""
        room: mmap.mmap | None = getattr(self._room, "bytes", None)
        if room is None or len(room) < size:
            room = self._room.bytes = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return memoryview(room)[:size]


def _check_free(key: str) -> None:
    if key.startswith(KEYS_PREFIX):
        raise StoreError(f"names below {KEYS_PREFIX} are the encryption's own", key=key)


def _segments(plain: int) -> int:
    return max(1, -(-plain // SEGMENT_BYTES))


def _sealed_size(plain: int) -> int:
    return HEADER.size + plain + _segments(plain) * TAG_BYTES


def _plain_size(sealed: int) -> int:
    """Bytes of plaintext in so many bytes of segments."""
    return max(0, sealed - -(-sealed // _SEALED_SEGMENT) * TAG_BYTES)


__all__ = ["BrokenSeal", "SealedStore", "WrongKey"]
