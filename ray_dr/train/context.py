"""`ctx`: what a training function sees of ray_dr."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from ray_dr.checkpoint.cadence import Rhythm
from ray_dr.errors import ConfigError
from ray_dr.model.attempt import Assignment, Cadence
from ray_dr.model.checkpoint import RECORD_WINDOW, Part, StepRecord, VersionId
from ray_dr.model.data import Order, Slice
from ray_dr.model.journal import DataOpened, Marked, Noted, Where
from ray_dr.model.signal import WorkerPhase
from ray_dr.stores.base import Store
from ray_dr.train import data as elastic
from ray_dr.train.collectives import Reducer, is_collective_error
from ray_dr.train.data import Data, StepBatch
from ray_dr.train.fence import Fence, Parcel
from ray_dr.train.health import Watch
from ray_dr.train.link import Link
from ray_dr.train.restore import restore
from ray_dr.train.staging import Planner
from ray_dr.train.standing import Boundary, Stood
from ray_dr.train.state import Flat, Flattener

RECORDS_KEPT = 4
"""Step records that every part repeats, for the case that the part before it got lost."""
FORCED_SAVE_S = 60.0
"""A save that was asked for waits this long for a free slot; one that is merely due does not wait."""
WANT_S = 0.2
"""A save that waits asks for a slot that often: a version may have to wait for its time before it is given up."""
EVERY_STEP = Cadence(0, 1, 0)
EVERYWHERE = frozenset((Where.DISK, Where.STORE, Where.SECOND))


class StopAttempt(BaseException):
    """Leaves `train` at a step boundary. Not an Exception: `except Exception` in a training loop lets it pass."""


class Control:
    """What other threads tell the training thread."""

    def __init__(self, attempt: int, cadence: Cadence = EVERY_STEP) -> None:
        self.attempt, self._cadence = attempt, cadence
        self._rhythm: Rhythm | None = None
        self.next_cadence: Cadence | None = None
        self.terms: dict[str, int] | None = None
        self.keepers: tuple[str, ...] | None = None
        self.step = 0
        self.aborted = False
        self.everywhere = False
        self._stop_step: int | None = None
        self._lock = threading.Lock()

    def abort(self) -> None:
        self.aborted = True

    def stop_at(self, step: int, everywhere: bool) -> int:
        """Steps done; the request holds only when that is below `step`."""
        with self._lock:
            if self.step < step:
                self._stop_step, self.everywhere = step, everywhere
            return self.step

    def finish_step(self, step: int) -> bool:
        """Record that `step` steps are done; whether to stop here."""
        with self._lock:
            self.step = step
            return self._stop_step is not None and step >= self._stop_step

    def places_due(self, step: int) -> frozenset[Where]:
        """Where the state after `step` steps is to go: asked after every step."""
        rhythm = self._rhythm or Rhythm.begin(self._cadence, step - 1)
        if self.next_cadence is not None and step >= self.next_cadence.from_step:
            rhythm, self.next_cadence = rhythm.change(self.next_cadence), None
        self._rhythm, places = rhythm.next(step)
        return places


@dataclass(frozen=True, slots=True)
class World:
    """This worker's place: `rank` of `size`, `local_rank` on its node, the `device` to compute on, the `attempt`."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    attempt: int


class State:
    """What `ctx.restore` gives: the named objects, restored, and the number of steps done."""

    def __init__(self, objects: Mapping[str, Any], step: int) -> None:
        self.objects = dict(objects)
        self.step = step

    @property
    def data(self) -> Data | None:
        """The elastic data among the objects, if any."""
        return next((value for value in self.objects.values() if isinstance(value, Data)), None)


