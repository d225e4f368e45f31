"""Training state to bytes and back, in one process: what is kept, what is refused, and that nothing is half loaded."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ray_dr.checkpoint.reader import MemorySource, read_state
from ray_dr.checkpoint.restore_plan import build_index
from ray_dr.checkpoint.save_plan import plan_save
from ray_dr.errors import IncompatibleState, UnsupportedState
from ray_dr.model.checkpoint import Chunk, Part, VersionId
from ray_dr.model.data import Order
from ray_dr.repository.chunks import chunk_id
from ray_dr.train.data import Data
from ray_dr.train.restore import _buffers
from ray_dr.train.staging import Copy, Planner, pieces, stage
from ray_dr.train.state import Flat, Flattener, Target, bytes_of, flatten

Objects = Mapping[str, Any]


def save(objects: Objects, world: int = 1) -> list[tuple[Part, memoryview]]:
    """The parts of `world` data-parallel ranks that hold the same objects."""
    parts = []
    for rank in range(world):
        flat = flatten(objects, rank=rank, world=world)
        plan = plan_save((local.leaf for local in flat.tensors.values()), rank=rank, world=world)
        slot = memoryview(bytearray(plan.size))
        stage(plan, flat, slot)
        chunks = (Chunk(chunk_id(slot), 0, plan.size),) if plan.size else ()
        scalars = json.loads(json.dumps(flat.scalars, allow_nan=False))
        part = Part(VersionId(1, 1), rank, world, plan.size, plan.shards, chunks, scalars)
        parts.append((part, slot))
    return parts


def load(saved: list[tuple[Part, memoryview]], objects: Objects) -> None:
    """What `train.restore` does, with the parts at hand."""
    parts = [part for part, _ in saved]
    target = Target(objects, build_index(parts), parts[0].scalars, rank=0, world=1)
    buffers, late = _buffers(target)
    sources = {part.rank: [MemorySource(slot)] for part, slot in saved}
    read_state(parts, buffers, sources, on_corrupt=lambda error: pytest.fail(str(error)))
    for tensor, staged in late:
        tensor.copy_(staged)
    target.check_shared()
    target.apply()


def tensors_of(objects: Objects) -> dict[str, bytes]:
    found = flatten(objects, rank=0, world=1).tensors
    return {name: bytes(bytes_of(local.tensor)) for name, local in found.items()}


class Bag:
    """Any state, as an object of the user's."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Buffers(nn.Module):
    """A module with one buffer per given tensor."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def model_of(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Of the same strides, also where these leave gaps."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(4, 3)
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


BITS = torch.tensor([0x7FC00001, -0x400001, 0x7F800001, 0x7F800000, -0x80000000], dtype=torch.int32)
TENSORS = {
    "nan_payloads": BITS.view(torch.float32),
    "bf16": torch.randn(3, 2).bfloat16(),
    "fp16": torch.randn(7).half(),
    "fp64": torch.randn(2, 2, 2).double(),
    "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    "bools": torch.tensor([True, False, True]),
    "bytes": torch.arange(-4, 4, dtype=torch.int8),
    "words": torch.tensor([2**63 - 1, -(2**63)]),
    "complex": torch.randn(3, dtype=torch.complex64),
    "complex_wide": torch.randn(2, 2, dtype=torch.complex128),
    "number": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "empty_inside": torch.empty(3, 0),
    "transposed": torch.randn(3, 5).t(),
    "strided": torch.randn(8)[::2],
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("world", [1, 3])
def test_every_kind_of_tensor_comes_back_bit_for_bit(world: int) -> None:
    fresh = Buffers({name: empty_like(tensor) for name, tensor in TENSORS.items()})
    load(save({"model": Buffers(TENSORS)}, world), {"model": fresh})
    for name, tensor in TENSORS.items():
        back = getattr(fresh, name)
        assert bytes(bytes_of(back)) == bytes(bytes_of(tensor)), name
        assert back.stride() == tensor.stride(), name


def test_a_lazily_conjugated_tensor_is_stored_as_the_values_it_shows() -> None:
    tensor = torch.randn(3, dtype=torch.complex64)
    fresh = Buffers({"c": torch.zeros(3, dtype=torch.complex64)})
    load(save({"model": Buffers({"c": tensor.conj()})}), {"model": fresh})
    assert torch.equal(fresh.c, tensor.conj().resolve_conj())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_takes_the_same_next_steps(name: str) -> None:
    def fresh() -> dict[str, Any]:
        model = model_of()
        optimizer = OPTIMIZERS[name](model.parameters())
        return {"model": model, "optimizer": optimizer, "scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9)}

    first, second = fresh(), fresh()
    torch.manual_seed(1)
    train(*first.values(), steps=3)
    load(save(first, world=2), second)
    assert tensors_of(second) == tensors_of(first)
    for objects in (first, second):
        torch.manual_seed(2)
        train(*objects.values(), steps=3)
    assert tensors_of(second) == tensors_of(first)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 4, 4], gamma=0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 9)], milestones=[2]
    ),
}


# torch's SequentialLR steps its schedulers with the deprecated epoch argument.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_restored_scheduler_gives_the_same_next_rates(name: str) -> None:
    def fresh() -> tuple[dict[str, Any], Any]:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        scheduler = SCHEDULERS[name](optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}, scheduler

    (first, scheduler), (second, restored) = fresh(), fresh()
    train(*first.values(), steps=3)
    load(save(first), second)
    assert restored.get_last_lr() == scheduler.get_last_lr()
    for _ in range(4):
        for objects in (first, second):
            train(*objects.values(), steps=1)
        assert restored.get_last_lr() == scheduler.get_last_lr()


def test_a_plateau_scheduler_comes_back_with_its_infinities() -> None:
    def fresh() -> tuple[dict[str, Any], lr_scheduler.ReduceLROnPlateau]:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"scheduler": scheduler}, scheduler

    (first, scheduler), (second, restored) = fresh(), fresh()
    assert math.isinf(scheduler.best)
    load(save(first), second)
    assert restored.best == math.inf
    assert restored.state_dict() == scheduler.state_dict()


def test_nested_values_come_back_with_their_types_and_tensors() -> None:
    state = {
        "floats": [1.5, -0.0, math.inf, -math.inf, 1e-320], "pair": (1, (2, "x")), "none": None, "yes": True,
        "big": 2**80, "by_number": {1: "a", (2, 3): torch.tensor([7])}, "$odd": {"$tensor": "not one"},
        "counter": Counter({4: 2, 9: 1}), "deep": [{"t": torch.ones(2, 2)}], "empty": {}, "text": "\ud800 é",
    }  # fmt: skip
    fresh = Bag({})
    load(save({"bag": Bag(state)}, world=2), {"bag": fresh})
    back = fresh.state
    assert torch.equal(back["by_number"].pop((2, 3)), torch.tensor([7]))
    assert torch.equal(back["deep"][0].pop("t"), torch.ones(2, 2))
    expected = copy.deepcopy(state)
    del expected["by_number"][(2, 3)], expected["deep"][0]["t"]
    assert back == expected
    assert math.copysign(1, back["floats"][1]) == -1
    assert isinstance(back["counter"], Counter)


def test_tensors_under_keys_that_read_the_same_are_kept_apart() -> None:
    fresh = Bag({})
    load(save({"bag": Bag({1: torch.tensor(1), "1": torch.tensor(2)})}), {"bag": fresh})
    assert (fresh.state[1].item(), fresh.state["1"].item()) == (1, 2)


def test_a_nan_among_numbers_is_still_a_nan() -> None:
    fresh = Bag({})
    load(save({"bag": Bag({"loss": math.nan})}), {"bag": fresh})
    assert math.isnan(fresh.state["loss"])


def test_parameters_of_the_same_name_in_two_modules_keep_their_own_optimizer_state() -> None:
    def fresh() -> dict[str, Any]:
        actor, critic = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizer = torch.optim.AdamW([*actor.parameters(), *critic.parameters()], lr=0.1)
        return {"actor": actor, "critic": critic, "optimizer": optimizer}

    first, second = fresh(), fresh()
    (first["actor"](torch.ones(1, 2)).sum() + 5 * first["critic"](torch.ones(1, 2)).sum()).backward()
    first["optimizer"].step()
    load(save(first), second)
    for mine, theirs in zip(second["optimizer"].state.values(), first["optimizer"].state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])


def test_tied_weights_stay_tied() -> None:
    def fresh() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        return model

    first, second = fresh(), fresh()
    load(save({"model": first}), {"model": second})
    assert second["a"].weight is second["b"].weight
    assert torch.equal(second["a"].weight, first["a"].weight)


def test_an_optimizer_that_is_ahead_loses_what_the_checkpoint_does_not_have() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    untouched = save({"model": model, "optimizer": optimizer})
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    load(untouched, {"model": model, "optimizer": optimizer})
    assert not any(optimizer.state.get(parameter) for parameter in model.parameters())


def test_all_differences_are_listed_and_nothing_is_overwritten() -> None:
    data = Data(range(50), global_batch=4, micro_batches=None, order=Order(50, 1))
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    other = model_of(width=6).double()
    wanted = {"model": other, "optimizer": torch.optim.SGD([{"params": [p]} for p in other.parameters()], lr=1.0),
              "ema": Bag({}),
              "data": Data(range(60), global_batch=8, micro_batches=None, order=Order(60, 2))}  # fmt: skip
    before = tensors_of({"model": other})
    with pytest.raises(IncompatibleState) as raised:
        load(save({"model": model, "optimizer": optimizer, "data": data, "sampler": Bag({"x": 1})}), wanted)
    found = "\n".join(raised.value.differences)
    for words in (
        "model/0.weight: shape [5, 3] in the checkpoint, [6, 3] in the program",
        "model/0.weight: dtype float32 in the checkpoint, float64 in the program",
        "optimizer: 1 parameter groups in the checkpoint, 6 in the program",
        "ema: the program restores it, the checkpoint does not have it",
        "sampler: the checkpoint has it, the program does not restore it",
        "data/global_batch: 4 in the checkpoint, 8 in the program",
        "data/samples: 50 in the checkpoint, 60 in the program",
        "data/seed: 1 in the checkpoint, 2 in the program",
    ):
        assert words in found
    assert tensors_of({"model": other}) == before
    assert wanted["data"].position == 0


def test_parameters_that_moved_between_groups_are_a_difference() -> None:
    model = nn.Linear(2, 1)
    first = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=1.0)
    second = torch.optim.SGD([{"params": [model.bias]}, {"params": [model.weight]}], lr=1.0)
    with pytest.raises(IncompatibleState, match="group 0 has bias in the program, not in the checkpoint"):
        load(save({"model": model, "optimizer": first}), {"model": model, "optimizer": second})


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"not": "a tensor"}


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bag": Bag({"list": [1, {2}]})}, "bag/list/1: a set cannot be stored without pickle"),
        ({"bag": Bag({"when": Counter})}, "bag/when: a type cannot be stored"),
        ({"step": 7}, "step: int has no state_dict"),
        ({"model": nn.Sequential(Extra(1, 1))}, "model/0._extra_state: a dict in a module's state_dict"),
        ({"model": Buffers({"s": torch.eye(2).to_sparse()})}, "model/s: a torch.sparse_coo tensor"),
        ({"model": Buffers({"m": torch.empty(2, device="meta")})}, "model/m: a meta tensor"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(objects: Objects, message: str) -> None:
    with pytest.raises(UnsupportedState, match=message.replace("(", r"\(")):
        flatten(objects, rank=0, world=1)


def test_the_save_plan_is_made_once_for_a_state_that_stays_the_same() -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    objects = {"model": model, "optimizer": optimizer}
    planner = Planner(0, 1)
    first = planner.plan(flatten(objects, rank=0, world=1))
    assert planner.plan(flatten(objects, rank=0, world=1)) is first
    train(model, optimizer, lr_scheduler.ExponentialLR(optimizer, 1.0), 1)
    assert planner.plan(flatten(objects, rank=0, world=1)).size > first.size


class Tied(nn.Module):
    """Modules with a tied weight, a buffer, and an integer among an optimizer's state."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.two.weight = self.one.weight


