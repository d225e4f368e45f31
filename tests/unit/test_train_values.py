"""What can be saved comes back exactly; what cannot is refused by its full name, with what to do instead."""

from __future__ import annotations

import enum
import json
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import lr_scheduler

from ray_dr.checkpoint.described import describe, parse
from ray_dr.checkpoint.save_plan import plan_save
from ray_dr.errors import CheckpointError, UnsupportedState
from ray_dr.repository.parts import read_part, write_part
from ray_dr.stores.memory import MemoryStore
from ray_dr.train.state import flatten
from ray_dr.train.values import decode, encode
from tests.unit.test_train_state import Bag, Buffers, load, save, tensors_of


def there_and_back(state: Any, world: int = 1) -> Any:
    fresh = Bag(None)
    load(save({"bag": Bag(state)}, world), {"bag": fresh})
    return fresh.state


def bits(value: float) -> bytes:
    return struct.pack(">d", value)


def read_bits(hexadecimal: str) -> float:
    return struct.unpack(">d", bytes.fromhex(hexadecimal))[0]


PLAIN = (
    st.none() | st.booleans() | st.binary() | st.integers() | st.text() | st.complex_numbers(allow_nan=False)
    | st.floats(allow_nan=False)
)  # fmt: skip
KEYS = st.text() | st.integers() | st.none() | st.tuples(st.integers(), st.text()) | st.just("$tensor")
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


