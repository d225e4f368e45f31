"""One tensor as a checkpoint sees it: which box of the whole this rank holds, who else holds it, and its bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ray_dr.checkpoint.mesh import Cut, held
from ray_dr.checkpoint.save_plan import Leaf, replicated
from ray_dr.errors import UnsupportedState
from ray_dr.model.checkpoint import DTYPE_BYTES, Box

LEAVES_KEPT = 65_536
PLAIN_DTYPES = frozenset(getattr(torch, name) for name in DTYPE_BYTES if hasattr(torch, name))


@dataclass(frozen=True, slots=True)
class Local:
    """What this rank holds of a named tensor: its bytes' owner, the box of the whole, and which replica it is."""

    tensor: torch.Tensor
    leaf: Leaf


def describe(name: str, tensor: torch.Tensor, rank: int, world: int) -> Local:
    """Which box of the whole a tensor is, on this rank. Raises UnsupportedState for one that has no plain bytes.

    A plain tensor is taken to be the same on every rank.
    """
    if refused := _refusal(tensor):
        what, remedy = refused
        raise UnsupportedState(f"{name}: {what} has no bytes that could be stored ({remedy})")
    dtype, shape = _dtype_name(tensor.dtype), tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Local(tensor.detach(), _replicated(name, dtype, shape, rank, world))
    leaf = _of_mesh(name, dtype, shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local().detach()
    if leaf.boxes and leaf.boxes[0].lengths != tuple(local.shape):
        raise UnsupportedState(
            f"{name}: this rank holds {list(local.shape)} of {list(shape)} where {tensor.placements} means "
            f"{list(leaf.boxes[0].lengths)} (make the sharded dimension divide evenly over the mesh)"
        )
    return Local(local, leaf)


def same_memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Equal for two tensors that are the same elements in the same memory; None for one that can't be compared."""
    placed: tuple[Any, ...] = ()
    if isinstance(tensor, DTensor):
        placed = (tensor.device_mesh, tensor.placements, tuple(tensor.shape))
        tensor = tensor.to_local()
    if _refusal(tensor) or not tensor.numel():
        return None
    seen = (tensor.is_conj(), tensor.is_neg())
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device, seen, placed)


def placed(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...] | None:
    """Equal for two lists of tensors whose elements are laid out the same way in the same memory; None where that can't be
    told quickly. A third of a microsecond per tensor: what is done for each of many thousands at every save.
    """
    kinds, same = set(map(type, tensors)), list(map(id, tensors))  # what to_local gives is another object each time
    sharded: list[tuple[Any, ...]] = []
    if not kinds <= {torch.Tensor, nn.Parameter}:
        if not kinds <= {torch.Tensor, nn.Parameter, DTensor}:
            return None
        sharded = [(t.device_mesh, t.placements, t.shape) for t in tensors if isinstance(t, DTensor)]
        with torch.no_grad():  # else to_local makes a view
            tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    try:
        # Hashes, because keeping a shape of each would make Python's garbage collector look through all there is.
        return same, [hash((t.data_ptr(), t.shape, t.stride(), t.dtype)) for t in tensors], sharded
    except RuntimeError:  # one that is no dense block
        return None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor with elements, as uint8 of shape (nbytes,); without a copy when it is contiguous."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(torch.uint8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy when it is contiguous: length nbytes."""
    return as_bytes(tensor).numpy().data if tensor.numel() else memoryview(b"")


def _refusal(tensor: torch.Tensor) -> tuple[str, str] | None:
    """(what it is, what to do instead) for a tensor that is not a dense block of plain elements."""
    ordinary = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if ordinary and tensor.dtype in PLAIN_DTYPES:
        return None
    if is_lazy(tensor):
        return "an uninitialised parameter of a lazy module", "run one forward pass first"
    made_of_others: bool = is_traceable_wrapper_subclass(tensor)
    if made_of_others and not isinstance(tensor, DTensor):
        return f"a {type(tensor).__name__} tensor", "keep the plain tensors it is made of"
    if tensor.is_meta:
        return "a meta tensor", "give it memory first: module.to_empty(device=...)"
    if tensor.layout is not torch.strided:
        return f"a {tensor.layout} tensor of {tensor.dtype}", "keep tensor.to_dense(), or its indices and values"
    if tensor.is_quantized:
        return f"a quantised tensor of {tensor.dtype}", "keep int_repr() and its scales and zero points, or dequantize()"
    if _dtype_name(tensor.dtype) not in DTYPE_BYTES:
        return f"a tensor of {tensor.dtype}", "keep it viewed as torch.uint8"
    return None


@functools.lru_cache(LEAVES_KEPT)
def _replicated(name: str, dtype: str, shape: tuple[int, ...], rank: int, world: int) -> Leaf:
    """Kept, because every save describes the same tensors."""
    return replicated(name, dtype, shape, rank=rank, world=world)


def _of_mesh(name: str, dtype: str, shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Any, ...]) -> Leaf:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Leaf(name, dtype, shape, ())
    ranks = _holders(mesh, coordinate, placements)
    return _sharded(name, dtype, shape, tuple(mesh.shape), tuple(coordinate), placements, ranks)


@functools.lru_cache(LEAVES_KEPT)
def _sharded(name: str, dtype: str, shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...],
             placements: tuple[Any, ...], holders: tuple[int, ...]) -> Leaf:  # fmt: skip
    """Kept as well, without the mesh, which belongs to one attempt. Raises UnsupportedState for a placement that is not
    one box."""
    cuts = []
    replica = 0
    for place, size, where in zip(placements, mesh, coordinate, strict=True):
        if isinstance(place, Shard | _StridedShard):
            cuts.append(Cut(place.dim, size, where, getattr(place, "split_factor", 1)))
        elif isinstance(place, Replicate):
            replica = replica * size + where
        else:
            raise UnsupportedState(
                f"{name}: placement {placements} is neither sharded along dimensions nor replicated "
                "(call redistribute first)"
            )
    found = held(shape, cuts)
    if found is None:
        raise UnsupportedState(
            f"{name}: {placements} of {list(shape)} over a mesh of {mesh} gives this rank indices that are not one "
            "stretch (make the sharded dimension divide evenly over the mesh)"
        )
    count = len(holders) if holders else 1
    return Leaf(name, dtype, shape, (Box(name, dtype, shape, *found),), replica, count, holders)


def _holders(mesh: DeviceMesh, coordinate: Sequence[int], placements: tuple[Any, ...]) -> tuple[int, ...]:
    """The ranks that hold the same box as this one, along the mesh dimensions that replicate, in the mesh's order; none
    where no dimension does."""
    if not any(isinstance(place, Replicate) for place in placements):
        return ()
    alike = tuple(
        slice(None) if isinstance(place, Replicate) else where
        for place, where in zip(placements, coordinate, strict=True)
    )
    return tuple(mesh.mesh[alike].reshape(-1).tolist())


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
