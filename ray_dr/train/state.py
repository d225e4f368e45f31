"""Training state to named tensors and JSON values, and back: no pickle, at any world size.

Names are paths: `model/layers.0.weight`, `optimizer/state/layers.0.weight/exp_avg` (with several modules the latter
is `optimizer/state/model.layers.0.weight/exp_avg`). A plain tensor of a module or optimizer is taken to be the same on
every rank (data parallel); a DTensor says itself which box of the whole this rank holds.

Whatever else an object's `state_dict()` holds is kept as one JSON value per object (see `values`), tensors in it aside.
What a user's object keeps may differ between ranks; then rank 0's word counts, for its plain tensors as for its numbers.

Two names of the same memory (tied weights) are stored once, and read once where the program ties them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ray_dr.checkpoint.nested import tensors_in
from ray_dr.checkpoint.restore_plan import Index, compare
from ray_dr.checkpoint.save_plan import Leaf
from ray_dr.errors import CheckpointError, IncompatibleState, UnsupportedState
from ray_dr.model.checkpoint import Box
from ray_dr.train.data import Data
from ray_dr.train.leaves import Local as Local
from ray_dr.train.leaves import as_bytes as as_bytes
from ray_dr.train.leaves import bytes_of as bytes_of
from ray_dr.train.leaves import describe, placed, same_memory
from ray_dr.train.values import decode as decode
from ray_dr.train.values import encode as encode

Objects = Mapping[str, Any]
Named = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Flat:
    """A state laid flat: tensors by name (in a fixed order) and JSON values by name."""

    tensors: dict[str, Local]
    scalars: dict[str, Any]


@dataclass(slots=True)
class _Gathered:
    """Tensors described one after the other; those of the same memory are known as the same."""

    rank: int
    world: int
    tensors: dict[str, Local] = field(default_factory=dict)
    _at: dict[int, list[tuple[str, torch.Tensor, bool]]] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor, *, whole: bool = False) -> None:
        """whole   rank 0's tensor is the one that counts"""
        if name in self.tensors:
            raise UnsupportedState(f"{name}: two tensors of the state have this name (rename one of them)")
        local = describe(name, tensor, self.rank, self.world)
        whole = whole and not isinstance(tensor, DTensor)
        first = self._first_of(name, tensor, whole, local.tensor.data_ptr())
        if whole or first:
            local = Local(local.tensor, replace(local.leaf, whole=whole, same_as=first))
        self.tensors[name] = local

    def _first_of(self, name: str, tensor: torch.Tensor, whole: bool, address: int) -> str:
        """The name under which the same memory was added before; empty when this is the first."""
        if not address:
            return ""
        there = self._at.setdefault(address, [])
        mine = same_memory(tensor) if there else None
        for other, held, as_whole in there:
            if as_whole == whole and mine is not None and same_memory(held) == mine:
                return other
        there.append((name, tensor, whole))
        return ""


def flatten(objects: Objects, *, rank: int, world: int) -> Flat:
    """The state of named objects. Raises UnsupportedState naming what cannot be stored."""
    return Flattener(rank, world).flatten(objects)


