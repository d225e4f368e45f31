"""Whether the live state still is what it was at the end of the last whole step; then a broken step costs nothing.

At the end of each step it is noted, in some ten microseconds and a twentieth of one per tensor, by what a change would show:

* in-place changes move a tensor's version counter; for writes that do not, through `.data` or as batch norm's kernels do to
  running statistics, some bytes of the largest tensors and of all buffers are kept;
* an optimizer's step is known by its hook: from the first one of a step on, the state is torn until the step's end;
* tensors that change before that, as running statistics do, are learned in the first steps, and copied while they are small;
* parameter groups' values are kept; what other objects have (schedulers, the data's position) is read, and small tensors of
  theirs are copied.

Where any of this cannot be had, nothing is ever called whole: `note` is told why, once. What devices hold is not: after a
broken collective it may be anything. A change through `.data` that no kept byte shows, before the optimizer's step, is not
noticed; saves made behind training's back (`fence`) ask the same of programs.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ray_dr.checkpoint.save_plan import Leaf, SavePlan, plan_save
from ray_dr.model.checkpoint import Part, StepRecord, VersionId
from ray_dr.train.data import Data, witness
from ray_dr.train.leaves import Local, bytes_of, describe
from ray_dr.train.staging import in_one_run
from ray_dr.train.state import Flat, Flattener
from ray_dr.train.values import encode

COPIED_BYTES = 4 * 2**20
"""Less than a millisecond to copy, at every step."""
VALUES_S = 0.002
"""Reading what other objects keep may take so long at every step; the third time in a row that it takes longer is the last."""
LEARNED_STEPS = 3
SAMPLED, SAMPLE_BYTES = 16, 64
WITNESSED_SAMPLES = 65_536
"""On behalf of a lost rank, so many samples are looked up again: a tenth of a second."""
SAME_EVERYWHERE = (Data, LRScheduler, ReduceLROnPlateau)
"""Objects whose state is the same on every rank. What another object keeps, only rank 0 can say for rank 0."""


@dataclass(frozen=True, slots=True)
class Stood:
    """The state after a step, kept beyond the end of its attempt. `twins`: ranks whose parts it has; none named: every one's.

    It refers to tensors only, so that modules, and with them the group's sockets, can go.
    """

    version: VersionId
    rank: int
    world: int
    flat: Flat
    twins: tuple[int, ...]
    window: tuple[StepRecord, ...]
    data: Data | None
    padded: bool

    def part(self, rank: int) -> tuple[SavePlan, Part]:
        """What `rank` would have saved, had it come to it."""
        leaves = [seen_from(local.leaf, rank, self.world) for local in self.flat.tensors.values()]
        plan = plan_save(leaves, rank=rank, world=self.world)
        records = self.window if rank == self.rank else tuple(self._on_behalf(rank))
        scalars = self.flat.scalars if rank == 0 else {}
        return plan, Part(self.version, rank, self.world, plan.size, plan.shards, (), scalars, records)

    def _on_behalf(self, rank: int) -> Iterator[StepRecord]:
        """Which samples a rank used is a function of the step; what it logged is not known."""
        left = WITNESSED_SAMPLES
        for mine in reversed(self.window):
            ranges, digest = used(self.data, mine.step - 1, rank, self.world, padded=self.padded)
            yield replace(mine, rank=rank, ranges=ranges, digest=digest, logs={})
            left -= sum(last - first for first, last in ranges)
            if left <= 0:
                return


def used(data: Data | None, number: int, rank: int, world: int, *, padded: bool) -> tuple[tuple[tuple[int, int], ...], str]:
    """The positions that a rank uses in step `number` (from 0), and the digest of their indices."""
    slices = data.slices(number, rank, world, padded=padded) if data else ()
    pieces = [piece for piece in slices if piece.weight]
    indices = [index for piece in pieces for index in data.indices(piece)] if data else []
    return tuple((piece.first, piece.last) for piece in pieces), witness(indices)


def seen_from(leaf: Leaf, rank: int, world: int) -> Leaf:
    """A leaf as another rank that holds the same boxes describes it."""
    if leaf.holders:
        return replace(leaf, replica=leaf.holders.index(rank))
    return replace(leaf, replica=rank) if leaf.replica_count == world else leaf


def twins_of(leaves: Iterator[Leaf], rank: int, world: int) -> frozenset[int]:
    """The ranks whose boxes are all held here too."""
    able = frozenset(range(world))
    for leaf in leaves:
        if leaf.replica_count < world:
            able &= frozenset(leaf.holders or (rank,))
    return able


class Boundary:
    """One per attempt. Its methods are the training thread's.

    note     told once why nothing can be kept of this state
    aborted  whether the attempt has been given up
    """

    def __init__(self, rank: int, world: int, *, note: Callable[[str], None], aborted: Callable[[], bool]) -> None:
        self.rank, self.world = rank, world
        self._note, self._aborted = note, aborted
        self._flattener = Flattener(rank, world)
        self._why_not = "nothing was restored"
        self.step = -1

    def watch(self, objects: Mapping[str, Any]) -> None:
        """From now on this is the state."""
        self._fixed = {name: value for name, value in objects.items() if isinstance(value, nn.Module | torch.optim.Optimizer)}
        self._others = {name: value for name, value in objects.items() if name not in self._fixed}
        self._optimizers = [value for value in objects.values() if isinstance(value, torch.optim.Optimizer)]
        self._flat: Flat | None = None
        self._states: list[int] = []
        self._early: dict[str, torch.Tensor] = {}
        self._seen: set[int] = set()
        self._learned = self._slow = 0
        self._gated = False
        self._why_not = ""
        if not self._optimizers:
            self._give_up("no torch optimizer is among the objects: when their tensors change cannot be known")

    def reached(self, step: int) -> None:
        """The state is that after `step` whole steps, now."""
        self.step, self._passed, self._sure = step, False, False
        if self._why_not:
            return
        states = [len(optimizer.state) for optimizer in self._optimizers]
        if self._flat is None or states != self._states:
            self._states = states
            if not self._look():
                return
        self._versions = [tensor._version for tensor in self._tensors]
        self._kept = [bytes(sample) for _, sample in self._samples]
        self._groups = [[dict(group) for group in each.param_groups] for each in self._optimizers]
        with torch.no_grad():
            for name, copy in self._early.items():
                copy.copy_(self._named[name])
        self._read_values()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """One of the optimizers is about to change the state. Raises when not everybody has come so far."""
        if self._gated and not self._passed:
            self._agree()
        if not self._passed and not self._why_not and self._learned < LEARNED_STEPS:
            self._learned += 1
            self._learn()
        self._sure = not self._aborted()
        self._passed = True
        self._seen.add(id(optimizer))

    def is_whole(self) -> bool:
        """Whether a step's body that has ended did all of it, although the attempt was given up meanwhile: no collective can
        have been broken off before the gradients were there."""
        return self._passed and self._sure

    def left(self, attempt: int, window: tuple[StepRecord, ...], *, padded: bool) -> Stood | None:
        """What is left of the state when the attempt has been; None when it may be torn, or there is nothing."""
        if self.step <= 0 or self._torn():
            return None
        try:
            flat = self._at_the_boundary()
        except Exception as error:  # a module that was torn out of its forward pass may say anything
            self._give_up(f"the state cannot be described any more ({error!r:.200})")
            return None
        if flat is None:
            return None
        able = twins_of((local.leaf for local in flat.tensors.values()), self.rank, self.world)
        if self.rank and not all(isinstance(value, SAME_EVERYWHERE) for value in self._others.values()):
            able -= {0}
        twins = () if len(able) == self.world else tuple(sorted(able))
        done = tuple(record for record in window if record.step <= self.step)
        data = next((value for value in self._others.values() if isinstance(value, Data)), None)
        return Stood(VersionId(attempt, self.step), self.rank, self.world, flat, twins, done, data, padded)

    def _torn(self) -> str:
        """Why the state is not that at the end of the last step; empty when it is."""
        if self._why_not:
            return self._why_not
        if self._passed or len(self._seen) < len(set(map(id, self._optimizers))):
            return "an optimizer has stepped, or does so unseen"
        changed = next((name for name in self._changed() if name not in self._early), "")
        return changed and f"{changed} has changed since"

    def _changed(self) -> Iterator[str]:
        """Names of the tensors that are known to have changed since the last boundary; one may come more than once."""
        for name, tensor, before in zip(self._names, self._tensors, self._versions, strict=True):
            if tensor._version != before:
                yield name
        for (name, sample), kept in zip(self._samples, self._kept, strict=True):
            if sample != kept:
                yield name

    def _at_the_boundary(self) -> Flat | None:
        for module in self._fixed.values():
            for child in module.modules() if isinstance(module, nn.Module) else ():
                if isinstance(child, FSDPModule):
                    child.reshard()  # a broken pass leaves the gathered parameters in their place
        for optimizer, groups in zip(self._optimizers, self._groups, strict=True):
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(kept)
        flat = self._flattener.flatten(self._fixed)
        if self._flat is None or flat.tensors is not self._flat.tensors:
            return None
        tensors = dict(flat.tensors)
        tensors.update((name, Local(copy, tensors[name].leaf)) for name, copy in self._early.items())
        for name, copy in self._copies.items():
            local = describe(name, copy, self.rank, self.world)
            tensors[name] = Local(local.tensor, replace(local.leaf, whole=True))
        return Flat(tensors, {**flat.scalars, **self._scalars})

    def _look(self) -> bool:
        """Describe the tensors that modules and optimizers have now; False when nothing can be kept of them."""
        flat = self._flat = self._flattener.flatten(self._fixed)
        self._named = {name: local.tensor for name, local in flat.tensors.items() if not local.leaf.same_as}
        self._names, self._tensors = list(self._named), list(self._named.values())
        if any(tensor.is_cuda for tensor in self._tensors):
            self._give_up("it is on devices: what a broken collective leaves there may be anything")
            return False
        plain = {name: tensor for name, tensor in self._named.items() if tensor.numel() and in_one_run(tensor)}
        buffers = _addresses_of_buffers(self._fixed.values())
        sampled = dict.fromkeys(heapq.nlargest(SAMPLED, plain, key=lambda name: plain[name].nbytes))
        sampled.update((name, None) for name, tensor in plain.items() if tensor.data_ptr() in buffers)
        views = [(name, bytes_of(plain[name])) for name in sampled]
        ends = [(name, view, end) for name, view in views for end in (len(view) // 2, len(view))]
        self._samples = [(name, view[max(0, end - SAMPLE_BYTES) : end]) for name, view, end in ends]
        self._early = {name: copy for name, copy in self._early.items() if name in self._named}
        counts = {local.leaf.replica_count for local in flat.tensors.values() if local.leaf.holders}
        self._gated = any(1 < count < self.world for count in counts) and dist.is_initialized()
        return True

    def _learn(self) -> None:
        """What has changed before the first optimizer's step does so always."""
        for name in self._changed():
            if name not in self._early:
                self._early[name] = self._named[name].detach().clone()
        if sum(copy.nbytes for copy in self._early.values()) > COPIED_BYTES:
            largest = max(self._early, key=lambda name: self._early[name].nbytes)
            self._early.clear()
            self._give_up(f"{largest} changes before the optimizer's step, and is too large to copy at each")

    def _read_values(self) -> None:
        begun = time.perf_counter()
        self._scalars, found = {}, dict[str, torch.Tensor]()
        try:
            for name, value in self._others.items():
                self._scalars[name] = encode(value.state_dict(), name, found)
        except Exception as error:  # a save says so when one is due
            self._give_up(f"what other objects keep cannot be read ({error!r:.200})")
            return
        if sum(tensor.nbytes for tensor in found.values()) > COPIED_BYTES:
            self._give_up(f"{max(found, key=lambda name: found[name].nbytes)} is too large to copy at each step")
            return
        self._copies = {name: tensor.detach().clone() for name, tensor in found.items()}
        self._slow = self._slow + 1 if time.perf_counter() - begun > VALUES_S else 0
        if self._slow >= 3:
            self._give_up(f"reading {', '.join(self._others)} takes more than {VALUES_S * 1000:g} ms at each step")

    def _agree(self) -> None:
        """Everybody has all gradients: so that, where only some hold what a lost rank held, not half of them have stepped."""
        dist.all_reduce(torch.ones(1, dtype=torch.uint8))

    def _give_up(self, why: str) -> None:
        if not self._why_not:
            self._note(why)
        self._why_not = why
        self._let_go()

    def _let_go(self) -> None:
        """Of all that is noted: what the program frees shall be free."""
        self._flattener = Flattener(self.rank, self.world)
        self._flat, self._fixed, self._others, self._optimizers = None, {}, {}, []
        self._named, self._names, self._tensors, self._samples = {}, [], [], []
        self._versions, self._kept, self._groups = [], [], []
        self._early, self._copies, self._scalars = {}, {}, {}


def _addresses_of_buffers(objects: Iterable[Any]) -> frozenset[int]:
    buffers = (buffer for value in objects if isinstance(value, nn.Module) for buffer in value.buffers())
    plain = (buffer.to_local() if isinstance(buffer, DTensor) else buffer for buffer in buffers)
    return frozenset(tensor.data_ptr() for tensor in plain if tensor.layout is torch.strided)
