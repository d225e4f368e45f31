"""YAML text as settings that know where they stand: every complaint names file, line, key and remedy.

Works on PyYAML's node tree, not on the values it would construct: nodes have lines, show keys given twice, and
construct nothing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

import yaml

from ray_dr.errors import ConfigError
from ray_dr.model.job import Every

SECONDS_MAX = 366 * 86_400.0
PLAIN_TAGS = ("str", "int", "float", "bool", "timestamp", "value")

_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*([a-z]+)")
_STEPS = re.compile(r"(\d{1,12})\s*steps?")
_WHOLE = re.compile(r"[-+]?\d{1,18}")
_NUMBER = re.compile(r"[-+]?(\d{1,18}(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?")
_UNITS_S = {
    "ms": 0.001, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "m": 60.0, "min": 60.0, "minute": 60.0,
    "minutes": 60.0, "h": 3600.0, "hour": 3600.0, "hours": 3600.0, "d": 86400.0, "day": 86400.0, "days": 86400.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a setting stands. `key` is dotted, as in `checkpoint.tiers[1].url`."""

    file: str
    line: int
    key: str

    def fail(self, what: str, remedy: str) -> NoReturn:
        raise ConfigError(what, remedy=remedy, key=self.key, file=self.file, line=self.line)


@dataclass(frozen=True, slots=True)
class Setting:
    """One node of the file and its place."""

    node: yaml.Node
    place: Place

    def fail(self, what: str, remedy: str) -> NoReturn:
        self.place.fail(what, remedy)

    def sections(self, known: Sequence[str] | None) -> dict[str, Setting]:
        """The keys of a mapping; `known` None allows any. Raises on an unknown key or one given twice."""
        if not isinstance(self.node, yaml.MappingNode):
            self.fail(f"expected keys and values, found {describe(self.node)}", "write `key: value` lines below it")
        found: dict[str, Setting] = {}
        for key_node, value_node in self.node.value:
            name = _key(key_node, self.place)
            dotted = f"{self.place.key}.{name}" if self.place.key else name
            place = Place(self.place.file, key_node.start_mark.line + 1, dotted)
            if known is not None and name not in known:
                place.fail("unknown key", did_you_mean(name, known))
            if name in found:
                place.fail(f"given twice, first in line {found[name].place.line}", "remove one of them")
            found[name] = Setting(value_node, place)
        return found

    def items(self) -> list[Setting]:
        """The members of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.fail(f"expected a list, found {describe(self.node)}", "write `- ` lines, or [..., ...]")
        return [
            Setting(node, Place(self.place.file, node.start_mark.line + 1, f"{self.place.key}[{index}]"))
            for index, node in enumerate(self.node.value)
        ]

    def scalar(self) -> str | int | float | bool:
        """A plain value. `3e-4` is a number here, though YAML 1.1 reads it as text."""
        text = self._scalar_text()
        if cast(yaml.ScalarNode, self.node).style is not None:
            return text
        if _is(self.node, "bool"):
            return text.lower() in ("true", "yes", "on")
        if _WHOLE.fullmatch(text):
            return int(text)
        if _NUMBER.fullmatch(text):
            return self.finite(float(text))
        if not _is(self.node, "str"):
            self.fail(f"found {describe(self.node)}", "write text, a number, true or false; put text in quotes")
        return text

    def text(self) -> str:
        value = self._scalar_text()
        if not _is(self.node, "str"):
            self.fail(f"expected text, found {describe(self.node)}", "put it in quotes")
        return value

    def choice(self, allowed: Sequence[str]) -> str:
        value = self.text()
        if value not in allowed:
            self.fail(f"{short(value)} is not known here", did_you_mean(value, allowed))
        return value

    def flag(self) -> bool:
        if not _is(self.node, "bool"):
            self.fail(f"expected true or false, found {describe(self.node)}", "write true or false")
        return bool(self.scalar())

    def whole(self, least: int, most: int) -> int:
        value = self.scalar()
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"expected a whole number, found {describe(self.node)}", f"write one from {least} to {most}")
        if not least <= value <= most:
            self.fail(f"{value} is out of range", f"write a whole number from {least} to {most}")
        return value

    def positive(self) -> float:
        value = self.scalar()
        if isinstance(value, (bool, str)):
            self.fail(f"expected a number, found {describe(self.node)}", "write a number above 0")
        if not value > 0:
            self.fail(f"{value} is out of range", "write a number above 0")
        return float(value)

    def finite(self, value: float) -> float:
        if not math.isfinite(value):
            self.fail(f"{self._scalar_text()} is no finite number", "write a smaller one")
        return value

    def duration_s(self, *, least: float = 0.001) -> float:
        """Seconds. A bare number is refused."""
        seconds = seconds_of(str(self.scalar()))
        if seconds is None:
            self.fail(f"{describe(self.node)} is no duration", "write a unit: 30s, 5m")
        if not least <= seconds <= SECONDS_MAX:
            self.fail(f"{self._scalar_text()} is out of range", f"write a duration from {least:g}s to 366d")
        return seconds

    def every(self) -> Every:
        text = str(self.scalar()).strip()
        if text == "auto":
            return Every()
        if text == "never":
            return Every(seconds=math.inf)
        if steps := _STEPS.fullmatch(text):
            if int(steps[1]) == 0:
                self.fail("0 steps is out of range", "write 1 step or more, or never")
            return Every(steps=int(steps[1]))
        if seconds_of(text) is None:
            self.fail(f"{describe(self.node)} is no interval", "write auto, never, 500 steps, 30s or 5m")
        return Every(seconds=self.duration_s())

    def _scalar_text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode) or _is(self.node, "null"):
            self.fail(f"expected a value, found {describe(self.node)}", "write a value, or remove the key")
        if self.node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
            self.fail(f"has the tag {short(self.node.tag)}", "write plain values, without !tags")
        return str(self.node.value)


def compose(text: str, file: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise ConfigError("too deeply nested", remedy="write it flatter", file=file, line=1) from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError) as error:
        # PyYAML lets a few of Python's own errors through, for example on an escape beyond Unicode.
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        line = mark.line + 1 if mark else 1
        remedy = "check colons, quotes and indentation"
        raise ConfigError(f"not YAML: {what}", remedy=remedy, file=file, line=line) from error
    if node is None:
        raise ConfigError("the file is empty", remedy="begin with `job: my-run`", file=file, line=1)
    return node


def _key(node: yaml.Node, place: Place) -> str:
    if not isinstance(node, yaml.ScalarNode) or not 0 < len(node.value) <= 200 or not node.value.isprintable():
        Place(place.file, node.start_mark.line + 1, place.key).fail(f"{describe(node)} is no key", "keys are words")
    return str(node.value)


def _is(node: yaml.Node, tag: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == f"tag:yaml.org,2002:{tag}"


def describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if _is(node, "null"):
        return "nothing"
    return short(str(node.value)) if _is(node, "str") else str(node.value)[:60]


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def seconds_of(text: str) -> float | None:
    found = _DURATION.fullmatch(text.strip())
    return float(found[1]) * _UNITS_S[found[2]] if found and found[2] in _UNITS_S else None


def did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