class Flattener:
    """Lays the same objects flat save after save. As long as their tensors stay where they are, so does the description: it
    is then the very same dict. Numbers and strings are read anew.

    Of tensors on devices nothing is kept: to refer to them would hold memory that the program may want to give back.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._seen: Any = None
        self._tensors: dict[str, Local] = {}

    def flatten(self, objects: Objects) -> Flat:
        """The state. Raises UnsupportedState naming what cannot be stored."""
        names = parameter_names(objects)
        scalars: dict[str, Any] = {}
        nested = {name: _read_scalars(name, value, names, scalars) for name, value in objects.items()}
        seen = _outline(objects, names, nested)
        if seen is not None and seen == self._seen:
            return Flat(self._tensors, scalars)
        self._seen, self._tensors = None, {}
        tensors = self._described(objects, names, nested)
        if not any(local.tensor.is_cuda for local in tensors.values()):
            self._seen, self._tensors = seen, tensors
        return Flat(tensors, scalars)

    def _described(self, objects: Objects, names: Mapping[int, str], nested: Mapping[str, Named]) -> dict[str, Local]:
        gathered = _Gathered(self.rank, self.world)
        for name, value in objects.items():
            if isinstance(value, nn.Module):
                for key, tensor in _module_tensors(name, value).items():
                    gathered.add(f"{name}/{key}", tensor)
            elif isinstance(value, torch.optim.Optimizer):
                for path, tensor in _state_tensors(name, value, names):
                    gathered.add(path, tensor)
            for path, tensor in nested[name].items():
                gathered.add(path, tensor, whole=not isinstance(value, torch.optim.Optimizer))
        return gathered.tensors


def _outline(objects: Objects, names: Mapping[int, str], nested: Mapping[str, Named]) -> Any:
    """Equal for two moments at which the objects have the same tensors under the same names; None where that can't be told."""
    tensors: list[torch.Tensor] = []
    keys: list[Any] = [names]
    for name, value in objects.items():
        if isinstance(value, nn.Module):
            try:
                found = unwrap(value).state_dict(keep_vars=True)
            except TypeError:  # a module's own, which knows no arguments
                return None
            keys.append(list(found))
            tensors += found.values()
        elif isinstance(value, torch.optim.Optimizer):
            every = [parameter for group in value.param_groups for parameter in group["params"]]
            states = [value.state.get(parameter, {}) for parameter in every]
            keys += [list(map(id, every)), [hash(tuple(state)) for state in states], len(value.state)]
            tensors += [each for state in states for each in state.values() if isinstance(each, torch.Tensor)]
        keys += [name, list(nested[name])]
        tensors += nested[name].values()
    laid = placed(tensors)
    return None if laid is None else (keys, laid)


def parameter_names(objects: Objects) -> dict[int, str]:
    """Name of each parameter of the named modules, by the parameter's identity; the module's own name comes first when
    there are several."""
    modules = {name: value for name, value in objects.items() if isinstance(value, nn.Module)}
    names: dict[int, str] = {}
    for name, module in modules.items():
        for key, parameter in unwrap(module).named_parameters():
            names.setdefault(id(parameter), key if len(modules) == 1 else f"{name}.{key}")
    return names


def unwrap(module: nn.Module) -> nn.Module:
    """The module the researcher wrote, without DDP and `torch.compile` around it."""
    while True:
        inner = module.module if isinstance(module, DistributedDataParallel) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


