"""How long each part of getting over a failure takes in this job, learned from its journal: what the recovery ladder predicts by.

Every record of a life goes in, in order; out come medians of the newest SEEN_MOST of each part, those of lives before where
this one has seen none (`MEASURED` notes tell of them), and the defaults where nobody has. A part that a pause was in (a job that
waited for nodes, a group that was held back) is not one of these: only what was asked for and answered is timed.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from ray_dr.model.actions import FormGroup, RequestNodes, StartWorkers, TakeInventory
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.events import FirstStep, InventoryTaken, NodeJoined, WorkerLost, WorkerReady
from ray_dr.model.journal import Decided, JobOpened, Marked, Noted, Record, Restored
from ray_dr.model.ladder import UNMEASURED, Measured
from ray_dr.model.recovery import Recovering, Resizing, Starting

MEASURED = "phases.measured"
"""The note by which a later life, and a replay, know what was predicted with."""
SEEN_MOST = 32
CHANGED, CHANGED_S, STEP_CHANGED = 0.2, 0.02, 0.5
"""A median that moves by less than this share, or by less than CHANGED_S, is no news; nor a step's that moves by less than
STEP_CHANGED, as it is another number all the time."""


@dataclass(slots=True)
class Phases:
    """The fold. `step_s`, where it is known, is told by whoever times steps."""

    before: Measured = UNMEASURED
    step_s: float = 0.0
    _seen: dict[str, deque[float]] = field(default_factory=dict)
    _asked: dict[str, deque[float]] = field(default_factory=dict)
    _nodes_at: float | None = None
    _looked: tuple[int, float] = (0, 0.0)
    _began_at: float | None = None
    _unwinding: tuple[int, float] | None = None
    _stopped_at: float | None = None
    _formed: tuple[int, float] = (0, 0.0)
    _joined_s: float = 0.0
    _restored_s: float = 0.0

    def add(self, record: Record) -> None:
        """One more record."""
        match record:
            case JobOpened():
                self._asked.clear()
                self._nodes_at = self._unwinding = self._stopped_at = None
            case Noted(name="finding"):
                began = record.fields.get("began")
                self._began_at = began if isinstance(began, float) and record.fields.get("severity") == "critical" else None
            case Noted(name=name) if name == MEASURED:
                self.before = read(record.fields) or self.before
            case Marked(name="group_joined", attempt=attempt) if attempt == self._formed[0]:
                self._joined_s = max(self._joined_s, record.took_s)
            case Restored(attempt=attempt) if attempt == self._formed[0]:
                self._restored_s = max(self._restored_s, record.fetch_s + record.load_s)
            case Decided():
                self._decided(record)
            case _:
                pass

    def measured(self) -> Measured:
        """What is known by now, in seconds."""
        medians = {name: statistics.median(seen) for name, seen in self._seen.items()}
        return replace(self.before, **medians, **({"step_s": self.step_s} if self.step_s > 0 else {}))

    def _note(self, name: str, took_s: float) -> None:
        self._seen.setdefault(name, deque(maxlen=SEEN_MOST)).append(max(0.0, took_s))

    def _decided(self, record: Decided) -> None:
        self._answers(record)
        self._phase(record)
        for action in record.actions:
            match action:
                case StartWorkers(node, count):
                    self._asked.setdefault(node, deque(maxlen=64)).extend([record.at] * count)
                case RequestNodes():
                    self._nodes_at = record.at
                case TakeInventory(ask=ask):
                    self._looked = ask, record.at
                case FormGroup(group):
                    self._formed, self._joined_s, self._restored_s = (group.attempt, record.at), 0.0, 0.0
                    if self._stopped_at is not None:
                        self._note("stop_s", record.at - self._stopped_at)
                    self._stopped_at = None
                case _:
                    pass

    def _answers(self, record: Decided) -> None:
        """Events that somebody waited for."""
        match record.event:
            case WorkerReady(node=node) if self._asked.get(node):
                self._note("process_start_s", record.at - self._asked[node].popleft())
            case WorkerLost(node=node, worker=worker) if self._asked.get(node) and not _was_up(record, node, worker):
                self._asked[node].popleft()
            case NodeJoined() if self._nodes_at is not None:
                self._note("node_join_s", record.at - self._nodes_at)
                self._nodes_at = record.at if record.state.requested else None
            case InventoryTaken(ask=ask) if ask and ask == self._looked[0]:
                self._note("inventory_s", record.at - self._looked[1])
                self._looked = 0, 0.0
            case FirstStep(attempt=attempt) if attempt == self._formed[0]:
                # Workers time themselves, as clocks of nodes differ; what is left of the whole is the first step's.
                if self._restored_s and self._joined_s:
                    self._note("form_s", self._joined_s)
                    self._note("restore_s", self._restored_s)
                    self._note("first_step_s", record.at - self._formed[1] - self._joined_s - self._restored_s)
                self._formed = 0, 0.0
            case _:
                pass

    def _phase(self, record: Decided) -> None:
        """What the job is at, and since when."""
        phase = record.state.phase
        match phase:
            case Recovering(incident=incident) as recovering:
                if self._unwinding is None or self._unwinding[0] != incident.number:
                    self._unwinding = incident.number, record.at
                    if self._began_at is not None:
                        self._note("detect_s", record.at - self._began_at)
                    self._began_at = None
                elif self._unwinding[1] and not recovering.unwinding:
                    self._note("unwind_s", record.at - self._unwinding[1])
                    self._unwinding = incident.number, 0.0
            case Starting() if self._unwinding is not None:
                if self._unwinding[1]:
                    self._note("unwind_s", record.at - self._unwinding[1])
                self._unwinding = None
            case Resizing(stopped=stopped) if stopped and self._stopped_at is None:
                self._stopped_at = record.at
            case _:
                pass
        if not isinstance(phase, Resizing | Starting):
            self._stopped_at = None


def _was_up(record: Decided, node: str, worker: str) -> bool:
    """Whether a worker that ended had been ready: its node counts no failed start."""
    known = next((known for known in record.state.nodes if known.id == node), None)
    return known is None or known.failed_starts == 0


def differs(now: Measured, then: Measured) -> bool:
    """Whether something has become known that is worth being told."""
    for each in fields(Measured):
        new, old = getattr(now, each.name), getattr(then, each.name)
        if abs(new - old) > max(CHANGED_S, old * (STEP_CHANGED if each.name == "step_s" else CHANGED)):
            return True
    return False


def note(measured: Measured) -> dict[str, object]:
    """As a note's fields."""
    told: dict[str, object] = to_json(measured)
    return told


def read(told: Mapping[str, object]) -> Measured | None:
    """Of a note's fields; None: they are another version's."""
    try:
        measured: Measured = from_json(Measured, dict(told))
    except ValueError:
        return None
    return measured
