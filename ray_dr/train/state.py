"""Training state to named tensors and JSON values, and back: no pickle, at any world size.

Names are paths: `model/layers.0.weight`, `optimizer/state/layers.0.weight/exp_avg` (with several modules the latter
is `optimizer/state/model.layers.0.weight/exp_avg`). A plain tensor is taken to be the same on every rank (data
parallel); a DTensor says itself which box of the whole this rank holds.

Whatever else an object's `state_dict()` holds is kept as one JSON value per object, tensors in it replaced by
`{"$tensor": name}`; see `_encode` for the few forms JSON lacks.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from ray_dr.checkpoint.restore_plan import Index, compare
from ray_dr.checkpoint.save_plan import Leaf, replicated
from ray_dr.errors import IncompatibleState, UnsupportedState
from ray_dr.model.checkpoint import DTYPE_BYTES, Box
from ray_dr.train.data import Data

Objects = Mapping[str, Any]
LEAVES_KEPT = 65_536


@dataclass(frozen=True, slots=True)
class Local:
    """What this rank holds of a named tensor: its bytes' owner, the box of the whole, and which replica it is."""

    tensor: torch.Tensor
    leaf: Leaf


@dataclass(frozen=True, slots=True)
class Flat:
    """A state laid flat: tensors by name (in a fixed order) and JSON values by name."""

    tensors: dict[str, Local]
    scalars: dict[str, Any]


def flatten(objects: Objects, *, rank: int, world: int) -> Flat:
    """The state of named objects. Raises UnsupportedState naming what cannot be stored."""
    tensors: dict[str, Local] = {}
    scalars: dict[str, Any] = {}
    names = parameter_names(objects)
    for name, value in objects.items():
        if isinstance(value, nn.Module):
            for key, tensor in _module_tensors(name, value).items():
                tensors[f"{name}/{key}"] = describe(f"{name}/{key}", tensor, rank, world)
        elif isinstance(value, torch.optim.Optimizer):
            _flatten_optimizer(name, value, names, tensors, scalars, rank, world)
        else:
            found: dict[str, torch.Tensor] = {}
            scalars[name] = _encode(_state_dict_of(name, value), name, found)
            for key, tensor in found.items():
                tensors[key] = describe(key, tensor, rank, world)
    return Flat(tensors, scalars)


def describe(name: str, tensor: torch.Tensor, rank: int, world: int) -> Local:
    """Which box of the whole a tensor is, on this rank. Raises UnsupportedState for one that has no plain bytes."""
    dtype = _dtype_name(tensor.dtype)
    if dtype not in DTYPE_BYTES or tensor.layout is not torch.strided or tensor.is_meta:
        kind = "a meta tensor" if tensor.is_meta else f"a {tensor.layout} tensor of {tensor.dtype}"
        raise UnsupportedState(f"{name}: {kind} has no bytes that could be stored (keep a dense one of a plain dtype)")
    if not isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        return Local(tensor.detach(), _replicated(name, dtype, shape, rank, world))
    mesh, placements = tensor.device_mesh, tensor.placements
    if not all(isinstance(place, Replicate | Shard) for place in placements):
        raise UnsupportedState(
            f"{name}: placement {placements} is neither sharded along plain dimensions nor replicated "
            "(call redistribute first)"
        )
    shape = tuple(tensor.shape)
    lengths, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    replica, replicas = _replica(mesh.get_coordinate() or [], mesh.shape, placements)
    box = Box(name, dtype, shape, tuple(offsets), tuple(lengths))
    return Local(tensor.to_local().detach(), Leaf(name, dtype, shape, (box,), replica, replicas))


@functools.lru_cache(LEAVES_KEPT)
def _replicated(name: str, dtype: str, shape: tuple[int, ...], rank: int, world: int) -> Leaf:
    """Kept, because every save describes the same tensors."""
    return replicated(name, dtype, shape, rank=rank, world=world)


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor with elements, as uint8 of shape (nbytes,); without a copy when it is contiguous."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(torch.uint8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy when it is contiguous: length nbytes."""
    return as_bytes(tensor).numpy().data if tensor.numel() else memoryview(b"")


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
    """The module the researcher wrote, without DDP around it."""
    return module.module if isinstance(module, DistributedDataParallel) else module


