"""Whether training itself is sound: gradients that are numbers, and replicas that are the same.

Before each `optimizer.step()` the norm of its gradients is taken, in one pass. Where any rank's is no number, all ranks agree on
it (one number, the maximum over ranks) and take the gradients away: torch's optimizers leave parameters without a gradient,
and their state, untouched. Nobody can have stepped while another has not. Where mixed precision's scaler looks after a fused
optimizer's gradients itself, this does not.

Replicas (of DDP, and of hybrid sharding) are compared by a hash of their parameters, every so many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ray_dr.errors import NonFinite
from ray_dr.model.job import Health
from ray_dr.train.parameter_hash import parameter_hash

NON_FINITE, STATE = "non_finite", "state"
"""Why a step was skipped; the second: buffers of the model are spoilt too, which no skip mends."""
JUDGED = ("loss", "grad_norm")
"""What is looked at of the numbers that a program logs before its optimizer's step."""


class Watch:
    """One per attempt; its methods are the training thread's.

    skipped   why the step at hand was skipped (`StepRecord.skipped`); empty: it was not
    logged    what the program has logged in this step so far
    """

    def __init__(self, health: Health, world: int, logged: Callable[[], Mapping[str, float]]) -> None:
        self._health, self._world, self._logged = health, world, logged
        self.skipped = ""
        self._modules: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def look_at(self, objects: Iterable[Any]) -> None:
        """Hook into the torch optimizers among these objects, and compare the replicated modules among them. On several ranks
        that nothing sums gradients over, nobody can agree: there nothing is done."""
        self.close()
        kept = list(objects)
        self._modules = [value for value in kept if isinstance(value, nn.Module)]
        together = self._world == 1 or any(map(_is_wrapped, self._modules))
        if self._health.non_finite == "ignore" or not together:
            return
        for optimizer in {id(value): value for value in kept if isinstance(value, torch.optim.Optimizer)}.values():
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))

    def begin(self) -> None:
        """A step begins."""
        self.skipped = ""

    def state_hash(self, step: int) -> str:
        """What `StepRecord.state_hash` is to say after this step."""
        every = self._health.check_every
        if self._world == 1 or not every or step % every:
            return ""
        tensors, places = [], set()
        for tensor, place in _replicas(self._modules):
            tensors.append(tensor)
            places.add(place)
        return f"{' '.join(sorted(places))}:{parameter_hash(tensors):016x}" if tensors else ""

    def close(self) -> None:
        """The attempt is over: let the optimizers go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._modules = []

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling() or getattr(optimizer, "found_inf", None) is not None:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grads = [plain for p in parameters if p.grad is not None and (plain := _plain(p.grad)).numel()]
        logged = self._logged()
        spoilt = not all(math.isfinite(logged.get(name, 0.0)) for name in JUDGED)
        # The sum of squares can overflow where no gradient has: then it takes a second look, on all ranks alike.
        if not self._agreed(_norm(grads), spoilt) or not self._agreed(_worst(grads), spoilt):
            return
        if self._health.non_finite == "stop":
            raise NonFinite("gradients, or a logged number, are not finite (health.non_finite: stop)")
        for parameter in parameters:
            parameter.grad = None
        self.skipped = NON_FINITE if all(map(_is_finite, _buffers(self._modules))) else STATE

    def _agreed(self, number: torch.Tensor | None, spoilt: bool) -> bool:
        """Whether the number is not finite on any rank, or anything else was spoilt there. Waits for the device once."""
        if self._world == 1:
            return spoilt or (number is not None and not math.isfinite(number.item()))
        device = torch.device("cpu") if number is None else number.device
        flag = torch.tensor(float(spoilt), device=device)
        if number is not None:
            flag = torch.maximum(flag, (~torch.isfinite(number)).to(flag.dtype))
        if device.type == "cpu" and dist.get_backend() == "nccl":
            flag = flag.cuda()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


def _is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel) or any(isinstance(child, FSDPModule) for child in module.modules())


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.coalesce().values() if local.is_sparse else local


def _norm(grads: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.nn.utils.get_total_norm(grads) if grads else None


def _worst(grads: list[torch.Tensor]) -> torch.Tensor | None:
    """Not a number if there is one among all elements that is not finite; else zero."""
    bad = [(~torch.isfinite(grad)).any().to(grads[0].device) for grad in grads]
    return torch.where(torch.stack(bad).any(), math.nan, 0.0) if bad else None


def _buffers(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    return (_plain(buffer) for module in modules for buffer in module.buffers() if buffer.is_floating_point())


def _is_finite(tensor: torch.Tensor) -> bool:
    # Masks hold infinities on purpose; what training spoils is not a number.
    return not bool(torch.isnan(tensor).any())


def _replicas(modules: Iterable[nn.Module]) -> Iterator[tuple[torch.Tensor, str]]:
    """Parameters of which other ranks hold the same, and of what they are the same: all of it, or which shard."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            ignored = module.parameters_to_ignore
            yield from ((p, "all") for name, p in module.module.named_parameters() if name not in ignored)
            continue
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                continue
            mesh, placements = parameter.device_mesh, parameter.placements
            where = mesh.get_coordinate() or ()
            if any(isinstance(p, Replicate) and mesh.size(dim) > 1 for dim, p in enumerate(placements)):
                shard = [str(at) for at, placed in zip(where, placements, strict=True) if not isinstance(placed, Replicate)]
                yield parameter.to_local(), f"{','.join(shard)}/{mesh.size()}"
