"""Values to JSON and back, without pickle and without per-class code.

A dataclass becomes an object of its fields; where a field's type is a union of dataclasses, the object carries
`"type": "<class name>"`. Tuples become arrays, enums their values. Unknown fields are refused: a record of a newer
format must not be read as if it were understood.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

PLAIN = (str, int, float, bool, types.NoneType)


def to_json(value: Any, *, tagged: bool = False) -> Any:
    """JSON form of a value. `tagged` adds the class name, for a union's member at top level."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind in (tuple, list):
        return [to_json(item, tagged=tagged) for item in value]
    if dataclasses.is_dataclass(kind):
        out: dict[str, Any] = {"type": kind.__name__} if tagged else {}
        for name, union in _fields(kind):
            item = getattr(value, name)
            out[name] = item if type(item) in PLAIN else to_json(item, tagged=union)
        return out
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (tuple, list, frozenset)):
        return [to_json(item, tagged=tagged) for item in (sorted(value) if isinstance(value, frozenset) else value)]
    if isinstance(value, Mapping):
        return {str(key): to_json(item, tagged=tagged) for key, item in value.items()}
    return value


def from_json(kind: Any, data: Any) -> Any:
    """Value of type `kind` (a dataclass, an enum, a container, a union of dataclasses) from its JSON form.

    Raises ValueError naming the field when the data does not fit.
    """
    return _reader(kind)(data)


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What turns JSON data into a `kind`: found once for each type, because a part list has 100 000 chunks."""
    origin, arms = get_origin(kind), get_args(kind)
    if kind is Any or kind is None or kind is types.NoneType or kind is object:
        return lambda data: data
    if origin in (Union, types.UnionType):
        return lambda data: _union_from_json(arms, data)
    if origin is tuple:
        return _tuple_reader(arms)
    if origin in (list, frozenset):
        return lambda data: origin(map(_reader(arms[0]), data))
    if origin in (dict, Mapping) or (origin is not None and isinstance(origin, type) and issubclass(origin, Mapping)):
        return lambda data: {key: _reader(arms[1])(item) for key, item in data.items()}
    if origin is typing.Literal:
        return lambda data: _literal_from_json(arms, data)
    if isinstance(kind, typing.NewType):
        return _reader(kind.__supertype__)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind
    if dataclasses.is_dataclass(kind):
        return lambda data: _dataclass_from_json(kind, data)
    if isinstance(kind, type):
        return lambda data: _checked(kind, data)
    return lambda data: data


def _checked(kind: type, data: Any) -> Any:
    if kind is float and isinstance(data, int):
        return float(data)
    if not isinstance(data, kind):
        raise ValueError(f"expected {kind.__name__}, found {type(data).__name__}")
    return data


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, bool], ...]:
    """(name, whether its type is a union of dataclasses) of each field."""
    hints = typing.get_type_hints(kind)
    return tuple((field.name, _holds_union(hints[field.name])) for field in dataclasses.fields(kind))


@functools.cache
def _readers(kind: type) -> dict[str, Callable[[Any], Any]]:
    hints = typing.get_type_hints(kind)
    return {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)}


def _holds_union(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return sum(dataclasses.is_dataclass(arm) for arm in get_args(hint)) > 1
    return any(_holds_union(arm) for arm in get_args(hint))


def _union_from_json(arms: tuple[Any, ...], data: Any) -> Any:
    if data is None and types.NoneType in arms:
        return None
    classes = [arm for arm in arms if dataclasses.is_dataclass(arm)]
    if isinstance(data, Mapping) and "type" in data:
        for arm in classes:
            if typing.cast(type, arm).__name__ == data["type"]:
                return _dataclass_from_json(arm, {key: item for key, item in data.items() if key != "type"})
        raise ValueError(f"unknown type {data['type']!r}")
    for arm in arms:
        if arm is types.NoneType:
            continue
        try:
            return from_json(arm, data)
        except (ValueError, TypeError):
            continue
    raise ValueError(f"no member of the union fits {data!r}")


def _tuple_reader(arms: tuple[Any, ...]) -> Callable[[Any], tuple[Any, ...]]:
    if len(arms) == 2 and arms[1] is Ellipsis:
        return lambda data: tuple(map(_reader(arms[0]), data))

    def read(data: Any) -> tuple[Any, ...]:
        if len(arms) != len(data):
            raise ValueError(f"expected {len(arms)} items, found {len(data)}")
        return tuple(from_json(arm, item) for arm, item in zip(arms, data, strict=True))

    return read


def _literal_from_json(allowed: tuple[Any, ...], data: Any) -> Any:
    if data not in allowed:
        raise ValueError(f"expected one of {allowed}, found {data!r}")
    return data


def _dataclass_from_json(kind: Any, data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__}: expected an object, found {type(data).__name__}")
    readers = _readers(kind)
    values = {}
    for name, item in data.items():
        if name not in readers:
            if name == "type":
                continue
            raise ValueError(f"{kind.__name__}: unknown fields {sorted(set(data) - readers.keys() - {'type'})}")
        try:
            values[name] = readers[name](item)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{kind.__name__}.{name}: {error}") from error
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from error