class Target:
    """Where a checkpoint is to go: buffers for every wanted tensor of this rank, made before anything is overwritten.

    `locals` are what the reader fills; `apply` then hands the values over to objects that keep them elsewhere. Until
    then nobody has seen those that are `fresh` (by name); the others are the objects' own. Tensors that are `shared` (by
    name) lie over each other in memory: they are to be read into memory of their own, put there, and copied in order.
    Raises IncompatibleState, listing every difference, when the checkpoint is of another program.
    """

    def __init__(self, objects: Objects, saved: Index, scalars: Mapping[str, Any], *, rank: int, world: int) -> None:
        self._objects, self._scalars, self._saved = objects, scalars, saved
        self._names = parameter_names(objects)
        self._wanted = _Gathered(rank, world)
        self._copies: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
        self._loose: dict[str, torch.Tensor] = {}
        self.fresh: set[str] = set()
        self._optimizer_state: list[tuple[torch.optim.Optimizer, torch.Tensor, dict[str, torch.Tensor]]] = []
        for name, value in objects.items():
            if isinstance(value, nn.Module):
                self._want_module(name, value)
            elif isinstance(value, torch.optim.Optimizer):
                self._want_optimizer(name, value)
                self._want_loose(name, {})
            else:
                present: dict[str, torch.Tensor] = {}
                encode(_state_dict_of(name, value), name, present)
                self._want_loose(name, present)
        wanted = self._wanted.tensors
        differences = compare(saved, (box for local in wanted.values() for box in _named(local.leaf)))
        if found := (*differences, *_differences(objects, scalars, self._names)):
            raise IncompatibleState(found)
        self._locals = tuple(local for local in wanted.values() if not self._read_as_another(local.leaf))
        self.shared: dict[str, torch.Tensor | None] = dict.fromkeys(_overlapping(self._locals))

    @property
    def locals(self) -> tuple[Local, ...]:
        """Tensors to fill, each with this rank's boxes of it."""
        return self._locals

    def apply(self) -> None:
        """After the buffers were filled: put optimizer state, scalars and other objects' state in place."""
        for module, tensors in self._copies:
            module.load_state_dict(tensors)
        for optimizer, parameter, state in self._optimizer_state:
            optimizer.state.pop(parameter, None)  # what the checkpoint does not have must not stay
            if state:
                optimizer.state[parameter] = dict(state)
        for name, value in self._objects.items():
            if isinstance(value, torch.optim.Optimizer):
                self._apply_scalars(name, value)
            elif not isinstance(value, nn.Module):
                value.load_state_dict(decode(self._scalars[name], self._loose))

    def _want(self, name: str, tensor: torch.Tensor) -> None:
        self._wanted.add(name, tensor)

    def _want_module(self, name: str, module: nn.Module) -> None:
        """A module's tensors are filled where they are; what its state_dict made only to show it, is loaded by it."""
        tensors = _module_tensors(name, module)
        for key, tensor in tensors.items():
            self._want(f"{name}/{key}", tensor)
        inner = unwrap(module)
        own = {_storage(tensor) for tensor in (*inner.parameters(), *inner.buffers())}
        if any(tensor.numel() and _storage(tensor) not in own for tensor in tensors.values()):
            self._copies.append((inner, tensors))

    def _read_as_another(self, leaf: Leaf) -> bool:
        """Whether a tensor's memory is filled under another name anyway: tied here, and stored once."""
        if not leaf.same_as:
            return False
        mine, others = (
            [(rank, shard.at, shard.box.offsets, shard.box.lengths) for rank, shard in self._saved.shards[name]]
            for name in (leaf.name, leaf.same_as)
        )
        return mine == others

    def check_shared(self) -> None:
        """After every tensor has its values. Raises CheckpointError when tensors that share memory here do not agree in
        the checkpoint."""
        for local in self._locals:
            if local.leaf.name not in self.shared:
                continue
            staged = self.shared[local.leaf.name]
            assert staged is not None, f"{local.leaf.name}: shares memory, and was not read into memory of its own"
            if not torch.equal(as_bytes(local.tensor), as_bytes(staged).to(local.tensor.device)):
                raise CheckpointError(
                    f"{local.leaf.name}: shares memory with another tensor of the program, and the checkpoint has "
                    "different values for them (give them memory of their own, as the program had that saved them)"
                )

    def _want_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        nested = set(tensors_in(self._scalars.get(name)))
        keys_of: dict[str, list[str]] = {}
        for path in self._saved.shards:
            if path.startswith(f"{name}/state/") and path not in nested:
                label, _, key = path.removeprefix(f"{name}/state/").rpartition("/")
                keys_of.setdefault(label, []).append(key)
        for label, parameter, group in _labelled_parameters(optimizer, self._names):
            state: dict[str, torch.Tensor] = {}
            for key in keys_of.get(label, ()):
                path = f"{name}/state/{label}/{key}"
                held = optimizer.state.get(parameter, {}).get(key)
                if not isinstance(held, torch.Tensor):
                    self.fresh.add(path)
                state[key] = held if isinstance(held, torch.Tensor) else self._blank(path, key, parameter, group)
                self._want(path, state[key])
            self._optimizer_state.append((optimizer, parameter, state))

    def _blank(self, path: str, key: str, parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        """An uninitialised tensor for a piece of optimizer state: laid out like its parameter when shaped like it."""
        saved = self._saved.box(path)
        dtype = getattr(torch, saved.dtype)
        if tuple(saved.global_shape) == tuple(parameter.shape) and (parameter.dim() or key != "step"):
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False).detach()
        on_device = group.get("capturable") or group.get("fused") or key != "step"
        return torch.empty(saved.global_shape, dtype=dtype, device=parameter.device if on_device else "cpu")

    def _want_loose(self, name: str, present: Mapping[str, torch.Tensor]) -> None:
        """Tensors inside an object's JSON value: like the one the object has at that place now, if it has."""
        for path in dict.fromkeys(tensors_in(self._scalars.get(name))):
            box = self._saved.box(path)
            like = present.get(path)
            if like is not None and tuple(like.shape) == box.global_shape:
                tensor = torch.empty_like(like, dtype=getattr(torch, box.dtype), requires_grad=False)
            else:
                tensor = torch.empty(box.global_shape, dtype=getattr(torch, box.dtype))
            self._loose[path] = tensor
            self.fresh.add(path)
            self._want(path, tensor)

    def _apply_scalars(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        saved = self._scalars[name]
        for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: decode(value, self._loose) for key, value in values.items() if key != "params"})
        for label, parameter, _ in _labelled_parameters(optimizer, self._names):
            for key, value in saved["state"].get(label, {}).items():
                optimizer.state[parameter][key] = decode(value, self._loose)


