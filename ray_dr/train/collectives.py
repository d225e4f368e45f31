"""The process group of one attempt: forming it, breaking it from outside, and summing gradients exactly.

**Weights.** With a fixed global batch of B samples and ranks that may hold unequal shares n_r, the right gradient is
the sum over ranks of (n_r / B) * mean gradient, which DDP's and FSDP's plain average over ranks is not. DDP's
communication hook and FSDP2's custom reduce-scatter, both public, let us weight and then sum. (algorithms: "exact
global batch for any world")

**Determinism.** Floating-point sums depend on their order. `deterministic: true` gives every micro-batch its own
backward pass and adds their gradients one after the other in the order of the micro-batches, whoever computed them:
((0 + g0) + g1) + ... is the same bits on 1, 2 or 64 ranks. Each rank owns a slice of the sum: pieces travel by
all-to-all, are added in rank order, and the result is gathered. Traffic is that of one all-reduce per *round* of
micro-batches instead of one per step.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket, PrefixStore, TCPStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.nn.parallel import DistributedDataParallel

from ray_dr.errors import ConfigError

GROUP_TIMEOUT = datetime.timedelta(minutes=30)
JOIN_TIMEOUT = datetime.timedelta(seconds=60)
# torch 2.13 renamed these two and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# --------------------------------------------------------------------------------------------------- the group's life


def host_store(host: str) -> TCPStore:
    """A rendezvous store in this process, for every attempt in which it is rank 0. One prefix per attempt."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=JOIN_TIMEOUT)


def join(address: str, own: TCPStore, *, attempt: int, rank: int, world: int, backend: str) -> None:
    """Form the attempt's default group through rank 0's store at `address`."""
    host, _, port = address.rpartition(":")
    store = own if rank == 0 else TCPStore(host, int(port), is_master=False, timeout=JOIN_TIMEOUT)
    prefixed = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world, timeout=GROUP_TIMEOUT)


def leave() -> tuple[Any, ...]:
    """End the default group; its sockets close, so that peers notice.

    To be kept until everything that refers to groups is collected: the end of DDP's reducer, were it the last to refer to one,
    would wait for that group's threads without letting go of Python's lock, and they may wait for the lock.
    """
    groups = _groups()
    if groups:
        with contextlib.suppress(RuntimeError):  # a broken group may complain
            dist.destroy_process_group()
    return groups


class Breaker:
    """Unblocks a thread that waits in a collective, from another thread.

    gloo has no abort that wakes waiters (torch 2.13: `abort()` returns and they wait on). Its pairs, though, live in an
    epoll instance of its own, and shutting their sockets down makes every pending operation raise at once. Ours are
    the epoll instances that did not exist before the attempt; listening sockets are left alone (gloo would end the
    process). NCCL has a working abort.
    """

    def __init__(self) -> None:
        self._before = frozenset(_epolls())

    def abort(self, rendezvous: str) -> int:
        """Break every collective of this process; the number of sockets that were shut down."""
        for group in _groups():
            with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
                group._get_backend(torch.device("cuda" if torch.cuda.is_available() else "cpu")).abort()
        broken = sum(_shutdown(fd) for epoll in set(_epolls()) - self._before for fd in _watched(epoll))
        return broken + sum(_shutdown(fd) for fd in _connected_to(rendezvous))


