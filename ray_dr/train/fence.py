"""Saving behind training's back: what only an optimizer's step changes is copied while forward and backward run.

Between two calls of `optimizer.step()` nobody changes the parameters of an optimizer, nor the tensors of its state. So a
save copies them from a thread, and a hook makes the next step of any of the optimizers wait until that copy is done.
Everything else (buffers, parameters that no saved optimizer has, what users' objects hold, all that is JSON) is copied at
once.

Two things guard against programs that do change parameters otherwise:

* Only optimizers whose hook was called since the save before count. Of one that steps past its hooks, as a compiled step or
  a replayed CUDA graph does, everything is copied at once.
* An in-place change moves a tensor's version counter, unless it goes through `.data` or is a fused optimizer's. For those, a
  few bytes of the largest CPU tensors are kept and compared with their copies. Where either tells that a tensor has changed
  during the copy, the copy is thrown away, and from then on this process copies everything at once.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ray_dr.checkpoint.cut import clear_gaps
from ray_dr.checkpoint.mesh import joined
from ray_dr.checkpoint.save_plan import SavePlan, plan_save
from ray_dr.checkpoint.sealing import Same
from ray_dr.model.checkpoint import CHUNK_BYTES, Part, VersionId
from ray_dr.model.journal import Noted
from ray_dr.train.link import Link
from ray_dr.train.staging import Copy, Marks, Piece, in_one_run, pieces
from ray_dr.train.state import Flat, Local, bytes_of, flatten

AT_ONCE_BYTES = 8 * 2**20
"""About a millisecond of copying: for less, a thread costs more than it saves."""
SAMPLED = 16
SAMPLE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Parcel:
    """A slot that is being filled, with its addresses (see `Link.staged`). `wanted`: whether the attempt still counts."""

    link: Link
    slot: int
    part: Part
    copy_to: Sequence[str]
    to: Mapping[str, tuple[str, int]]
    wanted: Callable[[], bool]
    forced: bool = False

    def hand_over(self, same: Callable[[VersionId], Same], *, stall_s: float, staged_at: float) -> None:
        """Give the filled slot to the agent, or back when nobody wants it any more."""
        if not self.wanted():
            return self.link.give_back(self.slot)
        return self.link.staged(
            self.slot, self.part, staged_at=staged_at, stall_s=stall_s, copy_to=self.copy_to, to=self.to, forced=self.forced,
            same=same(self.part.version),
        )  # fmt: skip

    def tear(self, tensor: str) -> None:
        """Give the slot back, because this tensor changed while it was copied."""
        self.link.give_back(self.slot)
        self.link.want_slot(self.part.version)
        remedy = "change parameters in place only between optimizer.step() and the end of the step's body"
        fields: dict[str, object] = {"tensor": tensor, "step": self.part.version.step, "rank": self.part.rank,
                                     "remedy": f"{remedy}; until then saves stop training while they copy"}  # fmt: skip
        self.link.record(Noted(time.time(), "save.torn", fields))


@dataclass(eq=False)
class _Split:
    """What of a state is copied at once, and what later: kept from save to save, as are the copies into each slot.

    `watched`: (name, tensor) of all that comes later; `sampled`: (name, place in the slot, bytes) of some of it.
    """

    tensors: Mapping[str, Local]
    plan: SavePlan
    owners: Any
    now: list[Piece] = field(default_factory=list)
    later: list[Piece] = field(default_factory=list)
    watched: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    sampled: list[tuple[str, slice, memoryview]] = field(default_factory=list)
    marks: Marks = field(default_factory=Marks)
    _copies: dict[int, tuple[memoryview, Copy, Copy]] = field(default_factory=dict)

    @functools.cached_property
    def on_devices(self) -> bool:
        """Whether anything is; then this must not outlive the save: it would hold memory that the program may need."""
        return any(piece.tensor.is_cuda for piece in (*self.now, *self.later))

    def copies(self, slot: memoryview) -> tuple[Copy, Copy]:
        """Those of now and of later into this slot, in whose gaps there are zeros from the first time on."""
        address = np.frombuffer(slot, np.uint8).ctypes.data
        known = self._copies.get(address)
        if known is None or known[0].obj is not slot.obj:  # a new pool may lie where the old one was
            clear_gaps(self.plan.shards, slot)
            known = slot, Copy(self.now, slot, self.marks), Copy(self.later, slot, self.marks)
            self._copies[address] = known
        self.marks.begin()
        return known[1:]

    def same(self, version: VersionId) -> Same:
        """What this save, which is handed over as `version`, has in common with the one that was before it."""
        told = self.marks.tell(version)
        return None if told is None else (told[0], joined((at, self._ends[at]) for at in told[1]))

    @functools.cached_property
    def _ends(self) -> dict[int, int]:
        """Where each run ends, and the padding behind it: where the next one begins."""
        starts = sorted({at for piece in (*self.now, *self.later) for at in range(piece.at, piece.at + piece.size, CHUNK_BYTES)})
        return dict(zip(starts, (*starts[1:], self.plan.size), strict=True))


@dataclass(slots=True)
class _Behind:
    """A copy under way: (name, tensor) of all in it and their versions before, and (name, place, bytes there) of some; since
    when training waits for it (monotonic)."""

    copy: Copy
    watched: Sequence[tuple[str, torch.Tensor]]
    versions: Sequence[int]
    samples: tuple[tuple[str, memoryview, bytes], ...]
    parcel: Parcel
    same: Callable[[VersionId], Same]
    stall_s: float
    begun_at: float
    waiting_since: float | None = None
    copied: threading.Event = field(default_factory=threading.Event)

    def torn(self) -> str:
        """The name of a tensor that has changed since the copy began; empty if none is known."""
        pairs = zip(self.watched, self.versions, strict=True)
        moved = (name for (name, tensor), version in pairs if tensor._version != version)
        other = (name for name, place, kept in self.samples if place != kept)
        return next(moved, "") or next(other, "")


class Fence:
    """One per worker process. Its methods are the training thread's; a hook may be called by any thread."""

    def __init__(self) -> None:
        self._trusts = True
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._hooks: list[RemovableHandle] = []
        self._stepped: set[int] = set()
        self._behind: _Behind | None = None
        self._carried: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._lock = threading.Lock()
        self._cut_off = False
        self._held_up_s = 0.0
        self._split: _Split | None = None
        self._before: Callable[[torch.optim.Optimizer], None] | None = None

    def watch(self, objects: Iterable[Any], before: Callable[[torch.optim.Optimizer], None] | None = None) -> None:
        """Hook into the torch optimizers among these objects, and into no others any more. `before`: called before each of
        their steps, once nothing is being copied."""
        self._let_go()
        self._before = before
        self._cut_off = False
        for value in objects:
            if isinstance(value, torch.optim.Optimizer) and id(value) not in self._optimizers:
                self._optimizers[id(value)] = value
                self._hooks.append(value.register_step_pre_hook(self._before_step))
        rehearse()
        self._thread.submit(int)  # starts it now: the first save would wait for that

    def stage(self, plan: SavePlan, flat: Flat, slot: memoryview, parcel: Parcel, *, begun: float, behind: bool) -> None:
        """Copy a state into `slot` and hand it over. `begun`: when training stopped for that (monotonic seconds);
        `behind`: what can be copied later, may be. The save before is settled."""
        split = self._split_up(plan, flat, behind=behind and self._trusts)
        self._stepped.clear()
        versions = [tensor._version for _, tensor in split.watched]
        now, later = split.copies(slot)
        now.run()
        if not split.later:
            return parcel.hand_over(split.same, stall_s=time.monotonic() - begun, staged_at=time.time())
        samples = tuple((name, slot[at], bytes(source)) for name, at, source in split.sampled)
        under_way = _Behind(
            later, split.watched, versions, samples, parcel, split.same, stall_s=time.monotonic() - begun, begun_at=time.time()
        )
        self._carried = self._thread.submit(self._carry, under_way)
        self._behind = under_way
        return None

    def _split_up(self, plan: SavePlan, flat: Flat, *, behind: bool) -> _Split:
        """What can be copied later, if anything can."""
        stepped = [self._optimizers[key] for key in sorted(self._stepped & self._optimizers.keys())] if behind else []
        owners = [(id(each), [list(map(id, group["params"])) for group in each.param_groups]) for each in stepped]
        kept, self._split = self._split, None
        if kept is None or kept.tensors is not flat.tensors or kept.plan is not plan or kept.owners != owners:
            kept = _split(plan, flat, owners, _owned(stepped))
        if not kept.on_devices:
            self._split = kept
        return kept

    def wait(self) -> float:
        """Until nothing is being copied; the seconds it took."""
        behind, begun = self._behind, time.monotonic()
        if behind is None:
            return 0.0
        with self._lock:
            if behind.copied.is_set():
                return 0.0
            behind.waiting_since = behind.waiting_since or begun
        behind.copied.wait()
        return time.monotonic() - begun

    def settle(self) -> None:
        """Until the save under way is handed over or given up. Raises what went wrong with it."""
        self.wait()
        carried, self._carried, self._behind = self._carried, None, None
        if carried is not None:
            carried.result()

    def take_held_up(self) -> float:
        """Seconds for which optimizers' steps were held up since this was last asked."""
        held_up_s, self._held_up_s = self._held_up_s, 0.0
        return held_up_s

    def close(self, *, failed: bool = False, cut_off: bool = False) -> None:
        """The attempt is over: settle, and let its optimizers go. `failed`: there is an error already, which another one
        must not hide; `cut_off`: a collective was broken off, so that what devices computed last may be anything."""
        self._cut_off = cut_off
        try:
            with contextlib.suppress(*((Exception,) if failed else ())):
                self.settle()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._optimizers.clear()
        self._stepped.clear()
        self._split = self._before = None
        self._held_up_s = 0.0

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled step cannot wait
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._trusts = False  # what is captured will be replayed without this hook
            return
        self._held_up_s += self.wait()
        self._stepped.add(id(optimizer))
        if self._before is not None:
            self._before(optimizer)

    def _carry(self, behind: _Behind) -> None:
        """In the thread: copy, open the fence, hand over."""
        torn, stood_s = "", 0.0
        try:
            try:
                behind.copy.run()
                torn = behind.torn()
            finally:
                self._trusts = self._trusts and not torn
                with self._lock:
                    if behind.waiting_since is not None:
                        stood_s = time.monotonic() - behind.waiting_since
                    behind.copied.set()
        except BaseException:
            behind.parcel.link.give_back(behind.parcel.slot)
            raise
        if torn:
            behind.parcel.tear(torn)
        elif self._cut_off:
            behind.parcel.link.give_back(behind.parcel.slot)
        else:
            # What training stood still is no time that the save took besides.
            behind.parcel.hand_over(behind.same, stall_s=behind.stall_s + stood_s, staged_at=behind.begun_at + stood_s)


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> Mapping[int, tuple[torch.Tensor, ...]]:
    """What only a step of the optimizers changes, by address: the plain tensor, and the DTensor around it."""
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    with torch.no_grad():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    for tensor in (parameter, *optimizer.state.get(parameter, {}).values()):
                        if isinstance(tensor, DTensor):
                            local = tensor.to_local()
                            found[local.data_ptr()] = (local, tensor)
                        elif type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided:
                            found[tensor.data_ptr()] = (tensor,)
    return found