def _differences(objects: Objects, scalars: Mapping[str, Any], names: Mapping[int, str]) -> Iterator[str]:
    """What differs besides tensors: which objects there are, the optimizers' parameter groups, the data."""
    kept = {name for name, value in objects.items() if not isinstance(value, nn.Module)}
    for name in sorted(kept - scalars.keys()):
        yield f"{name}: the program restores it, the checkpoint does not have it"
    for name in sorted(scalars.keys() - kept):
        yield f"{name}: the checkpoint has it, the program does not restore it"
    for name in sorted(kept & scalars.keys()):
        value = objects[name]
        if isinstance(value, torch.optim.Optimizer):
            yield from _group_differences(name, value, scalars[name], names)
        elif isinstance(value, Data):
            yield from value.differences(scalars[name])


def _group_differences(
    name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], names: Mapping[int, str]
) -> Iterator[str]:
    theirs = [group["params"] for group in saved["param_groups"]]
    mine = _group_labels(optimizer, names)
    if len(theirs) != len(mine):
        yield f"{name}: {len(theirs)} parameter groups in the checkpoint, {len(mine)} in the program"
        return
    for i, (there, here) in enumerate(zip(theirs, mine, strict=True)):
        for label in sorted(set(there) ^ set(here)):
            owner, other = ("checkpoint", "program") if label in there else ("program", "checkpoint")
            yield f"{name}: group {i} has {label} in the {owner}, not in the {other}"


def _named(leaf: Leaf) -> tuple[Box, ...]:
    """A leaf's boxes; where this rank holds nothing, an empty box, so that the name still counts as wanted."""
    zeros = (0,) * len(leaf.global_shape)
    return leaf.boxes or (Box(leaf.name, leaf.dtype, leaf.global_shape, zeros, zeros),)


def _module_tensors(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's state_dict. Raises UnsupportedState for an extra state that is no tensor."""
    for prefix, inner in module.named_modules():
        if isinstance(inner, FullyShardedDataParallel):
            place = f"{name}/{prefix}" if prefix else name
            raise UnsupportedState(f"{place}: FullyShardedDataParallel keeps its tensors in flat pieces that say neither "
                                   "name nor place (use torch.distributed.fsdp.fully_shard)")  # fmt: skip
    state: dict[str, Any] = unwrap(module).state_dict()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            found = type(value).__name__
            raise UnsupportedState(f"{name}/{key}: a {found} in a module's state_dict (register a tensor as a buffer)")
        if is_lazy(value) or value.layout is not torch.strided:
            continue  # refused with its own words when it is described
        local = value.to_local() if isinstance(value, DTensor) else value
        if any(stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True)):
            raise UnsupportedState(
                f"{name}/{key}: its elements share memory, so that they could not be loaded one by one "
                "(register a .clone() of the expanded tensor)"
            )
    return state


