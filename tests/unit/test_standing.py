"""What a state was at the end of the last whole step, when something has changed since: in one process, without a group."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn

from ray_dr.train.standing import SAMPLED, Boundary, Stood


class Unreadable:
    """An object of the program's own that cannot say what it keeps from its second step on."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        if self.asked > 2:
            raise ValueError("not now")
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = int(state["asked"])


class Norm(nn.Module):
    """Batch norm that counts no batches: a count is changed in the open."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, variance = self.get_buffer("mean"), self.get_buffer("variance")
        return nn.functional.batch_norm(x, mean, variance, training=self.training)


class Run:
    """A small model with running statistics, which are smaller than SAMPLED other tensors, and its boundary."""

    def __init__(self, **others: Any) -> None:
        torch.manual_seed(1)
        self.norm = Norm()
        self.model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(SAMPLED)), self.norm)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.notes: list[str] = []
        self.boundary = Boundary(0, 1, note=self.notes.append, aborted=lambda: False)
        self.boundary.watch({"model": self.model, "optimizer": self.optimizer, **others})
        self.boundary.reached(0)

    def forward(self) -> None:
        self.model(torch.randn(4, 8)).square().mean().backward()

    def step(self) -> None:
        self.forward()
        self.boundary.before_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.boundary.reached(self.boundary.step + 1)

    def left(self) -> Stood | None:
        return self.boundary.left(1, (), padded=False)


def test_statistics_that_a_kernel_changes_unseen_are_those_of_the_boundary() -> None:
    run = Run()
    for _ in range(4):
        run.step()
    at_the_boundary = {name: buffer.clone() for name, buffer in run.norm.named_buffers()}
    run.forward()
    assert not torch.equal(run.norm.get_buffer("mean"), at_the_boundary["mean"])
    stood = run.left()
    assert stood is not None
    for name, before in at_the_boundary.items():
        assert torch.equal(stood.flat.tensors[f"model/{SAMPLED}.{name}"].tensor, before), name


def test_statistics_that_change_only_after_the_first_steps_make_the_state_torn() -> None:
    run = Run()
    run.norm.eval()
    for _ in range(4):
        run.step()
    assert run.left() is not None
    run.norm.train()
    run.forward()
    assert run.left() is None


def test_what_cannot_be_rescued_is_not_held_on_to() -> None:
    run = Run(others=Unreadable())
    run.step()
    assert not run.notes
    run.step()
    assert len(run.notes) == 1
    assert run.left() is None
    parameter, norm = weakref.ref(run.model[0].weight), weakref.ref(run.norm)
    del run.model, run.optimizer, run.norm
    gc.collect()
    assert (parameter(), norm()) == (None, None)
