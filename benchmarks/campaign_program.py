"""The program of the fault campaign: small, exact, and able to fail by itself, once, where it is told to.

Settings: `steps`; `pace`, seconds per step; `hold_from`, the step from which one takes HELD times as long until the file
`gate` is there, and then no time at all. A fault is planned by `where` (step, loader, save, restore), `deed` (raise,
sys-exit, exit, kill, hang, wait, slow), `world` (the least size of the group) and `armed`, a file: the last rank, when it
comes to the place, takes it away, leaves `<armed>.taken` with the time, and does the deed. `always` is a step that raises
whenever it comes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_dr import Context

HELD = 10
SLOW_STEPS, SLOW_S, WAIT_S = 20, 0.3, 5.0


class Planned:
    """The fault that the settings plan, on this rank: only the last one does anything."""

    def __init__(self, ctx: Context) -> None:
        settings, self._rank, self._world = ctx.settings, ctx.world.rank, ctx.world.size
        self._armed = Path(str(settings.get("armed", os.devnull)))
        self._where, self._deed = settings.get("where"), str(settings.get("deed"))
        self._least = int(settings.get("world", 1))
        self._slow_left = 0
        self.step = 0
        self.training = False

    def here(self, where: str) -> None:
        """A place that a fault may be planned for."""
        if self._slow_left and where == "step":
            self._slow_left -= 1
            time.sleep(SLOW_S)
        if where == self._where and self._rank == self._world - 1 and self._world >= self._least and self._take():
            self._do()

    def _take(self) -> bool:
        if not self._armed.is_file():
            return False
        self._armed.unlink()
        told = {"at": time.time(), "step": self.step, "rank": self._rank, "pid": os.getpid()}
        draft = self._armed.with_suffix(".draft")
        draft.write_text(json.dumps(told))
        draft.rename(f"{self._armed}.taken")
        return True

    def _do(self) -> None:
        match self._deed:
            case "raise":
                raise ValueError("a passing fault")
            case "sys-exit":
                sys.exit(1)
            case "exit":
                os._exit(1)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
            case "wait":
                time.sleep(WAIT_S)
            case "slow":
                self._slow_left = SLOW_STEPS
            case other:
                raise AssertionError(f"no deed {other!r}")


class Place:
    """An object among those that are saved: a save describes it, a restore loads it, and a fault may be planned for both."""

    def __init__(self, planned: Planned) -> None:
        self._planned = planned

    def state_dict(self) -> dict[str, Any]:
        if self._planned.training:  # else it is the look at what there is to save, right after a restore
            self._planned.here("save")
        return {"nothing": 0}

    def load_state_dict(self, _: dict[str, Any]) -> None:
        self._planned.here("restore")


class Numbers(Sequence[torch.Tensor]):
    """Samples of 16 numbers that depend on nothing but the index."""

    def __init__(self, loading: Callable[[], None]) -> None:
        self._loading = loading

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: Any) -> Any:
        self._loading()
        return torch.sin(torch.arange(16) * (1.0 + index % 97))


def train(ctx: Context) -> None:
    """A small network with dropout, in DDP, with AdamW and a schedule."""
    planned, settings = Planned(ctx), ctx.settings
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 16))
    model = DistributedDataParallel(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.9)
    data = ctx.data(Numbers(lambda: planned.here("loader")), global_batch=12, micro_batches=6)
    state = ctx.restore(model=model, optimizer=optimizer, schedule=schedule, data=data, place=Place(planned))
    planned.training = True
    for batch in ctx.steps(state, until=int(settings["steps"])):
        began = time.monotonic()
        planned.step = state.step
        planned.here("step")
        if state.step == settings.get("always"):
            raise ValueError("a mistake in the loss")
        for part in ctx.micro_batches(batch):
            loss = (model(part) - part.flip(-1)).square().mean()
            loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ctx.log(loss=loss.detach())
        time.sleep(max(0.0, pause_s(settings, state.step) - (time.monotonic() - began)))


def pause_s(settings: dict[str, Any], step: int) -> float:
    """Seconds a step is to take."""
    pace = float(settings.get("pace", 0.0))
    if step < int(settings.get("hold_from", settings["steps"])):
        return pace
    return 0.0 if Path(str(settings["gate"])).exists() else pace * HELD