def same(one: Any, other: Any) -> bool:
    """Equal in type and value all the way down, -0.0 and order of keys included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, complex):
        return same((one.real, one.imag), (other.real, other.imag))
    return bits(one) == bits(other) if isinstance(one, float) else one == other


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_any_tree_of_plain_values_comes_back_the_same(tree: Any) -> None:
    written = json.loads(json.dumps(encode(tree, "bag", {}), allow_nan=False))
    assert same(decode(written, {}), tree)


@pytest.mark.parametrize("bits_of_nan", ["7ff8000000000000", "fff8000000000000", "7ff8000000000123", "7ff0000000000001"])
def test_the_bits_of_a_nan_number_are_kept(bits_of_nan: str) -> None:
    assert bits(there_and_back({"loss": read_bits(bits_of_nan)})["loss"]).hex() == bits_of_nan


def test_integers_of_any_size_are_kept() -> None:
    numbers = [2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**6000, -(7**9999)]
    assert there_and_back(numbers) == numbers


ARRAYS = {
    "negative stride": np.arange(12.0).reshape(3, 4)[::-1, ::-2],
    "column major": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "zero d": np.array(2.5),
    "empty": np.empty((0, 3), np.float32),
    "nan payloads": np.array([0x7FC00001, 0xFF800001, 0x80000000, 1], np.uint32).view(np.float32),
    "unsigned": np.array([2**64 - 1], np.uint64),
    "half": np.array([1.5, -0.0], np.float16),
    "complex": np.array([1 + 2j, complex(-0.0, math.inf)]),
    "bools": np.array([[True], [False]]),
    "read only": np.broadcast_to(np.int16(3), (2, 2)),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("world", [1, 3])
def test_numpy_arrays_come_back_bit_for_bit(name: str, world: int) -> None:
    back = there_and_back({"a": ARRAYS[name]}, world)["a"]
    assert type(back) is np.ndarray
    assert (back.dtype, back.shape, back.tobytes()) == (ARRAYS[name].dtype, ARRAYS[name].shape, ARRAYS[name].tobytes())
    assert back.flags.writeable


@pytest.mark.parametrize("number", [np.float32(0.1), np.int8(-3), np.bool_(True), np.uint64(2**64 - 1), np.float64("nan")])
def test_numpy_numbers_keep_their_type(number: Any) -> None:
    back = there_and_back([number])[0]
    assert (type(back), back.tobytes()) == (type(number), number.tobytes())


def test_mappings_keep_their_order_and_ordered_ones_become_dicts() -> None:
    back = there_and_back({"z": 1, "a": OrderedDict([("y", 1), ("b", 2)]), "d": defaultdict(int, {3: 4}), "c": Counter("ab")})
    assert list(back) == ["z", "a", "d", "c"]
    assert back["a"] == {"y": 1, "b": 2}
    assert list(back["a"]) == ["y", "b"]
    assert back["d"] == {3: 4}
    assert type(back["c"]) is Counter


def test_the_order_of_a_mapping_survives_a_store_and_the_wire() -> None:
    ((part, _),) = save({"bag": Bag({"z": 1, "a": {"y": 2, "b": 3}})})
    store = MemoryStore()
    for back in (read_part(store, write_part(store, "job", part, term=1)), parse(json.loads(json.dumps(describe(part))))):
        assert back == part
        assert json.dumps(back.scalars) == '{"bag": {"z": 1, "a": {"y": 2, "b": 3}}}'


def test_a_tensor_in_two_places_is_stored_once_and_one_again_when_loaded() -> None:
    shared, array = torch.randn(100), np.arange(50.0)
    saved = save({"bag": Bag({"a": shared, "b": [shared], "x": array, "y": array, "view": shared[10:20]})})
    assert saved[0][0].size <= 400 + 400 + 64 * 3
    fresh = Bag(None)
    load(saved, {"bag": fresh})
    assert fresh.state["a"] is fresh.state["b"][0]
    assert np.shares_memory(fresh.state["x"], fresh.state["y"])
    assert torch.equal(fresh.state["a"], shared)
    assert torch.equal(fresh.state["view"], shared[10:20])


def test_a_tensor_that_wants_gradients_does_so_again() -> None:
    back = there_and_back({"w": torch.ones(2, requires_grad=True), "v": torch.ones(2)})
    assert back["w"].requires_grad
    assert not back["v"].requires_grad


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(30, 30, bias=False), "b": nn.Linear(30, 30, bias=False)})
    model["b"].weight = model["a"].weight
    return model


@pytest.mark.parametrize("world", [1, 4])
def test_tied_weights_are_stored_once_and_fit_a_tied_and_an_untied_program(world: int) -> None:
    first = tied()
    saved = save({"model": first}, world)
    assert sum(part.size for part, _ in saved) == 30 * 30 * 4
    again, apart = tied(), nn.ModuleDict({"a": nn.Linear(30, 30, bias=False), "b": nn.Linear(30, 30, bias=False)})
    for fresh in (again, apart):
        load(saved, {"model": fresh})
        assert torch.equal(fresh["a"].weight, first["a"].weight)
        assert torch.equal(fresh["b"].weight, first["a"].weight)
    assert again["a"].weight is again["b"].weight


def test_untied_weights_in_a_program_that_ties_them_are_an_error_unless_they_are_equal() -> None:
    apart = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    with pytest.raises(CheckpointError, match=r"model/[ab]\.weight: shares memory with another tensor"):
        load(save({"model": apart}), {"model": tied_small()})
    apart["b"].weight.data.copy_(apart["a"].weight.data)
    fresh = tied_small()
    load(save({"model": apart}), {"model": fresh})
    assert torch.equal(fresh["a"].weight, apart["a"].weight)


def tied_small() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    return model


def test_views_that_overlap_come_back_right() -> None:
    def of(base: torch.Tensor) -> Buffers:
        return Buffers({"low": base[:6], "high": base[3:], "even": base[::2]})

    first, fresh = of(torch.randn(9)), of(torch.zeros(9))
    load(save({"model": first}), {"model": fresh})
    assert tensors_of({"model": fresh}) == tensors_of({"model": first})
    with pytest.raises(CheckpointError, match="shares memory with another tensor"):
        load(save({"model": Buffers({name: getattr(first, name) + i for i, name in enumerate(("low", "high", "even"))})}),
             {"model": fresh})  # fmt: skip


def test_what_a_users_object_holds_is_one_ranks_and_never_a_mixture() -> None:
    states = [Bag({"rng": torch.full((5000,), rank, dtype=torch.uint8), "rank": rank}) for rank in range(3)]
    plans = []
    for rank, bag in enumerate(states):
        flat = flatten({"model": nn.Linear(40, 50), "bag": bag}, rank=rank, world=3)
        plans.append(plan_save([local.leaf for local in flat.tensors.values()], rank=rank, world=3))
    assert [shard.box.lengths for plan in plans for shard in plan.shards if shard.box.name == "bag/rng"] == [(5000,)]
    assert "bag/rng" in {shard.box.name for shard in plans[0].shards}


class Extra(nn.Linear):
    """Keeps something that it shows as a copy, as layers with 8-bit scales do."""

    seen = 0.0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.seen])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.seen = state.item()


def test_what_a_module_only_shows_as_a_copy_is_handed_back_to_it() -> None:
    first, fresh = nn.Sequential(Extra(2, 2)), nn.Sequential(Extra(2, 2))
    first[0].seen = 7.5
    load(save({"model": first}), {"model": fresh})
    assert fresh[0].seen == 7.5
    assert torch.equal(fresh[0].weight, first[0].weight)


def test_random_generators_go_on_where_they_were() -> None:
    def state() -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state(),
                "generator": np.random.default_rng(3).bit_generator.state}  # fmt: skip

    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    saved = save({"rng": Bag(state())})
    expected = draw()
    fresh = Bag(None)
    load(saved, {"rng": fresh})
    torch.set_rng_state(fresh.state["torch"])
    random.setstate(fresh.state["python"])
    np.random.set_state(fresh.state["numpy"])
    assert draw() == expected
    assert fresh.state["generator"] == np.random.default_rng(3).bit_generator.state


def test_every_scheduler_of_torch_can_be_saved() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1, momentum=0.9)
    every = {
        "lambda": lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        "multiplicative": lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
        "step": lr_scheduler.StepLR(optimizer, 2),
        "constant": lr_scheduler.ConstantLR(optimizer),
        "polynomial": lr_scheduler.PolynomialLR(optimizer),
        "cyclic": lr_scheduler.CyclicLR(optimizer, 0.1, 0.2),
        "chained": lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(optimizer)], optimizer),
        "swa": torch.optim.swa_utils.SWALR(optimizer, 0.05),
    }
    for name, scheduler in every.items():
        load(save({name: scheduler}), {name: scheduler})


class Colour(enum.IntEnum):
    RED = 1


def loop() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["self"] = {"again": found}
    return found


def stray() -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    optimizer.state["steps"] = 3  # type: ignore[index]
    return optimizer


def quantised() -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


class Flat(FullyShardedDataParallel):
    def __init__(self) -> None:
        nn.Module.__init__(self)


REFUSED: dict[str, tuple[Any, str]] = {
    "set": (lambda: Bag({"a": [{1}]}), r"x/a/0: a set cannot be stored without pickle \(keep tensors"),
    "deque": (lambda: Bag({"a": deque([1])}), "x/a: a deque cannot be stored"),
    "enum": (lambda: Bag({"a": (Colour.RED,)}), "x/a/0: a Colour cannot be stored"),
    "type": (lambda: Bag({"a": {"b": torch.float32}}), "x/a/b: a dtype cannot be stored"),
    "key": (lambda: Bag({"a": {Colour.RED: 1}}), r"x/a: the key .*Colour, would not be the same key"),
    "tensor as key": (lambda: Bag({"a": {torch.ones(1): 1}}), "x/a: the key .*Tensor, would not be"),
    "loop": (lambda: Bag(loop()), "x/self/again: refers back"),
    "objects": (lambda: Bag({"a": np.array([None])}), r"x/a: a numpy array of object .*\(convert"),
    "texts": (lambda: Bag({"a": np.array(["x"])}), "x/a: a numpy array of <U1"),
    "dates": (lambda: Bag({"a": np.datetime64("2020-01-01")}), r"x/a: a numpy array of datetime64\[D\]"),
    "long double": (lambda: Bag({"a": np.longdouble(1)}), "x/a: a numpy array of (float128|longdouble)"),
    "byte order": (lambda: Bag({"a": np.array([1], ">i4")}), r"x/a: a numpy array in foreign byte order \(convert"),
    "sparse": (lambda: Bag({"a": torch.eye(2).to_sparse()}), r"x/a: a torch.sparse_coo tensor .*to_dense\(\)"),
    "csr": (lambda: Buffers({"a": torch.eye(2).to_sparse_coo()}), "x/a: a torch.sparse_coo tensor"),
    "meta": (lambda: Buffers({"a": torch.empty(2, device="meta")}), r"x/a: a meta tensor .*to_empty"),
    "quantised": (lambda: Buffers({"a": quantised()}), r"x/a: a quantised tensor of torch.qint8 .*int_repr\(\)"),
    "bits": (lambda: Bag({"a": torch.empty(2, dtype=torch.bits8)}), r"x/a: a tensor of torch.bits8 .*torch.uint8"),
    "nested": (
        lambda: Bag({"a": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)}), "x/a: a NestedTensor tensor",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), "x/0.weight: an uninitialised parameter .*forward pass"),
    "expanded": (lambda: Buffers({"a": torch.ones(1).expand(5)}), r"x/a: its elements share memory.*\.clone\(\)"),
    "flat fsdp": (lambda: nn.Sequential(Flat()), "x/0: FullyShardedDataParallel .*fully_shard"),
    "stray optimizer state": (stray, "x/state: holds something for 'steps'"),
    "no state_dict": (lambda: {"a": 1}, "x: dict has no state_dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_by_its_full_name_with_a_remedy(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedState, match=message) as raised:
        flatten({"x": make()}, rank=0, world=1)
    assert str(raised.value).endswith(")")


def test_two_tensors_of_one_name_are_refused() -> None:
    state = {"a": Bag({"b": {"c": torch.ones(1)}}), "a/b": Bag({"c": torch.ones(2)})}
    with pytest.raises(UnsupportedState, match="a/b/c: two tensors of the state have this name"):
        flatten(state, rank=0, world=1)
