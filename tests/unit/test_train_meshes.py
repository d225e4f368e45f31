"""Real processes, every way of cutting a model over a mesh: saved on one, restored on another, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ray_dr.checkpoint.save_plan import plan_save
from ray_dr.train.context import Context
from ray_dr.train.leaves import describe
from ray_dr.train.state import flatten
from tests.unit.train_programs import RankError, Ranks, whole_tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(4, f"file://{tmp_path_factory.mktemp('store')}")
    yield started
    started.close()


def model_of(seed: int, width: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, 5))


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


def spread(model: nn.Module, mesh: DeviceMesh, *placements: Any) -> None:
    """Every parameter as a DTensor; a dim that a tensor lacks is its dim 0."""
    for layer in model.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            fitting = [Shard(min(p.dim, parameter.dim() - 1)) if isinstance(p, Shard) else p for p in placements]
            setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, fitting)))


def cut(model: nn.Sequential, kind: str) -> None:
    world = dist.get_world_size()
    half = 2 if world % 2 == 0 else 1
    if kind == "fsdp":
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh_of(world))
    elif kind == "hsdp":
        fully_shard(model, mesh=mesh_of(half, world // half))
    elif kind == "fsdp tp":
        mesh = mesh_of(half, world // half)
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh["outer"])
    elif kind == "columns":
        spread(model, mesh_of(world), Shard(1))
    elif kind == "grid":
        spread(model, mesh_of(half, world // half), Shard(0), Shard(1))
    elif kind == "rows twice":
        spread(model, mesh_of(half, world // half), Shard(0), Shard(0))
    elif kind == "columns of replicas":
        spread(model, mesh_of(half, world // half), Replicate(), Shard(1))
    elif kind == "partial":
        spread(model, mesh_of(world), Replicate())
        model[0].weight = nn.Parameter(DTensor.from_local(model[0].weight.to_local(), mesh_of(world), [Partial()]))


def hold(ctx: Context) -> dict[str, Any]:
    """Make a state, or restore one, and save it: every tensor whole, and the bytes this rank wrote and held."""
    want = ctx.settings
    model = model_of(int(want["start"]), int(want.get("width", 8)))
    cut(model, str(want["kind"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if want["kind"] != "partial":
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    state = ctx.restore(model=model, optimizer=optimizer)
    written: list[int] = []
    staged = ctx._link.staged
    vars(ctx._link)["staged"] = lambda slot, part, **rest: (
        written.append(sum(shard.box.size for shard in part.shards)), staged(slot, part, **rest)
    )  # fmt: skip
    for _ in ctx.steps(state, until=state.step + 1):
        pass
    cuts = {type(place).__name__ for p in model.parameters() if isinstance(p, DTensor) for place in p.placements}
    leaf = describe("w", model[0].weight, ctx.world.rank, ctx.world.size).leaf
    dist.barrier()  # a rank that leaves early closes sockets that others may still be opening
    return {"tensors": whole_tensors(ctx, state.objects), "wrote": written[-1], "cuts": cuts, "leaf": leaf}


def hold_tied(ctx: Context) -> tuple[list[list[float]], bool, int]:
    """Tied layers, fully sharded: their weight, whether they are tied, and the bytes of every rank's part."""
    torch.manual_seed(int(ctx.settings["start"]))
    model = nn.Sequential(nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False))
    model[1].weight = model[0].weight
    fully_shard(model, mesh=mesh_of(dist.get_world_size()))
    state = ctx.restore(model=model)
    flat = flatten(state.objects, rank=ctx.world.rank, world=ctx.world.size)
    size = plan_save([local.leaf for local in flat.tensors.values()], rank=ctx.world.rank, world=ctx.world.size).size
    for _ in ctx.steps(state, until=state.step + 1):
        pass
    weights = [layer.weight.full_tensor().tolist() for layer in model]
    dist.barrier()
    return weights[0], weights[0] == weights[1], size


KINDS = ("plain", "fsdp", "hsdp", "fsdp tp", "columns", "grid", "rows twice", "columns of replicas")


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_over_four_ranks_comes_back_in_every_other(ranks: Ranks, kind: str) -> None:
    saved = ranks.play(4, hold, kind=kind, start=1)
    origin = ranks.newest(4)
    whole = saved[0]["tensors"]
    assert sum(result["wrote"] for result in saved) == sum(map(len, whole.values()))  # each byte by one rank
    for other in KINDS:
        for result in ranks.play(4, hold, kind=other, start=2, origin=origin)[:1]:
            assert result["tensors"] == whole, other


@pytest.mark.parametrize("kind", ["fsdp", "columns", "grid", "rows twice", "fsdp tp"])
def test_uneven_cuts_come_back_on_one_two_and_three_ranks(ranks: Ranks, kind: str) -> None:
    width = 12 if kind == "fsdp tp" else 7
    saved = ranks.play(3 if kind != "fsdp tp" else 4, hold, kind=kind, start=1, width=width)
    origin = ranks.newest(len(saved))
    for world in (1, 2, 3):
        for result in ranks.play(world, hold, kind=kind, start=2, width=width, origin=origin):
            assert result["tensors"] == saved[0]["tensors"]


def test_fully_sharded_tensor_parallel_layers_are_strided_and_still_one_box(ranks: Ranks) -> None:
    results = ranks.play(4, hold, kind="fsdp tp", start=1)
    assert "_StridedShard" in results[0]["cuts"]
    assert [result["leaf"].boxes[0].offsets for result in results] == [(0, 0), (4, 0), (2, 0), (6, 0)]


def test_tied_layers_that_are_fully_sharded_are_written_once_and_stay_tied(ranks: Ranks) -> None:
    saved = ranks.play(3, hold_tied, start=1)
    assert sum(size for _, _, size in saved) == 7 * 7 * 4
    for found in ranks.play(2, hold_tied, start=2, origin=ranks.newest(3)):
        assert found[:2] == (saved[0][0], True)


def test_the_replicas_of_a_hybrid_mesh_share_the_writing(ranks: Ranks) -> None:
    results = ranks.play(4, hold, kind="hsdp", start=1, width=128)
    assert [result["leaf"].holders for result in results] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    wrote = [result["wrote"] for result in results]
    for one, other in ((0, 2), (1, 3)):
        assert max(wrote[one], wrote[other]) <= 1.1 * min(wrote[one], wrote[other])


def test_a_partial_sum_is_refused_at_the_start_by_its_name(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"UnsupportedState: model/0.weight: placement .*\(call redistribute first\)"):
        ranks.play(2, hold, kind="partial", start=1)
