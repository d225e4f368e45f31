"""The journal: all that happened to a job, appended in segments beside its checkpoints.

    jobs/<job>/journal/<term:06d>-<segment:08d>.jsonl        one JSON record per line

Appending never waits for the store: records are encoded into a buffer and a thread of the journal's own writes them,
at most every INTERVAL_S. A segment is put if absent, with the same bytes until its fate is known: a put whose answer
was lost is recognised and nothing is written twice. While the store is away the buffer grows up to its capacity: what
describes (notes, saved parts) is refused at half of it, what proves (steps) when it is full, and decisions at twice
that; the journal says that it does.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray_dr.errors import AlreadyExists, NotFound, StoreError
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.events import Opened
from ray_dr.model.journal import Decided, JobOpened, Noted, PartSaved, Record, Stepped
from ray_dr.model.recovery import Rollback
from ray_dr.stores.base import Store

INTERVAL_S = 0.5
SEGMENT_BYTES = 256 * 2**10
CAPACITY_BYTES = 64 * 2**20
BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 5.0
READERS = 16
ATTEMPTS, ROLLBACKS = "attempts", "rollbacks"
"""In a note of the supervisor: the highest attempt of the job so far."""

_SEGMENT = re.compile(r"/journal/(\d{6,})-(\d{8,})\.jsonl$")


def prefix_of(job: str) -> str:
    """Where a job's segments lie."""
    return f"jobs/{job}/journal/"


def segment_key(job: str, term: int, segment: int) -> str:
    """The name of one segment; segments of a term count from 0."""
    return f"{prefix_of(job)}{term:06d}-{segment:08d}.jsonl"


