"""A worker's line to the node agent beside it: what it did, what it staged; and back, which slots are free.

Everything a worker says goes through here in order, so the supervisor never hears of an end before the steps and saves that
led to it. A save that is copied while training goes on may come after the step behind it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray_dr.checkpoint.described import describe
from ray_dr.checkpoint.memory import attach
from ray_dr.checkpoint.sealing import Same
from ray_dr.errors import ConfigError, StoreError
from ray_dr.model import codec
from ray_dr.model.attempt import Assignment
from ray_dr.model.checkpoint import Part, StepRecord, VersionId
from ray_dr.model.events import Event
from ray_dr.model.journal import Record
from ray_dr.stores.wire import connect
from ray_dr.train.beacon import Beacon
from ray_dr.train.pools import Pools
from ray_dr.train.staging import pin

ANSWER_S = 30.0
"""An agent that is asked for memory may have to get it from the system first: 0.3 s per gigabyte."""


class Link:
    """Thread-safe. One per worker process; its closing is how the agent knows at once that the process is gone.

    pools   the agent's memory as far as it is mapped to restore from, beside what is staged into
    """

    def __init__(self, agent: str, token: bytes, worker: str, pid: int) -> None:
        self._connection = connect(agent, token)
        self.pools = Pools()
        self._changed = threading.Condition()
        self._slots: list[memoryview] = []
        self._whole = memoryview(b"")
        self._free: set[int] = set()
        self._path = ""
        self._asked, self._answered = -1, False
        self._asks = 0
        self._taken: dict[int, str] = {}
        self._refused: ConfigError | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._questions = 0
        self._gone = False
        self.beacon = Beacon()
        self._connection.send({"op": "worker", "worker": worker, "pid": pid, "beacon": self.beacon.path})
        threading.Thread(target=self._listen, name="link", daemon=True).start()

    def open_pool(self, size: int) -> None:
        """Ask for slots of at least `size` bytes; they come when the agent has touched every page of them."""
        with self._changed:
            self._asked, self._answered, self._refused = size, False, None
            self._free.clear()
            self._asks += 1
            ask = self._asks
        self._connection.send({"op": "pool", "size": size, "ask": ask})

    def asked_for(self, size: int) -> bool:
        """Whether this attempt has asked for slots of at least so many bytes."""
        return self._asked >= size

    def full(self) -> bool:
        """Whether the slots are there and none of them is free."""
        with self._changed:
            return self._answered and not self._free

    def reset(self) -> None:
        """A new attempt: slots must be asked for again, in the size of its plan."""
        self.pools.drop()
        with self._changed:
            self._asked, self._answered = -1, False
            self._free.clear()

    def take_slot(self, size: int, wait_s: float) -> tuple[int, memoryview] | None:
        """A free slot of at least `size` bytes, or None when there is none within `wait_s` seconds. Raises ConfigError when
        the node has no memory for slots of that size."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while self._refused is None and not (self._answered and self._free and self._slots and len(self._slots[0]) >= size):
                if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    return None
            if self._refused is not None:
                raise self._refused
            index = min(self._free)
            self._free.discard(index)
            self._taken[index] = self._path
            return index, self._slots[index]

    def map_ahead(self, a: Assignment, token: bytes) -> threading.Thread:
        """Map what the attempt will restore from of this node's memory, in the thread that is given."""
        return self.pools.ahead(a, token, own=self._path)

    def mapped(self, path: str, size: int) -> memoryview | None:
        """The first `size` bytes of the pool at `path`, if this process has mapped it to stage into."""
        with self._changed:
            return self._whole[:size] if path == self._path and size <= len(self._whole) else None

    def give_back(self, slot: int) -> None:
        """A slot that was taken and comes to nothing."""
        with self._changed:
            self._free.add(slot)
            self._changed.notify_all()

    def want_slot(self, skipped: VersionId | None) -> None:
        """A save was due and there was no slot for it: the agent may have one to spare. `skipped`: the version that this rank
        therefore will not save, and that can't become whole; None while it still waits."""
        self._connection.send({"op": "want", "skipped": codec.to_json(skipped)})

    def borrow(self, size: int) -> tuple[str, memoryview]:
        """Memory of the agent beside the slots, to be handed over once: its path there, and a mapping of it. Raises ConfigError
        when the node has none, StoreError when the agent is gone."""
        answer = self._ask({"op": "lend", "size": size})
        if "what" in answer:
            raise ConfigError(answer["what"], key=answer["key"], remedy=answer["remedy"])
        return answer["path"], attach(answer["path"], max(size, 1))[:size]

    def agree(self) -> None:
        """Until the agent has taken in all that was said so far. Raises StoreError when it is gone."""
        self._ask({"op": "agree"})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with self._changed:
            self._questions += 1
            number = self._questions
        self._connection.send({**question, "question": number})
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._answers or self._gone, ANSWER_S) or self._gone:
                raise StoreError("the node's agent does not answer", retryable=True)
            return self._answers.pop(number)

    def staged(self, slot: int, part: Part, *, staged_at: float, stall_s: float, copy_to: Sequence[str],
               to: Mapping[str, tuple[str, int]], forced: bool = False, same: Same = None,
               borrowed: str = "") -> None:  # fmt: skip
        """Hand a filled slot over to the agent: for copies at the agents `copy_to`, and for durable places, with the job's
        name and term there. `forced`: the job waits for it; `same`: what it has in common with the one handed over before;
        `borrowed`: the path of what was borrowed for it instead of a slot."""
        self._connection.send({
            "op": "staged", "slot": slot, "path": borrowed or self._taken.get(slot, ""), "part": describe(part),
            "staged_at": staged_at, "stall_s": stall_s, "copy_to": list(copy_to), "to": dict(to), "forced": forced,
            "same": codec.to_json(same),
        })  # fmt: skip

    def step(self, record: StepRecord, at: float) -> None:
        """One step is done."""
        self._connection.send({"op": "step", "record": codec.to_json(record), "at": at})

    def record(self, record: Record) -> None:
        """A record for the journal."""
        self._connection.send({"op": "record", "record": codec.to_json(record, tagged=True)})

    def heal(self, rank: int, damages: list[dict[str, Any]]) -> None:
        """Copies that this rank found damaged, as `checkpoint.healing` tells of them."""
        self._connection.send({"op": "heal", "rank": rank, "damages": damages})

    def event(self, event: Event) -> None:
        """An event for the job's machine."""
        self._connection.send({"op": "event", "event": codec.to_json(event, tagged=True)})

    def close(self) -> None:
        """The process is through with its agent."""
        self.beacon.close()
        self.pools.drop()
        self._connection.close()

    def _listen(self) -> None:
        try:
            while True:
                header, _ = self._connection.receive()
                self._take(header)
        except StoreError:
            with self._changed:  # the agent is gone: the supervisor learns it from its own connection
                self._gone = True
                self._changed.notify_all()

    def _take(self, header: dict[str, Any]) -> None:
        with self._changed:
            if header["op"] in ("pool", "no pool") and header["ask"] != self._asks:
                return  # the answer to an older question
            if header["op"] == "pool":
                # Slots that came free after the agent had drawn up its answer are news that may arrive before it. None
                # can have been taken meanwhile: before the answer no slot is handed out.
                early = self._free if header["path"] == self._path else set()
                self._map(header)
                self._free = early | set(header["free"])
                self._answered = True
            elif header["op"] == "no pool":
                self._refused = ConfigError(header["what"], key=header["key"], remedy=header["remedy"])
            elif header["op"] == "answer":
                self._answers[header["question"]] = header
            elif header["op"] == "free" and header["path"] == self._path:
                self._free.add(header["slot"])
            self._changed.notify_all()

    def _map(self, header: dict[str, Any]) -> None:
        if header["path"] == self._path:
            return
        size, count = header["size"], header["slots"]
        whole = attach(header["path"], size * count)
        self._path = header["path"]
        self._whole = whole
        self._slots = [whole[i * size : (i + 1) * size] for i in range(count)]
        pin(whole)
