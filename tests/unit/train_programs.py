"""Processes that train: a few are started once and play rank after rank of small attempts against a real node agent."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection as Pipe
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.stores.open import open_store
from ray_dr.train import collectives, fence
from ray_dr.train.context import Context, Control
from ray_dr.train.link import Link
from ray_dr.train.state import bytes_of, flatten

TOKEN = b"the job's token"
GUARD_S = 90.0
"""A rank that has not answered by then hangs."""

SELDOM = Cadence(0, 1000, 0)

Program = Callable[[Context], Any]


class RankError(Exception):
    """What a rank raised: `Name: text`."""


class Ranks:
    """`count` processes; `play` runs a program in an attempt of up to so many ranks and gives each rank's result."""

    def __init__(self, count: int, store_url: str) -> None:
        from ray_dr.actors.node_agent import Agent  # the ranks shall not import Ray

        context = multiprocessing.get_context("forkserver")  # torch is imported once for all ranks
        context.set_forkserver_preload([__name__])
        self.agent = Agent("node-a", "127.0.0.1", store_url, TOKEN)
        self._store_url = store_url
        self._numbers = itertools.count(1)
        self._attempt = 0
        self._over, self._often = threading.Event(), False
        threading.Thread(target=self._complete, daemon=True).start()
        self._pipes: list[Pipe] = []
        self._processes = []
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._rendezvous = [answer(pipe) for pipe in self._pipes]

    def play(self, world: int, program: Program, *, origin: Origin | None = None, deterministic: bool = False,
             cadence: Cadence = SELDOM, seed: int = 0, **settings: Any) -> list[Any]:  # fmt: skip
        """Each rank's result, by rank. Raises RankError with the first rank's exception."""
        attempt = self._attempt = next(self._numbers)
        self._often = cadence is not SELDOM
        for rank in range(world):
            assignment = Assignment(
                "job", attempt, f"worker-{attempt}-{rank}", rank, world, rank, self._rendezvous[0],
                self.agent.address, (), origin, cadence, "gloo", deterministic, seed, 4, self._store_url, settings,
                {"store": 1}, local_world=world,
            )  # fmt: skip
            self._pipes[rank].send((assignment, program))
        answers = [attempted(pipe) for pipe in self._pipes[:world]]
        for found in answers:
            if isinstance(found, RankError):
                raise found
        return answers

    def _complete(self) -> None:
        """As a supervisor does: tell the agent which versions are whole. Of programs that save once only, all of them stay."""
        while not self._over.wait(0.005):
            parts = Counter((one.version, one.world) for one in self.agent.vault.held() if self._often)
            for version in sorted(version for (version, world), count in parts.items() if count == world):
                self.agent.vault.completed(version)

    def newest(self, world: int) -> Origin:
        """The newest version the agent holds, to go on from."""
        deadline = time.monotonic() + GUARD_S
        while True:  # what the ranks sent last may still be on its way to the agent
            assert self.agent.writer.settle(GUARD_S)
            held = self.agent.vault.held()
            version = max(one.version for one in held)
            if version.attempt == self._attempt and sum(one.version == version for one in held) == world:
                break
            assert time.monotonic() < deadline, f"not all {world} parts of {version} arrived"
        self.agent.vault.begin(version)
        return Origin(version, world, {str(rank): (self.agent.address,) for rank in range(world)})

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._over.set()
        self.agent.close()


def answer(pipe: Pipe) -> Any:
    assert pipe.poll(GUARD_S), "a rank hangs"
    return pipe.recv()


def attempted(pipe: Pipe) -> Any:
    good, result = answer(pipe)
    return result if good else RankError(result)


