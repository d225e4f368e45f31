"""Nested values as JSON and tensors, and back: exactly, or refused by their full name.

`encode` gives the JSON form and puts the tensors aside. Marks, objects with one key that begins with `$`, stand for what
JSON has no form for:

    {"$tensor": name}            a tensor, kept under that name; `"grad": true` when it required gradients
    {"$array": name}             a numpy array, kept as a tensor; `"scalar": true` for a numpy number
    {"$tuple": [...]}            a tuple
    {"$items": [[k, v], ...]}    a mapping with other keys than plain strings
    {"$counter": [[k, n], ...]}  a Counter
    {"$float": "inf"}            inf, -inf, nan; any other NaN by the 16 hex digits of its bits
    {"$int": "-0x..."}           an integer beyond 64 bits
    {"$complex": [re, im]}       a complex number
    {"$bytes": "6279..."}        bytes, in hex

The same tensor or array in two places has one name, and is one again when it is loaded.
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ray_dr.errors import UnsupportedState
from ray_dr.train.leaves import same_memory

NAN = struct.pack(">d", math.nan).hex()
MAPPINGS = (dict, OrderedDict, defaultdict)
"""Loaded as dict, in the order saved. Other kinds of mapping may mean more than their items."""
REMEDY = "keep tensors, numpy arrays, numbers, strings, lists, tuples and dicts of them in state_dict"


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON form of a value named `path`; its tensors are put into `tensors` by name. Raises UnsupportedState."""
    return _encode(value, path, tensors, {same_memory(tensor): name for name, tensor in tensors.items()}, ())


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value, with the tensors given by name."""
    match value:
        case {"$tensor": name}:
            return tensors[name].requires_grad_() if value.get("grad") else tensors[name]
        case {"$array": name}:
            array = tensors[name].cpu().numpy()
            return array[()] if value.get("scalar") else array
        case {"$tuple": items}:
            return tuple(decode(item, tensors) for item in items)
        case {"$float": text}:
            return struct.unpack(">d", bytes.fromhex(text))[0] if len(text) == len(NAN) else float(text)
        case {"$int": text}:
            return int(text, 16)
        case {"$bytes": text}:
            return bytes.fromhex(text)
        case {"$complex": [real, imaginary]}:
            return complex(decode(real, tensors), decode(imaginary, tensors))
        case {"$counter": pairs}:
            return Counter({decode(key, tensors): decode(count, tensors) for key, count in pairs})
        case {"$items": pairs}:
            return {decode(key, tensors): decode(item, tensors) for key, item in pairs}
        case dict():
            return {key: decode(item, tensors) for key, item in value.items()}
        case list():
            return [decode(item, tensors) for item in value]
        case _:
            return value


def _encode(
    value: Any, path: str, tensors: dict[str, torch.Tensor], names: dict[Any, str], inside: tuple[int, ...]
) -> Any:
    if id(value) in inside:
        raise UnsupportedState(f"{path}: refers back to a value around it (a state_dict must be a tree)")
    deeper = (*inside, id(value)) if isinstance(value, list | tuple | Mapping) else inside

    def inner(item: Any, key: Any) -> Any:
        return _encode(item, f"{path}/{key}", tensors, names, deeper)

    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {"$int": hex(value)}
    if kind is float:
        return _float(value)
    if kind is bytes:
        return {"$bytes": value.hex()}
    if kind is complex:
        return {"$complex": [_float(value.real), _float(value.imag)]}
    if isinstance(value, torch.Tensor):
        marked = {"$tensor": _named(value, path, tensors, names)}
        return {**marked, "grad": True} if value.requires_grad and value.is_leaf else marked
    if kind is np.ndarray or isinstance(value, np.generic):
        marked = {"$array": _named(_of_array(value, path), path, tensors, names)}
        return {**marked, "scalar": True} if isinstance(value, np.generic) else marked
    if kind is list:
        return [inner(item, i) for i, item in enumerate(value)]
    if kind in (tuple, torch.Size):
        return {"$tuple": [inner(item, i) for i, item in enumerate(value)]}
    if kind is Counter:
        return {"$counter": [[_key(key, path), inner(count, key)] for key, count in value.items()]}
    if kind in MAPPINGS:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: inner(item, key) for key, item in value.items()}
        return {"$items": [[_key(key, path), inner(item, key)] for key, item in value.items()]}
    raise UnsupportedState(f"{path}: a {kind.__name__} cannot be stored without pickle ({REMEDY})")


def _key(key: Any, path: str) -> Any:
    """JSON form of a mapping's key. Raises UnsupportedState for one that would not be the same key again."""
    if type(key) is tuple:
        return {"$tuple": [_key(item, path) for item in key]}
    if key is None or type(key) in (bool, int, str) or (type(key) is float and key == key):
        return _encode(key, path, {}, {}, ())
    raise UnsupportedState(
        f"{path}: the key {key!r:.80}, a {type(key).__name__}, would not be the same key again (use strings or integers)"
    )


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    bits = struct.pack(">d", value).hex()
    return {"$float": bits if math.isnan(value) and bits != NAN else str(value)}


def _named(value: torch.Tensor, path: str, tensors: dict[str, torch.Tensor], names: dict[Any, str]) -> str:
    """The tensor's name: `path`, or the one it has already."""
    key = same_memory(value)
    if key is not None and key in names:
        return names[key]
    while path in tensors:  # {1: ..., "1": ...}
        path += "'"
    tensors[path] = value
    names[key] = path
    return path


def _of_array(value: Any, path: str) -> torch.Tensor:
    """A tensor with an array's elements, in row-major order; the same memory where that is possible."""
    array = np.asarray(value)
    if not array.dtype.isnative:
        raise UnsupportedState(f"{path}: a numpy array in foreign byte order (convert it: .astype('{array.dtype.name}'))")
    usable = array.flags.c_contiguous and array.flags.writeable
    array = array if usable else np.array(array, order="C")
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UnsupportedState(
            f"{path}: a numpy array of {array.dtype} cannot be stored without pickle (convert it to numbers or strings)"
        ) from error
