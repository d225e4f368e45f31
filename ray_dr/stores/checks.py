"""What every store must do, whatever is behind it: one definition for `ray-dr store check`, the probe, and the tests.

A check is a function of a store and of a folder of its own in it. It returns what it saw, in words, and raises
BrokenPromise when the store does other than the interface says, or whatever StoreError the store itself raises. What
rests on it says how bad that is:

    commits    a job's commit log: two supervisors could both believe to own the job
    data       what is saved and restored: checkpoints could be found damaged, or not found
    listings   what lists objects: pruning may leave garbage, `status` may be late; nothing is ever lost by that
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ray_dr.errors import AlreadyExists, BrokenPromise, NotFound, ObjectTooShort, StoreError
from ray_dr.stores.base import KEY_MAX_CHARS, Buffer, Entry, Store, Traits

Rests = Literal["commits", "data", "listings"]

RACERS = 8
RACES = 3
REMOVERS = 8
NO_PARTS_BYTES = 2**20
"""The size around which a store is tried that never sends parts."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise. `weaker` says in words what is left when it does not hold."""

    name: str
    rests: Rests
    weaker: str
    run: Callable[[Store, str], str]


def reads_back(store: Store, at: str) -> str:
    """Empty, one byte, small and around a mebibyte; twice, as the second read may come from elsewhere."""
    sizes = (0, 1, 1000, NO_PARTS_BYTES - 1, NO_PARTS_BYTES, NO_PARTS_BYTES + 1)
    for size in sizes:
        data = noise(size)
        store.put(f"{at}/{size}", data)
        for _ in range(2):
            expect(store.get(f"{at}/{size}") == data, f"{size} bytes came back different")
    return f"sizes 0 to {sizes[-1]:,}"


def reads_back_in_parts(store: Store, at: str) -> str:
    """Around the size from which a put goes up in parts; the last part may be one byte; also over an object before."""
    border = store.traits.parts_from_bytes
    if not border:
        return "a put is always in one piece"
    data = noise(border + 1)
    for size in (border - 1, border, border + 1):
        store.put(f"{at}/parts", memoryview(data)[:size])
        expect(store.get(f"{at}/parts") == data[:size], f"{size} bytes came back different")
    middle = border // 2
    piece = store.get(f"{at}/parts", start=middle - 10, size=20)
    expect(piece == data[middle - 10 : middle + 10], "a range over the border of two parts came back different")
    store.put(f"{at}/whole", data, if_absent=True)
    expect(store.get(f"{at}/whole") == data, f"{len(data)} bytes put if absent came back different")
    return f"sizes {border:,} - 1, {border:,}, {border:,} + 1"


def replaces(store: Store, at: str) -> str:
    """A read after an overwrite gives the new object, also a shorter one."""
    for data in (b"the first, and longest", b"second", b"", b"fourth"):
        store.put(f"{at}/object", data)
        expect(store.get(f"{at}/object") == data, "an older version was read after an overwrite")
    return "4 versions"


def replaces_whole(store: Store, at: str) -> str:
    """Who reads while another replaces sees one value or the other."""
    values = [bytes([number]) * 200_000 for number in range(6)]
    store.put(f"{at}/object", values[0])

    def write() -> None:
        for value in values[1:]:
            store.put(f"{at}/object", value)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        reads = 0
        while not writing.done():
            expect(store.get(f"{at}/object") in values, "a torn object was read while it was replaced")
            reads += 1
        writing.result()
    expect(store.get(f"{at}/object") == values[-1], "an older version was read after an overwrite")
    return f"{reads} reads beside 5 writes"


def reads_ranges(store: Store, at: str) -> str:
    """Ranges as slices have them: clipped at the end, empty behind it."""
    data = noise(100)
    store.put(f"{at}/object", data)
    ranges = ((0, 10), (10, 5), (90, 10), (95, 50), (0, 0), (99, 1), (100, 5), (40, None), (100, None))
    for start, size in ranges:
        wanted = data[start : None if size is None else start + size]
        expect(store.get(f"{at}/object", start=start, size=size) == wanted, f"range {start}, {size} came back different")
    return f"{len(ranges)} ranges"


def reads_into_memory(store: Store, at: str) -> str:
    """Straight into the caller's memory, and not a byte beside it."""
    data = noise(1_000_000)
    store.put(f"{at}/object", data)
    room = bytearray(len(data))
    store.readinto(f"{at}/object", memoryview(room))
    expect(room == data, "a whole object came back different")
    store.readinto(f"{at}/object", memoryview(bytearray()))
    piece = bytearray(b"." * 1000)
    store.readinto(f"{at}/object", memoryview(piece)[100:900], start=300)
    expect(piece == b"." * 100 + data[300:1100] + b"." * 100, "a range came back different, or beside its place")
    return "whole and a range"


def says_too_short(store: Store, at: str) -> str:
    """An object that ends before what is asked for is an error, never a short read."""
    store.put(f"{at}/object", b"0123456789")
    for start in (0, 5, 10, 11):
        try:
            store.readinto(f"{at}/object", memoryview(bytearray(11)), start=start)
        except ObjectTooShort:
            continue
        raise BrokenPromise(f"11 bytes at {start} were read from an object of 10")
    return "ObjectTooShort"