class Journal:
    """Appends to one job's journal, for one supervisor. Thread-safe.

    clock       UTC seconds, for the journal's own notes
    monotonic   seconds, for lags and waits
    """

    def __init__(
        self,
        store: Store,
        job: str,
        term: int,
        clock: Callable[[], float],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        capacity_bytes: int = CAPACITY_BYTES,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._store, self._job, self._term = store, job, term
        self._clock, self._monotonic = clock, monotonic
        self._capacity_bytes, self._interval_s = capacity_bytes, interval_s
        self._changed = threading.Condition()
        self._lines: deque[tuple[bytes, float]] = deque()  # encoded record, when it was appended
        self._buffered_bytes = 0
        self._appended = 0
        self._written = 0
        self._wanted = 0  # somebody waits until this many records are written
        self._refused = 0
        self._failing = False
        self._closing = False
        self._next: int | None = None
        self._thread = threading.Thread(target=self._run, name=f"journal-{job}-{term}", daemon=True)
        self._thread.start()

    @property
    def lag_s(self) -> float:
        """Age of the oldest record that is not in the store; 0 when all are."""
        with self._changed:
            return max(0.0, self._monotonic() - self._lines[0][1]) if self._lines else 0.0

    def append(self, record: Record) -> None:
        """Take a record. Returns at once; a record beyond the capacity of its kind is refused and counted."""
        line = _encode(record)
        with self._changed:
            if self._buffered_bytes + len(line) > self._capacity_bytes * _share(record):
                self._refuse()
                return
            self._push(line)

    def flush(self, timeout_s: float) -> bool:
        """Whether all that was appended so far is in the store, waiting for it up to `timeout_s` seconds."""
        with self._changed:
            target = self._wanted = self._appended
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._written >= target, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Write what is left, waiting up to `timeout_s`, and end the thread. Whether all is in the store."""
        complete = self.flush(timeout_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return complete

    # The rest runs with the condition held, except where the store is called.

    def _push(self, line: bytes) -> None:
        self._lines.append((line, self._monotonic()))
        self._buffered_bytes += len(line)
        self._appended += 1
        if self._buffered_bytes >= SEGMENT_BYTES or len(self._lines) == 1:
            self._changed.notify_all()

    def _refuse(self) -> None:
        self._refused += 1
        if self._refused == 1:
            self._note("journal.lagging", refusing=True, buffered_bytes=self._buffered_bytes)

    def _note(self, name: str, **fields: object) -> None:
        self._push(_encode(Noted(self._clock(), name, fields)))

    def _run(self) -> None:
        while (data := self._await_work()) is not None:
            lines, segment = data
            if self._write_until_stored(segment):
                self._settle(lines, len(segment))

    def _await_work(self) -> tuple[int, bytes] | None:
        """The next segment to write and its number of lines; None when the journal is closed."""
        with self._changed:
            while not self._closing and not self._lines:
                self._changed.wait()
            self._changed.wait_for(self._hurry, self._interval_s)
            if self._closing and (self._failing or not self._lines):
                return None
            return self._cut()

    def _hurry(self) -> bool:
        return self._closing or self._wanted > self._written or self._buffered_bytes >= SEGMENT_BYTES

    def _cut(self) -> tuple[int, bytes]:
        lines, size = [], 0
        for line, _ in self._lines:
            lines.append(line)
            size += len(line)
            if size >= SEGMENT_BYTES:
                break
        return len(lines), b"".join(lines)

    def _write_until_stored(self, segment: bytes) -> bool:
        """Put a segment, trying again with growing pauses. False when the journal is closed before it succeeds."""
        pause_s = BACKOFF_FIRST_S
        while True:
            try:
                self._put(segment)
                return True
            except StoreError as error:
                with self._changed:
                    if not self._failing:
                        self._failing = True
                        self._note("journal.lagging", error=str(error))
                    self._changed.wait_for(lambda: self._closing, pause_s)
                    if self._closing:
                        return False
                pause_s = min(2 * pause_s, BACKOFF_MOST_S)

    def _put(self, segment: bytes) -> None:
        if self._next is None:
            taken = [number for term, number, _ in _segments(self._store, self._job) if term == self._term]
            self._next = max(taken, default=-1) + 1
        while True:
            key = segment_key(self._job, self._term, self._next)
            try:
                self._store.put(key, segment, if_absent=True)
                return
            except AlreadyExists:
                # Ours, if an earlier try arrived and only its answer was lost; else somebody else's, and ours is next.
                if self._store.get(key) == segment:
                    return
                self._next += 1

    def _settle(self, lines: int, size: int) -> None:
        with self._changed:
            assert self._next is not None
            self._next += 1
            for _ in range(lines):
                self._lines.popleft()
            self._buffered_bytes -= size
            self._written += lines
            recovered = self._failing or self._refused
            if recovered and self._buffered_bytes < self._capacity_bytes / 4:
                refused, self._refused, self._failing = self._refused, 0, False
                self._note("journal.caught_up", refused=refused)
            self._changed.notify_all()


class Reader:
    """Follows a job's journal: each call gives what has come since the last."""

    def __init__(self, store: Store, job: str) -> None:
        self._store, self._job = store, job
        self._seen: set[tuple[int, int]] = set()

    def more(self) -> tuple[Record, ...]:
        """Records of segments not read before, in order of (term, segment). Raises ValueError for a damaged line."""
        records: list[Record] = []
        for term, number, key in _segments(self._store, self._job):
            if (term, number) not in self._seen:
                records.extend(_records(self._store, key))
                self._seen.add((term, number))
        return tuple(records)


def read_journal(store: Store, job: str) -> Iterator[Record]:
    """A job's records in order of (term, segment); none for an unknown job.

    It may end anywhere: what was not yet written is simply not there. Raises ValueError, naming the object, for a
    damaged line and for a segment that is missing between two others.
    """
    before: tuple[int, int] | None = None
    for term, number, key in _segments(store, job):
        if before and term == before[0] and number != before[1] + 1:
            raise ValueError(f"{segment_key(job, term, before[1] + 1)}: the journal's segment is missing")
        yield from _records(store, key)
        before = term, number


def last_known(store: Store, job: str) -> tuple[int, tuple[Rollback, ...]]:
    """The highest attempt any record knows of, and what is known to be of no use any more. Reads the journal from its end to the
    newest record that knows all before it: a decision, or, where none was taken for long, a note with ATTEMPTS. Raises
    StoreError, and ValueError for a damaged line."""
    highest, rollbacks, keys = 0, tuple[Rollback, ...](), [key for _, _, key in reversed(_segments(store, job))]
    with ThreadPoolExecutor(READERS, thread_name_prefix="journal") as pool:
        at, size = 0, 1
        while at < len(keys):
            for records in pool.map(lambda key: tuple(_records(store, key)), keys[at : at + size]):
                highest = max(highest, *map(_attempt, records), 0)
                rollbacks = max(rollbacks, *map(_rollbacks, records), key=len)
                if any(map(_knows_all, records)):
                    return highest, rollbacks
            at, size = at + size, min(2 * size, READERS)
    return highest, rollbacks


def _knows_all(record: Record) -> bool:
    """Whether no record before this one knows of a higher attempt: attempts only grow, and it was told all."""
    if isinstance(record, Noted):
        return bool(record.fields.get(ATTEMPTS))
    return isinstance(record, Decided) and record.state.attempt > 0


def read_tail(
    store: Store, job: str, *, before: int, begins: Callable[[Record], bool], most: int
) -> tuple[Record, ...]:
    """The end of a job's journal, in order: from the newest record that `begins` says is a beginning.

    before   only terms below this one are read
    most     segments that are read at most; without a beginning among them the oldest of them is one
    Raises StoreError, and ValueError for a damaged line.
    """
    found: list[Record] = []
    for _, _, key in [segment for segment in reversed(_segments(store, job)) if segment[0] < before][:most]:
        records = list(_records(store, key))
        first = next((at for at in reversed(range(len(records))) if begins(records[at])), None)
        found[:0] = records[first or 0 :]
        if first is not None:
            break
    return tuple(found)


def _rollbacks(record: Record) -> tuple[Rollback, ...]:
    """They only become more."""
    match record:
        case Decided(state=state):
            return state.rollbacks
        case Noted(fields={"rollbacks": told}):
            known: tuple[Rollback, ...] = from_json(tuple[Rollback, ...], told)
            return known
        case _:
            return ()


def _attempt(record: Record) -> int:
    match record:
        case Decided(event=Opened(attempt=attempt), state=state):
            return max(attempt, state.attempt)
        case Decided(state=state):
            return state.attempt
        case Stepped(record=stepped):
            return stepped.attempt
        case Noted(fields={"attempts": int(attempts)}):
            return attempts
        case _:
            return int(getattr(record, "attempt", 0))


def _share(record: Record) -> float:
    """How much of the capacity may be in use for a record to be taken."""
    if isinstance(record, (Noted, PartSaved)):
        return 0.5
    return 2.0 if isinstance(record, (Decided, JobOpened)) else 1.0


def _encode(record: Record) -> bytes:
    return json.dumps(to_json(record, tagged=True), separators=(",", ":"), default=str).encode() + b"\n"


def _segments(store: Store, job: str) -> list[tuple[int, int, str]]:
    """(term, segment, key) of a job's segments, in order."""
    found = ((_SEGMENT.search(entry.key), entry.key) for entry in store.list(prefix_of(job)))
    return sorted((int(name[1]), int(name[2]), key) for name, key in found if name)


def _records(store: Store, key: str) -> Iterator[Record]:
    try:
        data = store.get(key)
    except NotFound as error:
        raise ValueError(f"{key}: the journal's segment vanished while it was read") from error
    for number, line in enumerate(data.splitlines(), 1):
        yield _decode(line, key, number)


def _decode(line: bytes, key: str, number: int) -> Record:
    try:
        value: Any = json.loads(line)
        record: Record = from_json(Record, value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{key}: line {number} is damaged: {error}") from error
    if not isinstance(record, Record):
        raise ValueError(f"{key}: line {number} is damaged: no record")
    return record
