"""The model that both systems train, and its loop three times: for ray_dr, and bare (see ray_train_peer for the third).

A stack of square residual layers: the state (parameters and both Adam moments, float32) is large for what a step
computes, so that what is measured is the state's way and not arithmetic. Data are random vectors, the same everywhere.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from ray_dr.train.context import Context

SAMPLES = 8192
WIDTH = 2048
GATE_POLL_S = 0.02
BYTES_PER_PARAMETER = 12
"""float32 parameter and two Adam moments."""


class Net(nn.Module):
    """Residual layers of `width` x `width`, gone through `repeats` times. Input and output (batch, width)."""

    def __init__(self, width: int, depth: int, repeats: int = 1) -> None:
        super().__init__()
        self.repeats = repeats
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for _ in range(self.repeats):
            for layer in self.layers:
                hidden = hidden + torch.relu(layer(hidden)) / self.repeats
        return hidden


class Samples(Sequence[torch.Tensor]):
    """`SAMPLES` vectors of `width` numbers, cut out of one random tape so that they take no memory."""

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(width + SAMPLES, generator=generator).unfold(0, width, 1)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return self.rows[indices]


def same(batch: torch.Tensor) -> torch.Tensor:
    """Collation of what is a batch already."""
    return batch


def state_bytes(width: int, depth: int) -> int:
    """Bytes of parameters and Adam moments together."""
    return depth * (width * width + width) * BYTES_PER_PARAMETER


def build(width: int, depth: int, repeats: int = 1) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    """The model in DDP and its optimizer, the same initial values in every process."""
    torch.manual_seed(1)
    model = DistributedDataParallel(Net(width, depth, repeats), gradient_as_bucket_view=True)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    """One step: forward, backward with the gradients' sum, update."""
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(ctx: Context) -> None:
    """ray_dr's side. Settings: width, depth, repeats, batch (global), steps; a gate's folder and name for `overhead`."""
    settings = ctx.settings
    begun = time.monotonic()
    model, optimizer = build(int(settings["width"]), int(settings["depth"]), int(settings.get("repeats", 1)))
    ctx.mark("model_built", time.monotonic() - begun)
    data = ctx.data(Samples(int(settings["width"])), global_batch=int(settings["batch"]), collate=same)
    state = ctx.restore(model=model, optimizer=optimizer, data=data)
    gate = Gate.of(settings, ctx.world.rank)
    for batch in ctx.steps(state, until=int(settings["steps"])):
        gate.enter()
        learn(model, optimizer, batch)


def train_bare(rank: int, world: int, settings: dict[str, Any]) -> None:
    """The same loop as a plain program of torch: what `ctx` is compared with. Never returns: its parent ends it."""
    os.setsid()  # as each of Ray's nodes here: Linux shares busy cores among sessions before it does among processes
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{settings['gate']}/rendezvous", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(hours=1))
    model, optimizer = build(int(settings["width"]), int(settings["depth"]), int(settings.get("repeats", 1)))
    data, share = Samples(int(settings["width"])), int(settings["batch"]) // world
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    gate = Gate.of(settings, rank)
    step = 0
    while True:
        gate.enter()
        first = (step * share * world + rank * share) % (len(data) - share)
        learn(model, optimizer, data.rows[order[first : first + share]])
        step += 1


class Gate:
    """Lets a loop run a number of steps when it is its turn, and notes how long they took; so that several programs
    that are alive together can be measured in turns.

    The file `turn` in the folder says `{"name", "round", "steps"}`. Of a turn's steps the first is not timed: the ranks
    do not hear of the turn at the same moment. Each step's time is from its beginning to the next one's, so all that
    happens between two steps counts.
    """

    def __init__(self, folder: str, name: str, rank: int) -> None:
        self._folder, self._name, self._rank = Path(folder), name, rank
        self._round, self._left = -1, 0
        self._begun: list[float] = []

    @staticmethod
    def of(settings: dict[str, Any], rank: int) -> Gate | Open:
        """The gate the settings name, or none."""
        return Gate(str(settings["gate"]), str(settings["variant"]), rank) if settings.get("gate") else Open()

    def enter(self) -> None:
        """Called at the beginning of each step."""
        if self._left:
            self._begun.append(time.perf_counter())
            self._left -= 1
            if not self._left:
                self._tell()
        while not self._left:
            self._wait()

    def _wait(self) -> None:
        turn = _read(self._folder / "turn")
        if turn and turn["name"] == self._name and turn["round"] > self._round:
            self._round, self._left, self._begun = turn["round"], turn["steps"] + 1, []
        else:
            time.sleep(GATE_POLL_S)

    def _tell(self) -> None:
        times = [later - earlier for earlier, later in itertools.pairwise(self._begun)]
        write(self._folder / f"{self._name}.{self._round}.{self._rank}", times)


class Open:
    """No gate."""

    def enter(self) -> None:
        """Goes on."""


def write(path: Path, value: Any) -> None:
    """Put JSON there so that a reader sees all of it or nothing."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value))
    draft.rename(path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