def trained() -> dict[str, Any]:
    """A tied model after a step, its optimizer with a number in its state, and a user's object with a tensor."""
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model.two(model.norm(model.one(torch.ones(2, 4)))).sum().backward()
    optimizer.step()
    optimizer.state[model.one.bias]["count"] = 1
    return {"model": model, "optimizer": optimizer, "bag": Bag({"mean": torch.ones(3), "n": 1})}


def plain(flat: Flat) -> Any:
    """All there is in a flat state: descriptions, places in memory and in which form, scalars."""
    seen = {name: (each.leaf, each.tensor.data_ptr(), each.tensor.stride()) for name, each in flat.tensors.items()}
    return list(seen.items()), flat.scalars


NEW_NUMBERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda o: None,
    "rate": lambda o: o["optimizer"].param_groups[0].update(lr=0.5),
    "count": lambda o: o["optimizer"].state[o["model"].one.bias].update(count=2),
    "bag's number": lambda o: o["bag"].state.update(n=2),
    "values": lambda o: o["optimizer"].step(),
}
NEW_TENSORS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "data swapped": lambda o: setattr(o["model"].one.bias, "data", torch.zeros(4)),
    "data turned": lambda o: setattr(o["model"].one.weight, "data", o["model"].one.weight.data.t()),
    "data in another form": lambda o: setattr(o["model"].one.bias, "data", o["model"].one.bias.data.view(2, 2)),
    "data of another type": lambda o: setattr(o["model"].norm.running_mean, "data",
                                              o["model"].norm.running_mean.data.view(torch.int32)),
    "untied": lambda o: setattr(o["model"].two, "weight", nn.Parameter(torch.zeros(4, 4))),
    "tied": lambda o: setattr(o["model"].two, "bias", o["model"].one.bias),
    "buffer added": lambda o: o["model"].register_buffer("more", torch.zeros(2)),
    "buffer taken": lambda o: o["model"].norm.register_buffer("running_mean", None),
    "renamed": lambda o: o["model"].add_module("three", o["model"].__dict__["_modules"].pop("two")),
    "state replaced": lambda o: o["optimizer"].state[o["model"].one.bias].update(exp_avg=torch.zeros(4)),
    "state renamed": lambda o: o["optimizer"].state[o["model"].one.bias].update(
        other=o["optimizer"].state[o["model"].one.bias].pop("exp_avg")),
    "state gone": lambda o: o["optimizer"].state.pop(o["model"].one.bias),
    "number became a tensor": lambda o: o["optimizer"].state[o["model"].one.bias].update(count=torch.ones(1)),
    "parameter of the optimizer's own": lambda o: o["optimizer"].add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "bag's tensor": lambda o: o["bag"].state.update(mean=torch.ones(3)),
    "bag's tensor renamed": lambda o: o["bag"].state.update(other=o["bag"].state.pop("mean")),
    "another object": lambda o: o.update(second=nn.Linear(2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("change", [*NEW_NUMBERS, *NEW_TENSORS])
def test_what_is_kept_of_a_description_is_what_a_new_one_would_be(change: str) -> None:
    objects = trained()
    flattener = Flattener(0, 2)
    before = flattener.flatten(objects)
    (NEW_NUMBERS | NEW_TENSORS)[change](objects)
    after = flattener.flatten(objects)
    assert plain(after) == plain(flatten(objects, rank=0, world=2))
    assert (after.tensors is before.tensors) == (change in NEW_NUMBERS)


def test_a_description_that_failed_is_not_taken_for_the_one_before() -> None:
    objects = trained()
    flattener = Flattener(0, 1)
    flattener.flatten(objects)
    objects["model"].norm.running_mean = torch.zeros(4).to_sparse()
    for _ in range(2):
        with pytest.raises(UnsupportedState, match=r"model/norm\.running_mean"):
            flattener.flatten(objects)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.float64])
def test_small_and_large_pieces_in_every_form_have_the_bytes_of_their_tensors(dtype: torch.dtype) -> None:
    base = torch.arange(400_000).to(dtype)
    held = {
        "words": base[:64], "odd": base[:33], "late": base[1:65], "single": base[7], "turned": base[:64].view(8, 8).t(),
        "every other": base[:64:2], "large": base, "empty": base[:0], "conjugated": base[:64].conj(),
    }  # fmt: skip
    bag = Bag(held)
    flat = flatten({"bag": bag}, rank=0, world=1)
    plan = Planner(0, 1).plan(flat)
    slot = memoryview(bytearray(b"\xaa" * plan.size))
    stage(plan, flat, slot)
    end = 0
    for shard in plan.shards:
        assert not any(slot[end : shard.at]), "gaps are zero"
        end = shard.at + shard.box.size
    kept = Copy(pieces(plan, flat), slot)
    for _ in range(2):
        for shard in plan.shards:
            tensor = flat.tensors[shard.box.name].tensor
            assert slot[shard.at : shard.at + shard.box.size] == bytes_of(tensor), shard.box.name
        base.copy_(base.flip(0))
        kept.run()
