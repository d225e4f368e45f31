"""Plain values among the objects to save: nested mappings and lists of tensors, arrays, numbers and strings.

Loading puts them where they are: tensors and arrays are filled, dicts and lists keep their identity, everything else
takes the saved value. Where the program has any tensor, its tensors must be those of the checkpoint; a tree without
tensors, also an empty one, takes whatever there is.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ray_dr.checkpoint.nested import by_object, nested, tensors_in
from ray_dr.checkpoint.restore_plan import Index, compare
from ray_dr.checkpoint.save_plan import whole
from ray_dr.train.values import encode


class Tree:
    """A value with no `state_dict` of its own, in the form of an object that has one."""

    def __init__(self, value: Any) -> None:
        self.value, self.loaded = value, value

    def state_dict(self) -> Any:
        """The value."""
        return self.value

    def load_state_dict(self, state: Any) -> None:
        """Keep what was loaded; `settle` puts it in place."""
        self.loaded = state

    def settle(self) -> Any:
        """What stands at the value's place now: the same container or tensor with new contents, or a new value."""
        return _merge(self.value, self.loaded)


def wrap(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The objects, plain values among them as trees."""
    return {name: Tree(value) if _is_plain(value) else value for name, value in objects.items()}


def settle(objects: MutableMapping[str, Any], wrapped: Mapping[str, Any]) -> None:
    """Put loaded trees in place; a value that cannot change, as a number, is replaced in `objects` itself."""
    for name, tree in wrapped.items():
        if isinstance(tree, Tree):
            objects[name] = tree.settle()


def alike(objects: Mapping[str, Any], scalars: Mapping[str, Any], saved: Index) -> dict[str, Any]:
    """The scalars in the form the objects have them: what was saved as a module or an optimizer can be loaded as nested
    values, and a module from its state_dict."""
    found = dict(scalars)
    belonging = by_object(saved.shards)
    for name, value in objects.items():
        if isinstance(value, Tree) and (name in found or name in belonging):
            found[name] = nested(name, found.get(name), belonging.get(name, ()))
        if isinstance(value, nn.Module) and _is_state_dict(found.get(name)):
            del found[name]
    return found


def differences(name: str, tree: Tree, scalars: Mapping[str, Any], saved: Index) -> tuple[str, ...]:
    """Where the tree has tensors and the checkpoint has others, or none, at their places."""
    present: dict[str, torch.Tensor] = {}
    encode(tree.value, name, present)
    if not present:
        return ()
    there = Index({path: saved.shards[path] for path in sorted(set(tensors_in(scalars[name])))})
    here = [whole(path, str(held.dtype).removeprefix("torch."), tuple(held.shape)) for path, held in present.items()]
    return compare(there, here)


def _is_plain(value: Any) -> bool:
    stateful = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
    return not stateful and not isinstance(value, nn.Module | torch.optim.Optimizer)


def _is_state_dict(scalars: Any) -> bool:
    """Whether an encoded value is a mapping of nothing but tensors."""
    return isinstance(scalars, dict) and all(
        isinstance(value, dict) and value.keys() == {"$tensor"} for value in scalars.values()
    )


def _merge(old: Any, new: Any) -> Any:
    match old, new:
        case torch.Tensor(), torch.Tensor() | np.ndarray() if old.shape == new.shape and not overlaps(old):
            _local(old).copy_(_local(new if isinstance(new, torch.Tensor) else torch.from_numpy(new)))
            return old
        case np.ndarray(), torch.Tensor() | np.ndarray() if old.shape == tuple(new.shape) and old.flags.writeable:
            old[...] = new
            return old
        case dict(), dict():
            merged = {key: _merge(old.get(key), value) for key, value in new.items()}
            old.clear()
            old.update(merged)
            return old
        case list(), list():
            kept = [_merge(*pair) for pair in zip(old, new, strict=False)]
            old[:] = kept + new[len(kept) :]
            return old
        case _:
            return new


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: then it cannot be written to."""
    local = _local(tensor)
    return any(stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own memory on this rank, outside of autograd."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
