"""The elastic sampler: every sample exactly once per epoch, in one global order, at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import default_collate

from ray_dr.errors import ConfigError, IncompatibleState
from ray_dr.model.data import Order, Slice, digest, joined, micro_shares, share

Collate = Callable[[list[Any]], Any]


class Data:
    """A dataset with a position. Its state is one integer, the samples consumed; it can be named in `ctx.restore`.

    dataset        map-style: `len()` and `[index]`; `__getitems__(indices)` is used where there is one
    global_batch   samples per step over all ranks, the same at every world size
    micro_batches  how many equal pieces the global batch has, or None: each rank takes its whole share in one pass
    """

    def __init__(self, dataset: Sequence[Any], *, global_batch: int, micro_batches: int | None, order: Order,
                 collate: Collate = default_collate) -> None:  # fmt: skip
        if global_batch < 1:
            raise ConfigError(f"global_batch is {global_batch}", key="global_batch", remedy="at least 1")
        if micro_batches is not None and (micro_batches < 1 or global_batch % micro_batches):
            raise ConfigError(
                f"a global batch of {global_batch} cannot be cut into {micro_batches} equal micro-batches",
                key="micro_batches", remedy=f"a divisor of {global_batch}",
            )  # fmt: skip
        self.dataset, self.order, self._collate = dataset, order, collate
        self.global_batch, self.micro_batches = int(global_batch), micro_batches
        self.position = 0

    @property
    def step(self) -> int:
        """Steps done: the position in global batches."""
        return self.position // self.global_batch

    def slices(self, step: int, rank: int, world: int, *, padded: bool) -> tuple[Slice, ...]:
        """What `rank` computes in step number `step` (from 0), one slice per pass."""
        if self.micro_batches is None:
            if world > self.global_batch:
                raise ConfigError(f"a global batch of {self.global_batch} cannot feed {world} workers",
                                  key="global_batch", remedy=f"at least {world}")  # fmt: skip
            return (share(step, global_batch=self.global_batch, rank=rank, world=world),)
        if world > self.micro_batches:
            raise ConfigError(f"{self.micro_batches} micro-batches cannot feed {world} workers",
                              key="micro_batches", remedy=f"at least {world}")  # fmt: skip
        slices = micro_shares(
            step, global_batch=self.global_batch, micro_batches=self.micro_batches, rank=rank, world=world
        )
        return slices if padded else tuple(piece for piece in slices if piece.weight)

    def indices(self, piece: Slice) -> list[int]:
        """Dataset indices of a slice, in order."""
        return self.order.indices(piece.first, piece.last)

    def fetch(self, indices: list[int]) -> Any:
        """The collated samples."""
        many = getattr(self.dataset, "__getitems__", None)
        return self._collate(many(indices) if many else [self.dataset[index] for index in indices])

    def state_dict(self) -> dict[str, Any]:
        left_out = {"left_out": [list(window) for window in self.order.left_out]} if self.order.left_out else {}
        return {
            "position": self.position, "global_batch": self.global_batch, "samples": self.order.length,
            "seed": self.order.seed, "shuffle": self.order.shuffle, **left_out,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if different := self.differences(state):
            raise IncompatibleState(different)
        self.position = int(state["position"])
        # The job says what is left out since; where it has lost its memory of that, the checkpoint has not.
        windows = ((int(first), int(last)) for first, last in state.get("left_out", ()))
        self.order = replace(self.order, left_out=joined((*self.order.left_out, *windows)))

    def differences(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Why a saved position would mean other samples here: what differs, in words."""
        mine = self.state_dict()
        return tuple(
            f"data/{key}: {state.get(key)} in the checkpoint, {mine[key]} in the program"
            for key in ("global_batch", "samples", "seed", "shuffle")
            if state.get(key) != mine[key]
        )


class StepBatch:
    """One step's micro-batches on this rank. Only `ctx.micro_batches(batch)` opens it."""

    def __init__(self, passes: Callable[[], Iterator[Any]]) -> None:
        self.passes = passes

    def __getattr__(self, name: str) -> Any:
        raise TypeError(
            "this job computes each step in micro-batches: write "
            "`for micro in ctx.micro_batches(batch): loss_fn(model, micro).backward()` inside the step"
        )

    __iter__ = __getitem__ = __len__ = lambda self, *_: self.__getattr__("")


def witness(indices: Sequence[int]) -> str:
    """The journal's digest of the indices a rank really used in a step."""
    return digest(indices)


def seed_everything(seed: int, first: int) -> None:
    """Seed Python, NumPy and torch for the samples from position `first` on: by position in the global order, not by
    rank, so that dropout masks do not depend on who computes them."""
    import random

    import numpy as np

    mixed = ((seed * 0x9E3779B97F4A7C15) ^ (first * 0xD1B54A32D192ED03) ^ (first >> 7)) % 2**63
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)