def says_missing(store: Store, at: str) -> str:
    """Reading what is not there is NotFound, however little is asked for."""
    name = f"{at}/none"
    reads: tuple[Callable[[], object], ...] = (
        lambda: store.get(name),
        lambda: store.get(name, size=0),
        lambda: store.get(name, start=3, size=4),
        lambda: store.readinto(name, memoryview(bytearray(4))),
        lambda: store.readinto(name, memoryview(bytearray())),
    )
    for read in reads:
        expect(_is_missing(read), "an object that was never put was read")
    return "NotFound"


def seen_at_once(store: Store, at: str) -> str:
    """An object is there for the next read, also where its absence was read just before: so grows a commit log."""
    for number in range(10):
        name = f"{at}/{number}"
        expect(_is_missing(partial(store.get, name)), "an object that was never put was read")
        store.put(name, b"now", if_absent=number % 2 == 1)
        expect(not _is_missing(partial(store.get, name)), "an object was missing just after its put")
    return "10 puts, each read before and after"


def refuses_a_second(store: Store, at: str) -> str:
    """Put-if-absent on a taken name fails and leaves what is there; an empty object takes its name as well."""
    for number, data in enumerate((b"first", b"")):
        name = f"{at}/{number}"
        store.put(name, data, if_absent=True)
        try:
            store.put(name, b"second", if_absent=True)
        except AlreadyExists:
            expect(store.get(name) == data, "a refused put-if-absent changed the object")
            continue
        raise BrokenPromise("put-if-absent (If-None-Match: *) overwrites what is there")
    return "the second writer is refused"


def one_wins_a_race(store: Store, at: str) -> str:
    """Of several that put the same name if absent at the same moment, one wins, and its bytes are there."""
    for number in range(RACES):
        winners = race(store, f"{at}/{number}")
        if len(winners) != 1:
            told = f"put-if-absent (If-None-Match: *) lets {len(winners)} of {RACERS} racing writers win"
            raise BrokenPromise(f"{told}; is the bucket versioned?" if winners else told)
        expect(store.get(f"{at}/{number}") == _racer(winners[0]), "the object is not the winner's")
    return f"{RACERS} writers at once, {RACES} times"


def lists_in_order(store: Store, at: str) -> str:
    """By prefix, in ascending order of key, each once, with sizes; over pages as well."""
    log = [f"{at}/jobs/a/log/{number:03d}" for number in range(20)]
    keys = [*log, *(f"{at}/{name}" for name in ("jobs/A/x", "jobs/a-b/x", "jobs/a.b/x", "jobs/a=b/x", "jobs/a_b/x", "other"))]
    for key in keys:
        store.put(key, key.encode() * 2)
    prefixes = ("", "jobs/", "jobs/a", "jobs/a/", "jobs/a/log/01", "jobs/a/log/019", "o", "none/", "jobs/a/log/019/")
    for prefix in prefixes:
        wanted = [Entry(key, 2 * len(key)) for key in sorted(keys) if key.startswith(f"{at}/{prefix}")]
        found = list(store.list(f"{at}/{prefix}"))
        expect(found == wanted, f"the listing of {prefix!r} has {len(found)} objects of {len(wanted)}, or other ones")
    return f"{len(keys)} objects below {len(prefixes)} prefixes"


def lists_at_once(store: Store, at: str) -> str:
    """A listing shows what was put before it with its newest size, and nothing that was deleted before it."""
    keys = [f"{at}/{number}" for number in range(5)]
    for count, key in enumerate(keys, 1):
        store.put(key, b"x")
        expect(_names(store, at) == keys[:count], "a listing lacks an object that was put before it")
    store.put(keys[0], b"longer")
    expect(next(store.list(keys[0])).size == 6, "a listing shows the size from before an overwrite")
    for count, key in enumerate(keys, 1):
        store.delete(key)
        expect(_names(store, at) == keys[count:], "a listing still shows an object that was deleted before it")
    return f"after each of {len(keys)} puts and deletes"


def deletes(store: Store, at: str) -> str:
    """What is deleted is gone at once, its name is free; deleting what is not there is nothing."""
    name = f"{at}/below/object"
    store.put(name, b"x")
    for each in (name, name, f"{at}/never/was"):
        store.delete(each)
    expect(_is_missing(lambda: store.get(name)), "a deleted object was read")
    store.put(name, b"y", if_absent=True)
    expect(store.get(name) == b"y", "an object put after a delete came back different")
    return "gone at once, its name free"