class Context:
    """Handed to `train(ctx)`. Everything a training loop needs from ray_dr."""

    def __init__(self, assignment: Assignment, link: Link, control: Control, token: bytes, store: Store,
                 fence: Fence | None = None) -> None:  # fmt: skip
        self._a, self._link, self._control, self._token, self._store = assignment, link, control, token, store
        self._reducer = Reducer(assignment.rank, assignment.world, deterministic=assignment.deterministic)
        self._planner, self._fence = Planner(assignment.rank, assignment.world), fence or Fence()
        self._flattener = Flattener(assignment.rank, assignment.world)
        self._boundary = Boundary(assignment.rank, assignment.world, note=self._no_rescue, aborted=lambda: control.aborted)
        self._data: Data | None = None
        self._logs: dict[str, float] = {}
        self._arrived_s: float | None = None
        self._window: list[StepRecord] = []
        self._unsaved = assignment.origin_wanting
        self._watch = Watch(assignment.health, assignment.world, lambda: self._logs)
        self.settings = dict(assignment.settings)

    @property
    def world(self) -> World:
        """Rank, size and device of this worker in the current attempt."""
        device = torch.device("cuda", self._a.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        return World(self._a.rank, self._a.world, self._a.local_rank, device, self._a.attempt)

    def data(self, dataset: Sequence[Any], *, global_batch: int, shuffle: bool = True, micro_batches: int | None = None,
             collate: elastic.Collate = default_collate) -> Data:  # fmt: skip
        """The dataset as an elastic source: each sample once per epoch, `global_batch` samples per step in all.

        micro_batches   equal pieces per step, each with a backward pass of its own: to save memory, and needed for
                        `deterministic: true`, where it defaults to the most workers the job can have
        """
        if self._a.deterministic and micro_batches is None:
            micro_batches = self._a.world_most
        order = Order(len(dataset), self._a.seed, shuffle, self._a.left_out)
        self._data = Data(dataset, global_batch=global_batch, micro_batches=micro_batches, order=order, collate=collate)
        return self._data

    def restore(self, **objects: Any) -> State:
        """Bring named objects to the newest checkpoint: modules, optimizers, anything with `state_dict` and
        `load_state_dict`.

        From scratch when there is none. Also hooks the gradient sum into DDP and FSDP2 modules among them, and a fence
        into torch optimizers: parameters they have are saved while the next forward and backward run, up to the next
        `optimizer.step()`. Raises IncompatibleState with all differences, before anything is overwritten.
        """
        self._fence.settle()
        if self._data is not None and self._data not in objects.values():
            objects["data"] = self._data
        self._reducer.even = self._even(objects.values())
        for value in objects.values():
            if isinstance(value, nn.Module):
                self._reducer.attach(value)
        step = 0
        if self._a.origin is not None:
            restored = restore(self._a, objects, self._token, self._store, self._link)
            step = self._a.origin.version.step
            self._link.record(restored)
        self._flattener.flatten(objects)  # what can't be saved is refused now, not hours later
        self._watch.look_at(objects.values())  # first: what breaks off there leaves the state as it was
        self._fence.watch(objects.values(), self._boundary.before_step)
        self._boundary.watch(objects)
        self._boundary.reached(step)
        self._control.finish_step(step)
        if self._a.rank == 0 and self._data is not None:
            self._link.record(self._opened(self._data))
        return State(objects, step)

    def steps(self, state: State, *, until: int) -> Iterator[Any]:
        """One batch per step until `until` steps are done (in all, over every attempt), saving as is due on the way.

        With data: what this rank computes of the step's global batch. Without: the step's number, from 0.

        Between a step's beginning and its `optimizer.step()`, do not change parameters in place: a save may be copying
        them. Such a change is noticed (the save is given up, "save.torn" in the journal), but not always one made through
        `.data` or by a CUDA graph, nor one that is still being made when the copy ends.
        """
        try:
            if state.step >= until:
                self._save_unmoved(state)
            while state.step < until:
                self._check()
                begun = time.monotonic()
                self._link.beacon.enter(WorkerPhase.LOAD, state.step)
                self._watch.begin()
                slices, indices, batch = self._batch(state)
                self._link.beacon.enter(WorkerPhase.COMPUTE)
                yield batch
                took_s = time.monotonic() - begun - self._fence.take_held_up()
                self._arrived_s = self._reducer.arrival.since(begun)
                self._finish(state, slices, indices, took_s, last=state.step + 1 >= until)
        finally:
            self._link.beacon.enter(WorkerPhase.SETUP, state.step)  # what comes behind the steps has no usual time
            self._fence.wait()  # whoever leaves the loop may do with the parameters what he likes

    def micro_batches(self, batch: Any) -> Iterator[Any]:
        """The micro-batches of a step's batch on this rank; do forward and backward for each. A batch that is not cut
        comes back as it is."""
        if not isinstance(batch, StepBatch):
            yield batch
            return
        yield from batch.passes()

    def log(self, **values: Any) -> None:
        """Numbers to keep with this step, in the journal (a tensor's value is read)."""
        self._logs.update({key: float(value) for key, value in values.items()})

    @property
    def skipped(self) -> bool:
        """Whether `optimizer.step()` changed nothing in this step, because gradients were not finite on some rank."""
        return bool(self._watch.skipped)

    def _even(self, objects: Iterable[Any]) -> bool:
        """Whether all ranks take equal shares of a step, in one pass each."""
        data = next((value for value in objects if isinstance(value, Data)), None)
        return data is None or (data.micro_batches is None and data.global_batch % self._a.world == 0)

    # -- a step

    def _check(self) -> None:
        if self._control.aborted:
            raise StopAttempt

    def _batch(self, state: State) -> tuple[tuple[Slice, ...], list[list[int]], Any]:
        data = state.data
        if data is None:
            return (), [], state.step
        slices = data.slices(state.step, self._a.rank, self._a.world, padded=self._reducer.pads)
        indices = [data.indices(piece) for piece in slices]
        if data.micro_batches is None:
            elastic.seed_everything(self._a.seed, slices[0].first)
            self._reducer.begin_pass(slices[0].weight, 0, 1, self._a.world)
            return slices, indices, data.fetch(indices[0])
        return slices, indices, StepBatch(lambda: self._passes(data, slices, indices))

    def _passes(self, data: Data, slices: tuple[Slice, ...], indices: list[list[int]]) -> Iterator[Any]:
        assert data.micro_batches is not None
        for round_, (piece, chosen) in enumerate(zip(slices, indices, strict=True)):
            elastic.seed_everything(self._a.seed, piece.first)
            self._reducer.begin_pass(piece.weight, round_, len(slices), data.micro_batches)
            yield data.fetch(chosen)
            self._reducer.end_pass()

    def _finish(
        self, state: State, slices: tuple[Slice, ...], indices: list[list[int]], took_s: float, last: bool
    ) -> None:
        """A step's body is through: count it, say so, save if due, stop if asked."""
        if not self._boundary.is_whole():
            self._check()
        state.step += 1
        if (data := state.data) is not None:
            data.position = state.step * data.global_batch
        stop = self._control.finish_step(state.step)
        self._boundary.reached(state.step)
        self._say(state.step, slices, indices, took_s)
        self._check()
        places = self._control.places_due(state.step)
        if stop or last:
            self._save(state, EVERYWHERE if last or self._control.everywhere else frozenset(), wait_s=FORCED_SAVE_S)
        elif places:
            self._save(state, places, wait_s=0.0)
        if stop and not last:
            raise StopAttempt

    def _say(self, step: int, slices: tuple[Slice, ...], indices: list[list[int]], took_s: float) -> None:
        used = [(piece, chosen) for piece, chosen in zip(slices, indices, strict=True) if piece.weight]
        ranges = tuple((piece.first, piece.last) for piece, _ in used)
        witness = elastic.witness([index for _, chosen in used for index in chosen])
        logs, self._logs = self._logs, {}
        record = StepRecord(self._a.attempt, step, self._a.rank, self._a.world, ranges, witness, took_s, logs, self._arrived_s,
                            self._watch.skipped, self._watch.state_hash(step))  # fmt: skip
        self._window = [*self._window[-RECORD_WINDOW + 1 :], record]
        self._link.step(record, time.time())
        if record.skipped and record.rank == 0:
            fields: dict[str, object] = {"step": step, "attempt": record.attempt, "why": record.skipped}
            self._link.record(Noted(time.time(), "step.skipped", fields))

    # -- saving

    def _save(self, state: State, places: frozenset[Where], *, wait_s: float) -> None:
        """Save to memory, and so on to `places`. `wait_s`: wait so long for a free slot, and until all is copied; 0: without
        a free slot leave it be, and copy what can be copied later while training goes on."""
        with self._link.beacon.within(WorkerPhase.SAVE):
            self._save_now(state, places, wait_s)

    def _save_now(self, state: State, places: frozenset[Where], wait_s: float) -> None:
        self._fence.settle()
        version = VersionId(self._a.attempt, state.step)
        if not wait_s and self._link.full():  # before the state is described for nothing
            self._link.want_slot(version)
            return
        begun = time.monotonic()
        flat = self._flattener.flatten(state.objects)
        plan = self._planner.plan(flat)
        if not self._link.asked_for(plan.size):
            self._link.open_pool(plan.size)
        taken = self._link.take_slot(plan.size, 0.0)
        while taken is None:
            left = begun + wait_s - time.monotonic()
            self._link.want_slot(None if left > 0 else version)
            if left <= 0:
                break
            taken = self._link.take_slot(plan.size, min(left, WANT_S))
        if taken is None:
            if wait_s:
                raise ConfigError(f"no memory slot of {plan.size} bytes became free in {wait_s:g} s", key="checkpoint",
                                  remedy="see store.* notes in `ray-dr status`; a store may be hanging")  # fmt: skip
            return
        index, slot = taken
        part = self._part(state, flat, plan)
        self._window = self._window[-RECORDS_KEPT:]  # the part carries the rest; these few cover a part that gets lost
        to = {str(place): self._name_and_term(place) for place in sorted(places) if place in self._terms}
        copy_to = self._a.copy_to if self._control.keepers is None else self._control.keepers
        parcel = Parcel(self._link, index, part, copy_to, to, lambda: not self._control.aborted, forced=wait_s > 0)
        self._fence.stage(plan, flat, slot, parcel, begun=begun, behind=not wait_s)

    def _save_unmoved(self, state: State) -> None:
        """No step is left to do. What this began from may be on disks only, or in one store of two: it is saved as a version
        of this attempt, once, as the end of any attempt is. All ranks decide this alike."""
        origin = self._a.origin
        if origin is not None and self._unsaved and state.step == origin.version.step:
            self._check()
            self._unsaved = False
            self._save(state, EVERYWHERE, wait_s=FORCED_SAVE_S)

    def close(self, error: BaseException | None = None) -> None:
        """`train` is over, or raised `error`: the save under way is handed over or given up, optimizers are let go."""
        self._watch.close()
        self._fence.close(failed=error is not None, cut_off=error is not None and is_collective_error(error))

    def left(self) -> Stood | None:
        """What is left of the state after `train` was left by an exception: that at the end of the last whole step, if it is
        that still. Before the group is left."""
        return self._boundary.left(self._a.attempt, tuple(self._window), padded=self._reducer.pads)

    def _no_rescue(self, why: str) -> None:
        if self._a.rank == 0:
            remedy = "a loss costs the steps since the last save"
            self._link.record(Noted(time.time(), "rescue.impossible", {"reason": why, "remedy": remedy}))

    def _name_and_term(self, place: Where) -> tuple[str, int]:
        return (self._a.disk[1] if place is Where.DISK else self._a.job), self._terms[place]

    @property
    def _terms(self) -> dict[str, int]:
        return self._a.terms if self._control.terms is None else self._control.terms

    def _part(self, state: State, flat: Flat, plan: Any) -> Part:
        version = VersionId(self._a.attempt, state.step)
        scalars = flat.scalars if self._a.rank == 0 else {}
        return Part(version, self._a.rank, self._a.world, plan.size, plan.shards, (), scalars, tuple(self._window))

    def _opened(self, data: Data) -> DataOpened:
        order = data.order
        return DataOpened(time.time(), self._a.attempt, order.length, data.global_batch, data.micro_batches or 0,
                          order.seed, order.shuffle, order.left_out)  # fmt: skip

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """`with ctx.evaluating():` around what takes much longer than a step usually does, as an evaluation or an export:
        its time then has a limit of its own, learned from the times before, after which it counts as hanging."""
        return self._link.beacon.within(WorkerPhase.EVAL)

    def mark(self, name: str, took_s: float = 0.0) -> None:
        """Put a moment on the job's timeline."""
        self._link.record(Marked(time.time(), self._a.attempt, name, took_s))