def _storage(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def _overlapping(found: Sequence[Local]) -> Iterator[str]:
    """Names of tensors whose stretches of memory overlap."""
    spans = []
    for local in found:
        if local.tensor.numel():
            item = local.tensor.element_size()
            length = sum((n - 1) * stride for n, stride in zip(local.tensor.shape, local.tensor.stride(), strict=True))
            first = local.tensor.data_ptr()
            spans.append((str(local.tensor.device), first, first + (length + 1) * item, local.leaf.name))
    widest: tuple[str, int, int, str] | None = None
    for span in sorted(spans):
        if widest is not None and span[0] == widest[0] and span[1] < widest[2]:
            yield from (widest[3], span[3])
        if widest is None or span[0] != widest[0] or span[2] > widest[2]:
            widest = span


def _labelled_parameters(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """(label, parameter, its group): the module's name for it, or its number when no named module has it."""
    number = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names.get(id(parameter), f"#{number}"), parameter, group
            number += 1


def _group_labels(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """Labels of the parameters of each group."""
    labels: list[list[str]] = []
    every = _labelled_parameters(optimizer, names)
    for group in optimizer.param_groups:
        labels.append([next(every)[0] for _ in group["params"]])
    return labels


def _state_tensors(
    name: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an optimizer's state, by path."""
    if "ZeroRedundancyOptimizer" in {kind.__name__ for kind in type(optimizer).__mro__}:  # its import is costly
        raise UnsupportedState(
            f"{name}: ZeroRedundancyOptimizer keeps other state on each rank under the same names "
            "(use fully_shard, or a plain optimizer)"
        )
    known: set[Any] = set()
    for label, parameter, _ in _labelled_parameters(optimizer, names):
        known.add(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            path = f"{name}/state/{label}/{key}"
            if not isinstance(key, str) or "/" in key:
                raise UnsupportedState(f"{path}: the key {key!r} of an optimizer's state (use a string without a slash)")
            if isinstance(value, torch.Tensor):
                yield path, value
    for key in optimizer.state.keys() - known:
        found = f"a parameter of shape {list(key.shape)}" if isinstance(key, torch.Tensor) else repr(key)
        raise UnsupportedState(
            f"{name}/state: holds something for {found}, which is in none of its parameter groups "
            "(remove it, or keep it in an object of its own)"
        )


def _read_scalars(name: str, value: Any, names: Mapping[int, str], scalars: dict[str, Any]) -> Named:
    """Put what an object keeps besides tensors into `scalars` as JSON; the tensors found inside of that."""
    nested: Named = {}
    if isinstance(value, torch.optim.Optimizer):
        scalars[name] = _optimizer_scalars(name, value, names, nested)
    elif not isinstance(value, nn.Module):
        scalars[name] = encode(_state_dict_of(name, value), name, nested)
    return nested


def _optimizer_scalars(
    name: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str], nested: Named
) -> dict[str, Any]:
    """The JSON value of an optimizer: its groups, and what of its state is no tensor."""
    state: dict[str, dict[str, Any]] = {}
    labels: list[str] = []
    for label, parameter, _ in _labelled_parameters(optimizer, names):
        labels.append(label)
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                state.setdefault(label, {})[key] = encode(value, f"{name}/state/{label}/{key}", nested)
    groups = []
    first = 0
    for i, group in enumerate(optimizer.param_groups):
        mine = labels[first : first + len(group["params"])]
        first += len(mine)
        values = {key: value for key, value in group.items() if key != "params"}
        if not all(isinstance(key, str) and not key.startswith("$") for key in values):
            raise UnsupportedState(f"{name}/param_groups/{i}: a key that is no plain string among {list(values)}")
        groups.append({"params": mine, **encode(values, f"{name}/param_groups/{i}", nested)})
    return {"param_groups": groups, "state": state}


def _state_dict_of(name: str, value: Any) -> Any:
    if not hasattr(value, "state_dict") or not hasattr(value, "load_state_dict"):
        raise UnsupportedState(f"{name}: {type(value).__name__} has no state_dict/load_state_dict (give it both)")
    return value.state_dict()
