"""A checkpoint's objects as nested values: JSON, with `{"$tensor": name}` where a tensor belongs.

What is stored says so for most objects. A module is stored as nothing but its tensors, and the tensors of an
optimizer's state are known by their names alone; here they get their places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def nested(name: str, scalars: Any, tensors: Iterable[str]) -> Any:
    """One object as a nested value.

    scalars  its JSON value; None for a module
    tensors  the names of all its tensors
    """
    loose = sorted(set(tensors) - set(tensors_in(scalars)))
    if scalars is None:
        return {path.removeprefix(f"{name}/"): {"$tensor": path} for path in loose}
    if not loose:
        return scalars
    state = {label: dict(values) for label, values in scalars["state"].items()}
    for path in loose:
        label, _, key = path.removeprefix(f"{name}/state/").rpartition("/")
        state.setdefault(label, {})[key] = {"$tensor": path}
    return {**scalars, "state": state}


def by_object(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of tensors by the object they belong to."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition("/")[0], []).append(name)
    return found


def objects_of(scalars: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Any]:
    """All objects of a checkpoint as nested values."""
    belonging = by_object(tensors)
    names = sorted(scalars.keys() | belonging.keys())
    return {name: nested(name, scalars.get(name), belonging.get(name, ())) for name in names}


def tensors_in(value: Any) -> Iterator[str]:
    """Names of the tensors that an encoded value refers to."""
    match value:
        case {"$tensor": path} | {"$array": path}:
            yield path
        case dict():
            for item in value.values():
                yield from tensors_in(item)
        case list():
            for item in value:
                yield from tensors_in(item)
