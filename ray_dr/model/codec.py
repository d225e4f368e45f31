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
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def to_json(value: Any, *, tagged: bool = False) -> Any:
    """JSON form of a value. `tagged` adds the class name, for a union's member at top level."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        out: dict[str, Any] = {"type": type(value).__name__} if tagged else {}
        for field in dataclasses.fields(value):
            out[field.name] = _field_to_json(getattr(value, field.name), hints[field.name])
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
    origin = get_origin(kind)
    if kind is Any or kind is None or kind is types.NoneType or kind is object:
        return data
    if origin in (Union, types.UnionType):
        return _union_from_json(get_args(kind), data)
    if origin is tuple:
        return _tuple_from_json(get_args(kind), data)
    if origin in (list, frozenset):
        return origin(from_json(get_args(kind)[0], item) for item in data)
    if origin in (dict, Mapping) or (origin is not None and isinstance(origin, type) and issubclass(origin, Mapping)):
        return {key: from_json(get_args(kind)[1], item) for key, item in data.items()}
    if origin is typing.Literal:
        return _literal_from_json(get_args(kind), data)
    if isinstance(kind, typing.NewType):
        return from_json(kind.__supertype__, data)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(data)
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(kind, data)
    if kind is float and isinstance(data, int):
        return float(data)
    if isinstance(kind, type) and not isinstance(data, kind):
        raise ValueError(f"expected {kind.__name__}, found {type(data).__name__}")
    return data


def _field_to_json(value: Any, hint: Any) -> Any:
    return to_json(value, tagged=_holds_union(hint))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


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


def _tuple_from_json(arms: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    if len(arms) == 2 and arms[1] is Ellipsis:
        return tuple(from_json(arms[0], item) for item in data)
    if len(arms) != len(data):
        raise ValueError(f"expected {len(arms)} items, found {len(data)}")
    return tuple(from_json(arm, item) for arm, item in zip(arms, data, strict=True))


def _literal_from_json(allowed: tuple[Any, ...], data: Any) -> Any:
    if data not in allowed:
        raise ValueError(f"expected one of {allowed}, found {data!r}")
    return data


def _dataclass_from_json(kind: Any, data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__}: expected an object, found {type(data).__name__}")
    hints = _hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = set(data) - names - {"type"}
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown fields {sorted(unknown)}")
    values = {}
    for name in names & set(data):
        try:
            values[name] = from_json(hints[name], data[name])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{kind.__name__}.{name}: {error}") from error
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from error
