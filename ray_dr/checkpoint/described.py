"""A part's description on the wire: the long list of its shards as one text, written and read once per save plan.

The shards stay the same from save to save; turning 164 of them to JSON and back took 4 ms per save, which with a save at
every step was most of what a save cost.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

from ray_dr.model import codec
from ray_dr.model.checkpoint import Part, Shard

PLANS_KEPT = 16

_texts: dict[int, tuple[tuple[Shard, ...], str]] = {}


def describe(part: Part) -> dict[str, Any]:
    """JSON form of a part, its shards as text."""
    bare = codec.to_json(replace(part, shards=(), scalars={}))
    return {**bare, "scalars": part.scalars, "shards": _text(part.shards)}


def parse(data: dict[str, Any]) -> Part:
    """The part. Raises ValueError when the data does not fit."""
    if not isinstance(data["shards"], str):
        raise ValueError("shards are one text")
    part: Part = codec.from_json(Part, {**data, "shards": [], "scalars": {}})
    return replace(part, shards=_shards(data["shards"]), scalars=data["scalars"])


def _text(shards: tuple[Shard, ...]) -> str:
    """By identity: comparing a plan's shards would cost as much as writing them."""
    known = _texts.get(id(shards))
    if known is not None and known[0] is shards:
        return known[1]
    text = json.dumps(codec.to_json(shards), separators=(",", ":"))
    for oldest in list(_texts)[: 1 - PLANS_KEPT]:  # a copy: other threads add and remove meanwhile
        _texts.pop(oldest, None)
    _texts[id(shards)] = (shards, text)
    return text


@functools.lru_cache(PLANS_KEPT)
def _shards(text: str) -> tuple[Shard, ...]:
    found: tuple[Shard, ...] = codec.from_json(tuple[Shard, ...], json.loads(text))
    return found