def is_collective_error(error: BaseException) -> bool:
    """Whether an exception is the echo of somebody else's death rather than this rank's own fault."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = (
        "gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe",
        "Socket closed",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _groups() -> tuple[Any, ...]:
    if not dist.is_initialized():
        return ()
    return tuple(dist.distributed_c10d._world.pg_map)


def _fds() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield int(name), os.readlink(f"/proc/self/fd/{name}")


def _epolls() -> Iterator[int]:
    return (fd for fd, target in _fds() if "eventpoll" in target)


def _watched(epoll: int) -> tuple[int, ...]:
    try:
        with open(f"/proc/self/fdinfo/{epoll}") as info:
            return tuple(int(line.split()[1]) for line in info if line.startswith("tfd:"))
    except OSError:
        return ()


def _connected_to(address: str) -> tuple[int, ...]:
    host, _, port = address.rpartition(":")
    found = []
    for fd, target in _fds():
        if not target.startswith("socket:"):
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            if sock.getpeername()[:2] == (host, int(port)):
                found.append(fd)
    return tuple(found)


def _shutdown(fd: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True


class Arrival:
    """When this rank had all its own gradients in a step: then it has but to wait for the others.

    Seen at the parameter whose gradient comes last in a backward pass, which is the module's first; what sums gradients over
    ranks meanwhile (DDP's buckets) does not hold the pass up. Parameters on a GPU tell nothing: their gradients are only
    on their way then.
    """

    def __init__(self) -> None:
        self.at: float | None = None

    def watch(self, module: nn.Module) -> None:
        """Look at this module's backward passes."""
        first = next((parameter for parameter in module.parameters() if parameter.requires_grad), None)
        if first is not None and first.device.type == "cpu":
            first.register_post_accumulate_grad_hook(self._come)  # type: ignore[no-untyped-call]

    def since(self, begun: float) -> float | None:
        """Seconds from `begun` (monotonic) until the last pass had all gradients; None: there was none since."""
        at, self.at = self.at, None
        return round(at - begun, 6) if at is not None and at >= begun else None

    def _come(self, parameter: torch.Tensor) -> None:
        self.at = time.monotonic()


# ------------------------------------------------------------------------------------------------- summing gradients


class Reducer:
    """Sums gradients over ranks with exact weights. One per attempt; `attach` hooks it into the model's wrapper.

    Before each backward pass, `begin_pass` says what the pass weighs and which round of micro-batches it is.
    """

    def __init__(self, rank: int, world: int, *, deterministic: bool) -> None:
        self.rank, self.world, self.deterministic = rank, world, deterministic
        self.even = False
        """Every rank computes the same share of every step, in one pass. Set before `attach`."""
        self._weight, self._round, self._rounds, self._micro_batches = 1.0, 0, 1, world
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._ddp: list[DistributedDataParallel] = []
        self._sharded: list[FSDPModule] = []
        self._local: list[nn.Module] = []
        self.arrival = Arrival()

    def attach(self, module: nn.Module) -> None:
        """Hook into DDP or FSDP2. A plain module is handled on one rank and left to the program on several."""
        if isinstance(module, DistributedDataParallel) and self.even and not self.deterministic:
            self.arrival.watch(module)
        if isinstance(module, DistributedDataParallel) and self.even and not self.deterministic:
            return  # the plain mean over ranks is right already, and DDP's own reduction makes one pass less
        if isinstance(module, DistributedDataParallel):
            # DDP wants the hook's annotations as objects, not as text: a lambda has none. And it keeps the hook where no garbage
            # collection looks: one that refers to this reducer, and so to the module, would keep the module for ever.
            this = weakref.proxy(self)
            module.register_comm_hook(None, lambda _, bucket: this._ddp_hook(bucket))
            self._ddp.append(module)
        elif any(isinstance(child, FSDPModule) for child in module.modules()):
            self._attach_sharded(module)
        elif self.world == 1:
            self._local.append(module)

    def begin_pass(self, weight: float, round_: int, rounds: int, micro_batches: int) -> None:
        """`weight`: this pass's share of the global batch; rounds count from 0; `micro_batches` in the whole step."""
        self._weight, self._round, self._rounds, self._micro_batches = weight, round_, rounds, micro_batches
        if not self.deterministic:
            for module in self._ddp:
                module.require_backward_grad_sync = round_ == rounds - 1
        if round_ == 0:
            self._sums.clear()

    def end_pass(self) -> None:
        """After a backward pass: modules without a wrapper are summed here."""
        for module in self._local:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._fold_local(parameter)

    @property
    def pads(self) -> bool:
        """Whether every rank must do the same number of passes, also those that have nothing left to compute."""
        return self.deterministic or bool(self._sharded)

    @property
    def _last(self) -> bool:
        return self._round == self._rounds - 1

    def _fold_local(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        if self.deterministic:
            total = self._sums.setdefault(parameter, torch.zeros_like(grad))
            total += grad
            parameter.grad = total / self._micro_batches if self._last else None
            return
        weighted = grad * self._weight
        total = self._sums.setdefault(parameter, torch.zeros_like(grad))
        total += weighted
        parameter.grad = total if self._last else None

    # -- DDP

    def _ddp_hook(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        if not self.deterministic:
            buffer.mul_(self._weight)
            work = dist.all_reduce(buffer, async_op=True)
            summed: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: done.value()[0])
            return summed
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(self._ordered_bucket(bucket))
        return done

    def _ordered_bucket(self, bucket: GradBucket) -> torch.Tensor:
        """Add this round's micro-batches to the running sums, in order; the mean after the last round, else zeros.

        Running sums are kept per parameter, because DDP regroups its buckets after the first backward pass.
        """
        buffer, parameters = bucket.buffer(), bucket.parameters()
        sums = torch.cat([self._sum_of(p, buffer.dtype).reshape(-1) for p in parameters])
        total = self._ordered_sum(sums, buffer)
        for parameter, piece in zip(parameters, torch.split(total, [p.numel() for p in parameters]), strict=True):
            self._sum_of(parameter, buffer.dtype).reshape(-1).copy_(piece)
        if self._last:
            return buffer.copy_(total / self._micro_batches)
        return buffer.zero_()

    def _sum_of(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return self._sums[parameter]

    def _ordered_sum(self, sums: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        """sums + g_0 + g_1 + ... in rank order, element by element; all of shape (n,), the result on every rank."""
        padded = -(-mine.numel() // self.world) * self.world
        start, size = self.rank * padded // self.world, padded // self.world
        pieces = self._exchange(nn.functional.pad(mine, (0, padded - mine.numel())))
        total = nn.functional.pad(sums, (0, padded - sums.numel()))[start : start + size].clone()
        for piece in pieces[: self._present]:
            total += piece
        if self.world == 1:
            return total[: mine.numel()]
        gathered = torch.empty(padded, dtype=mine.dtype, device=mine.device)
        _all_gather(gathered, total)
        return gathered[: mine.numel()]

    @property
    def _present(self) -> int:
        """How many ranks have a real micro-batch in this round: they are the first ones."""
        return min(self.world, self._micro_batches - self._round * self.world)

    def _exchange(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From each rank its values for this rank's slice, in rank order."""
        if self.world == 1:
            return (flat,)
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat)
        return received.chunk(self.world)

    # -- FSDP2

    def _attach_sharded(self, module: nn.Module) -> None:
        for child in module.modules():
            if not isinstance(child, FSDPModule):
                continue
            self._sharded.append(child)
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)
            child.set_custom_reduce_scatter(_ReduceScatter(self))
        if self.world == 1:  # FSDP2 does not call the collective then
            self._local.append(module)

    def reduce_scatter(self, key: torch.Tensor | None, output: torch.Tensor, flat: torch.Tensor,
                       group: dist.ProcessGroup) -> torch.Tensor:  # fmt: skip
        """This rank's slice of the sum over ranks of `flat` into `output`; the running sum to pass in next time."""
        if not self.deterministic:
            flat.mul_(self._weight)
            _reduce_scatter(output, flat, group=group)
            return output
        if group.size() != self.world:
            raise ConfigError("hybrid sharding sums over two groups, in no fixed order", key="deterministic",
                              remedy="use fully_shard over one mesh dimension, or deterministic: false")  # fmt: skip
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat, group=group)
        total = torch.zeros_like(output) if key is None or self._round == 0 else key
        for piece in received.chunk(self.world)[: self._present]:
            total = total + piece
        if self._last:
            output.copy_(total / self._micro_batches)
        else:
            output.zero_()
        return total


class _ReduceScatter(ReduceScatter):
    """FSDP2's custom reduce-scatter (`set_custom_reduce_scatter`) of one parameter group, with its running sum."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._sum: torch.Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, op: Any,
                 async_op: bool = False) -> None:  # fmt: skip
        self._sum = self._reducer.reduce_scatter(self._sum, output_tensor, input_tensor, group)