def takes_odd_names(store: Store, at: str) -> str:
    """All characters that names may have; case counts; a long name; neighbours that differ in a sign."""
    long = "/".join("x" * 100 for _ in range(KEY_MAX_CHARS // 101 + 1))[: KEY_MAX_CHARS - len(at) - 1].rstrip("/")
    names = ("a.b", "a_b", "a=b", "a-b", "ab.", "A.B", "a.-_=", "0", "Zz/9=.-_", long)
    for name in names:
        store.put(f"{at}/{name}", name.encode())
    for name in names:
        told = "a long name" if name == long else f"the name {name!r}"
        expect(store.get(f"{at}/{name}") == name.encode(), f"{told} holds another object's bytes")
    return f"{len(names)} names, up to {len(at) + 1 + len(long)} characters"


def serves_many(store: Store, at: str) -> str:
    """Many callers at once, each with objects of its own, do not see each other's bytes."""

    def work(number: int) -> None:
        data = noise(50_000, seed=number)
        room = bytearray(len(data))
        store.put(f"{at}/{number}", data)
        store.readinto(f"{at}/{number}", memoryview(room))
        expect(room == data and store.get(f"{at}/{number}") == data, "bytes were mixed up between callers")

    with ThreadPoolExecutor(RACERS) as pool:
        list(pool.map(work, range(2 * RACERS)))
    return f"{2 * RACERS} objects by {RACERS} callers"


_ONE_WRITER = (
    "commits are only safe while a single supervisor runs the job: two at once could both believe to own it, and "
    "overwrite each other's checkpoints; never run a job from two clusters"
)
_DAMAGE = "what is saved here may not be what is read: every chunk's hash is checked, so damage is found, not prevented"
_LATE = "what lists objects may be late: a prune can leave garbage until the next one"
_LOG_LATE = "a supervisor may overlook the newest commit and start from an older checkpoint"

PUT_IF_ABSENT = (
    Check("put-if-absent refuses the second", "commits", _ONE_WRITER, refuses_a_second),
    Check("put-if-absent has one winner", "commits", _ONE_WRITER, one_wins_a_race),
)
CHECKS = (
    Check("reads back what was put", "data", _DAMAGE, reads_back),
    Check("reads back what went up in parts", "data", _DAMAGE, reads_back_in_parts),
    *PUT_IF_ABSENT,
    Check("a put is seen at once", "commits", _LOG_LATE, seen_at_once),
    Check("a put replaces", "commits", _LOG_LATE, replaces),
    Check("a replacement shows whole", "commits", "a reader may see half an object", replaces_whole),
    Check("missing is said", "commits", "the end of a commit log cannot be told", says_missing),
    Check("too short is said", "data", _DAMAGE, says_too_short),
    Check("ranges", "data", "restoring onto another number of workers may fail", reads_ranges),
    Check("reads into memory", "data", _DAMAGE, reads_into_memory),
    Check("callers at once", "data", _DAMAGE, serves_many),
    Check("deletes", "commits", "pruned checkpoints may come back", deletes),
    Check("odd names", "data", "objects may hide each other", takes_odd_names),
    Check("lists in order", "listings", _LATE, lists_in_order),
    Check("lists at once", "listings", _LATE, lists_at_once),
)


def noise(size: int, *, seed: int = 0) -> bytes:
    """Bytes without a period, so that no two pieces of them can be taken for each other."""
    return random.Random(seed).randbytes(size)


def expect(holds: bool, otherwise: str) -> None:
    """Raises BrokenPromise, saying `otherwise`."""
    if not holds:
        raise BrokenPromise(otherwise)


def race(store: Store, key: str) -> list[int]:
    """The numbers of those of RACERS writers who believe that their put-if-absent of `key` took the name."""
    together = threading.Barrier(RACERS)

    def put(number: int) -> bool:
        together.wait()
        try:
            store.put(key, _racer(number), if_absent=True)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        return [number for number, won in enumerate(pool.map(put, range(RACERS))) if won]


@contextmanager
def own_folder(
    store: Store, name: str, *, left: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Store, str]]:
    """The store, and the folder `name` in it, which is removed on leaving: after an error and on Ctrl-C, too.

    What was put is remembered, so that it is removed also from a store whose listings are late. `left` is told the name
    of each object that the store does not let go.
    """
    remembering = _Remembering(store)
    try:
        yield remembering, name
    finally:
        keys = set(remembering.keys)
        with suppress(StoreError):  # what was found before is the news, not that it can't be cleaned up
            keys |= {entry.key for entry in store.list(f"{name}/")}
        with ThreadPoolExecutor(REMOVERS) as pool:
            for key, gone in zip(sorted(keys), pool.map(lambda key: _remove(store, key), sorted(keys)), strict=True):
                if not gone:
                    left(key)


class _Remembering:
    """`inner`, with the names of what was put."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.keys: set[str] = set()

    @property
    def traits(self) -> Traits:
        return self._inner.traits

    @property
    def url(self) -> str:
        return self._inner.url

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        self.keys.add(key)
        self._inner.put(key, data, if_absent=if_absent)

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        return self._inner.get(key, start=start, size=size)

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        self._inner.readinto(key, into, start=start)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        self._inner.delete(key)


def _remove(store: Store, key: str) -> bool:
    try:
        store.delete(key)
    except StoreError:
        return False
    return True


def _is_missing(read: Callable[[], object]) -> bool:
    try:
        read()
    except NotFound:
        return True
    return False


def _names(store: Store, at: str) -> list[str]:
    return [entry.key for entry in store.list(f"{at}/")]


def _racer(number: int) -> bytes:
    return f"racer {number}".encode()
