"""Training programs of the tests: small and exact. A paced one takes a stated time per step, so that nodes can come and go
while it trains, and leaves the processor to the processes that start."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ray_dr import Context


class Numbers(Sequence[torch.Tensor]):
    """`count` samples of 16 numbers that depend on nothing but the index."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        return torch.sin(torch.arange(16) * (1.0 + index % 97))


def model() -> nn.Module:
    """A small network with dropout, the same at every start."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 16))


def loop(ctx: Context, wrapped: nn.Module, parameters: Any) -> None:
    """`settings`: steps, pace (seconds per step), gate (see `jobs.held`), batch, micro (0: one pass per rank), hang."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.9)
    micro = int(ctx.settings.get("micro", 6)) or None
    data = ctx.data(Numbers(1000), global_batch=int(ctx.settings.get("batch", 12)), micro_batches=micro)
    state = ctx.restore(model=wrapped, optimizer=optimizer, schedule=schedule, data=data)
    for batch in ctx.steps(state, until=int(ctx.settings["steps"])):
        began = time.monotonic()
        hang_once(ctx, state.step)
        for part in ctx.micro_batches(batch):
            loss = (wrapped(part) - part.flip(-1)).square().mean()
            loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ctx.log(loss=loss.detach())
        time.sleep(max(0.0, pause(ctx.settings, state.step) - (time.monotonic() - began)))


def hang_once(ctx: Context, step: int) -> None:
    """`hang` is the path of a marker: the last rank that finds it at step 40 takes it away and never comes back."""
    marker = Path(str(ctx.settings.get("hang", "")))
    if step == 40 and ctx.world.rank == ctx.world.size - 1 and marker.is_file():
        marker.unlink()
        time.sleep(3600)


def pause(settings: Mapping[str, Any], step: int) -> float:
    """Seconds a step is to take."""
    pace, gate = float(settings.get("pace", 0.0)), settings.get("gate")
    if gate is None:
        return pace
    if Path(str(gate)).exists():
        return 0.0
    return pace if step < int(settings["steps"]) // 2 else 5 * pace


def replicated(ctx: Context) -> None:
    """DDP."""
    plain = model()
    loop(ctx, DistributedDataParallel(plain), plain.parameters())


def sharded(ctx: Context) -> None:
    """FSDP2: every parameter is a DTensor, split over the ranks."""
    plain = model()
    for layer in plain:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(plain)
    loop(ctx, plain, plain.parameters())


def failing(ctx: Context) -> None:
    """Raises the same error at the same step, every time."""
    data = ctx.data(Numbers(100), global_batch=4)
    state = ctx.restore(data=data)
    for _ in ctx.steps(state, until=50):
        if state.step == 7:
            raise ValueError(f"a mistake in the loss at {time.time()}")


def failing_once(ctx: Context) -> None:
    """Raises once in the job's life, on the machine that has the marker file."""
    marker = Path(str(ctx.settings["marker"]))
    data = ctx.data(Numbers(100), global_batch=4)
    state = ctx.restore(data=data)
    for _ in ctx.steps(state, until=30):
        if state.step == 7 and ctx.world.rank == 0 and marker.exists():
            marker.unlink()
            raise ValueError("a passing fault")


def another(ctx: Context) -> None:
    """A program whose model does not fit the checkpoints of `replicated`."""
    wrapped = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)))
    ctx.restore(model=wrapped)
    os._exit(9)  # never reached: restore must have refused