class Target:
    """Where a checkpoint is to go: buffers for every wanted tensor of this rank, made before anything is overwritten.

    `boxes` and `buffers` are what the reader fills; `apply` then hands the values over to objects that keep them
    elsewhere. Raises IncompatibleState, listing every difference, when the checkpoint is of another program.
    """

    def __init__(self, objects: Objects, saved: Index, scalars: Mapping[str, Any], *, rank: int, world: int) -> None:
        self._objects, self._scalars, self._saved = objects, scalars, saved
        self._rank, self._world = rank, world
        self._names = parameter_names(objects)
        self._locals: dict[str, Local] = {}
        self._loose: dict[str, torch.Tensor] = {}
        self._optimizer_state: list[tuple[torch.optim.Optimizer, torch.Tensor, dict[str, torch.Tensor]]] = []
        for name, value in objects.items():
            if isinstance(value, nn.Module):
                for key, tensor in _module_tensors(name, value).items():
                    self._want(f"{name}/{key}", tensor)
            elif isinstance(value, torch.optim.Optimizer):
                self._want_optimizer(name, value)
                self._want_loose(name, {})
            else:
                present: dict[str, torch.Tensor] = {}
                _encode(_state_dict_of(name, value), name, present)
                self._want_loose(name, present)
        differences = compare(saved, (box for local in self._locals.values() for box in _named(local.leaf)))
        if found := (*differences, *_differences(objects, scalars, self._names)):
            raise IncompatibleState(found)

    @property
    def locals(self) -> tuple[Local, ...]:
        """Wanted tensors, each with this rank's boxes of it."""
        return tuple(self._locals.values())

    def apply(self) -> None:
        """After the buffers were filled: put optimizer state, scalars and other objects' state in place."""
        for optimizer, parameter, state in self._optimizer_state:
            optimizer.state.pop(parameter, None)  # what the checkpoint does not have must not stay
            if state:
                optimizer.state[parameter] = dict(state)
        for name, value in self._objects.items():
            if isinstance(value, torch.optim.Optimizer):
                self._apply_scalars(name, value)
            elif not isinstance(value, nn.Module):
                value.load_state_dict(_decode(self._scalars[name], self._loose))

    def _want(self, name: str, tensor: torch.Tensor) -> None:
        self._locals[name] = describe(name, tensor, self._rank, self._world)

    def _want_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        nested = set(_tensors_in(self._scalars.get(name)))
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
        for path in _tensors_in(self._scalars.get(name)):
            box = self._saved.box(path)
            like = present.get(path)
            if like is not None and tuple(like.shape) == box.global_shape:
                tensor = torch.empty_like(like, dtype=getattr(torch, box.dtype), requires_grad=False)
            else:
                tensor = torch.empty(box.global_shape, dtype=getattr(torch, box.dtype))
            self._loose[path] = tensor
            self._want(path, tensor)

    def _apply_scalars(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        saved = self._scalars[name]
        for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: _decode(value, self._loose) for key, value in values.items() if key != "params"})
        for label, parameter, _ in _labelled_parameters(optimizer, self._names):
            for key, value in saved["state"].get(label, {}).items():
                optimizer.state[parameter][key] = _decode(value, self._loose)


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
    state = unwrap(module).state_dict()
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            found = type(value).__name__
            raise UnsupportedState(f"{name}/{key}: a {found} in a module's state_dict (register a tensor as a buffer)")
    return state


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


def _flatten_optimizer(name: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: dict[str, Local],
                       scalars: dict[str, Any], rank: int, world: int) -> None:  # fmt: skip
    state: dict[str, dict[str, Any]] = {}
    nested: dict[str, torch.Tensor] = {}
    for label, parameter, _ in _labelled_parameters(optimizer, names):
        for key, value in optimizer.state.get(parameter, {}).items():
            path = f"{name}/state/{label}/{key}"
            if isinstance(value, torch.Tensor):
                tensors[path] = describe(path, value, rank, world)
            else:
                state.setdefault(label, {})[key] = _encode(value, path, nested)
    groups = []
    for i, (group, labels) in enumerate(zip(optimizer.param_groups, _group_labels(optimizer, names), strict=True)):
        values = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": labels, **_encode(values, f"{name}/param_groups/{i}", nested)})
    for path, tensor in nested.items():
        tensors[path] = describe(path, tensor, rank, world)
    scalars[name] = {"param_groups": groups, "state": state}


def _replica(coordinate: Sequence[int], shape: tuple[int, ...], placements: tuple[Any, ...]) -> tuple[int, int]:
    """(index, count) of this rank among those that hold the same box: the mesh dimensions that replicate."""
    index, count = 0, 1
    for place, size, where in zip(placements, shape, coordinate, strict=False):
        if isinstance(place, Replicate):
            index, count = index * size + where, count * size
    return index, count


def _state_dict_of(name: str, value: Any) -> Any:
    if not hasattr(value, "state_dict") or not hasattr(value, "load_state_dict"):
        raise UnsupportedState(f"{name}: {type(value).__name__} has no state_dict/load_state_dict (give it both)")
    return value.state_dict()


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON form of a nested value, its tensors put into `tensors` by path.

    `$tensor`, `$tuple`, `$items` (a mapping with other keys than strings), `$counter` and `$float` (infinities and NaN)
    mark what JSON has no form for.
    """
    match value:
        case None | bool() | str():
            return value
        case np.bool_():
            return bool(value)
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        case torch.Tensor():
            while path in tensors:  # {1: ..., "1": ...}
                path += "'"
            tensors[path] = value
            return {"$tensor": path}
        case list():
            return [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        case tuple():
            return {"$tuple": [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
        case Counter():
            return {"$counter": [[_encode(k, path, tensors), _encode(v, path, tensors)] for k, v in value.items()]}
        case Mapping():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
            pairs = [[_encode(k, path, tensors), _encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]
            return {"$items": pairs}
        case _:
            raise UnsupportedState(
                f"{path}: a {type(value).__name__} cannot be stored without pickle "
                "(keep tensors, numbers, strings, lists and mappings of them in state_dict)"
            )


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    match value:
        case {"$tensor": path}:
            return tensors[path]
        case {"$tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"$float": text}:
            return float(text)
        case {"$counter": pairs}:
            return Counter({_decode(key, tensors): _decode(count, tensors) for key, count in pairs})
        case {"$items": pairs}:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in pairs}
        case dict():
            return {key: _decode(item, tensors) for key, item in value.items()}
        case list():
            return [_decode(item, tensors) for item in value]
        case _:
            return value


def _tensors_in(value: Any) -> Iterator[str]:
    """Paths of the tensors that an encoded value refers to."""
    match value:
        case {"$tensor": path}:
            yield path
        case dict():
            for item in value.values():
                yield from _tensors_in(item)
        case list():
            for item in value:
                yield from _tensors_in(item)