def _split(plan: SavePlan, flat: Flat, owners: Any, owned: Mapping[int, tuple[torch.Tensor, ...]]) -> _Split:
    split = _Split(flat.tensors, plan, owners)
    for piece in pieces(plan, flat):
        whole = flat.tensors[piece.name].tensor
        owner = owned.get(whole.data_ptr())
        if owner is not None and _same(owner[0], whole):
            split.later.append(piece)
            split.watched += [(piece.name, tensor) for tensor in owner]
        else:
            split.now.append(piece)
    if sum(piece.size for piece in split.later) < AT_ONCE_BYTES:
        split.now = sorted((*split.now, *split.later), key=lambda piece: piece.at)
        split.later, split.watched = [], []
    split.sampled = list(_samples(split.later))
    return split


@functools.cache
def rehearse() -> None:
    """Go once through what a save does while training stands, with a state of a few bytes: a process meets torch's and
    numpy's ways into memory for the first time then, which takes as long as the rest of a save's stall."""
    module = nn.Linear(1, 1)
    flat = flatten({"module": module}, rank=0, world=1)
    plan = plan_save([local.leaf for local in flat.tensors.values()], rank=0, world=1)
    split = _split(plan, flat, (), _owned([torch.optim.SGD(module.parameters())]))
    for copy in split.copies(memoryview(bytearray(plan.size))):
        copy.run()
    list(_samples(split.now))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors with the same first byte are the same memory."""
    return one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()


def _samples(pieces: Iterable[Piece]) -> Iterator[tuple[str, slice, memoryview]]:
    """A few bytes from the middle and the end of the largest tensors, and where in the slot their copies will be. None of
    tensors on devices, for which training would have to wait."""
    plain = (piece for piece in pieces if not piece.tensor.is_cuda and in_one_run(piece.tensor))
    for piece in heapq.nlargest(SAMPLED, plain, key=lambda each: each.size):
        source = bytes_of(piece.tensor)
        for end in (len(source) // 2, len(source)):
            first = max(0, end - SAMPLE_BYTES)
            yield piece.name, slice(piece.at + first, piece.at + end), source[first:end]