def _serve(pipe: Pipe) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = collectives.host_store("127.0.0.1")
    pipe.send(f"127.0.0.1:{store.port}")
    while True:
        task = pipe.recv()
        try:
            pipe.send((True, _attempt(store, *task)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


def _attempt(store: Any, a: Assignment, program: Program) -> Any:
    torch.use_deterministic_algorithms(a.deterministic)
    link = Link(a.agent, TOKEN, a.worker, os.getpid())
    collectives.join(a.rendezvous, store, attempt=a.attempt, rank=a.rank, world=a.world, backend=a.backend)
    ctx = Context(a, link, Control(a.attempt, a.cadence), TOKEN, open_store(a.store_url))
    try:
        found = program(ctx)
        ctx.close()
        return found
    finally:
        collectives.leave()
        link.close()


# ------------------------------------------------------------------------------------------------------------ programs


class Rows:
    """Samples (x, y) of shapes (6,) and (5,), a function of their index."""

    def __init__(self, count: int = 37) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = torch.randn(count, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def network(dropout: float = 0.0) -> nn.Sequential:
    """Sizes that divide evenly by no number of ranks."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Dropout(dropout), nn.Linear(7, 5))


def wrap(model: nn.Sequential, kind: str) -> nn.Module:
    world = dist.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2, world // 2) if kind == "hybrid" else (world,),
                            mesh_dim_names=("replicas", "shards") if kind == "hybrid" else ("shards",))  # fmt: skip
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)
    return model


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1.0)
    if name == "momentum":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=name == "amsgrad")


def fit(ctx: Context) -> dict[str, Any]:
    """Train for `steps` steps; the whole state as arrays, and the dataset indices used, per step."""
    want = ctx.settings
    model = wrap(network(float(want.get("dropout", 0.0))), str(want["kind"]))
    optimizer = optimizer_of(model, str(want.get("optimizer", "adamw")))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4, 4], gamma=0.5)
    micro = int(want["micro"]) if "micro" in want else None
    data = ctx.data(Rows(), global_batch=int(want["batch"]), micro_batches=micro)
    state = ctx.restore(model=model, optimizer=optimizer, scheduler=scheduler)
    for batch in ctx.steps(state, until=int(want["steps"])):
        for x, y in ctx.micro_batches(batch):
            nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {"tensors": whole_tensors(ctx, state.objects), "step": state.step, "position": data.position,
            "records": ctx._window, "lr": scheduler.get_last_lr()}  # fmt: skip


def whole_tensors(ctx: Context, objects: Mapping[str, Any]) -> dict[str, bytes]:
    """Every named tensor of the state, gathered from all ranks: its bytes."""
    found = {}
    named = dict(flatten(objects, rank=ctx.world.rank, world=ctx.world.size).tensors)
    for name, tensor in _live_tensors(objects).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = bytes(bytes_of(whole.detach()))
    assert found.keys() == named.keys()
    return found


def _live_tensors(objects: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    model, optimizer = objects["model"], objects["optimizer"]
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found = {f"model/{key}": tensor for key, tensor in inner.state_dict().items()}
    for key, parameter in inner.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"optimizer/state/{key}/{slot}"] = value
    return found


def digest(tensors: Mapping[str, bytes]) -> str:
    """One hash over all names and bytes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode() + tensors[name])
    return state.hexdigest()


def walk(ctx: Context) -> None:
    """Steps with a collective each, for as long as `steps` says; errors of the program's own are swallowed. With `behind`,
    saves are copied while training goes on, however small."""
    if ctx.settings.get("behind"):
        fence.AT_ONCE_BYTES = 1
    model = wrap(network(), "ddp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ctx.data(Rows(), global_batch=8)
    state = ctx.restore(model=model, optimizer=optimizer)
    try:
        for x, y in ctx.steps(state, until=int(ctx.settings["steps"])):
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if ctx.settings.get("raise_at") == state.step:
                raise ValueError(f"bad luck at 0x{id(model):x}")
    except ArithmeticError:
        pass


def misuse(ctx: Context) -> None:
    """Takes a step's micro-batches for a batch."""
    model = wrap(network(), "ddp")
    ctx.data(Rows(), global_batch=8, micro_batches=4)
    for x, y in ctx.steps(ctx.restore(model=model), until=1):
        nn.functional.mse_loss(model(x), y).backward()


def linger(ctx: Context) -> None:
    """Never restores, and hears of no abort."""
    threading.Event().wait()


def host_session(pipe: Pipe, name: str, agent: str, program: Program) -> None:
    """A worker process without Ray: a session that does what the pipe says, one (method, arguments) at a time."""
    from ray_dr.train.session import Session

    session = Session(name, agent, TOKEN, "127.0.0.1", program)
    pipe.send(session.rendezvous)
    while True:
        method, arguments = pipe.recv()
        pipe.send(getattr(session, method)(*arguments))
