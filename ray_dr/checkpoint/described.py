"""A part's description on the wire: the long list of its shards as one packed text, written and read once per save plan.

The shards stay the same from save to save; turning 164 of them to JSON and back took 4 ms per save, which with a save at
every step was most of what a save cost. 16 384 of them are 2 MB, of which little is left when they are packed.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from dataclasses import replace
from typing import Any

from ray_dr.model import codec
from ray_dr.model.checkpoint import Part, Shard
from ray_dr.repository.parts import PLANS_KEPT, encode_shards

TEXT_MAX_BYTES = 2**30
"""Longer shards are refused, not unpacked: five million of them."""


def describe(part: Part) -> dict[str, Any]:
    """JSON form of a part, its shards packed."""
    bare = codec.to_json(replace(part, shards=(), scalars={}))
    return {**bare, "scalars": part.scalars, "shards": _packed(encode_shards(part.shards))}


def parse(data: dict[str, Any]) -> Part:
    """The part. Raises ValueError when the data does not fit."""
    if not isinstance(data["shards"], str):
        raise ValueError("shards are one text")
    part: Part = codec.from_json(Part, {**data, "shards": [], "scalars": {}})
    return replace(part, shards=_shards(data["shards"]), scalars=data["scalars"])


@functools.lru_cache(PLANS_KEPT)
def _packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(), 1)).decode()


@functools.lru_cache(PLANS_KEPT)
def _shards(packed: str) -> tuple[Shard, ...]:
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(base64.b64decode(packed, validate=True), TEXT_MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"shards can't be unpacked: {error}") from error
    if not unpack.eof:
        raise ValueError("shards are cut off, or too long")
    found: tuple[Shard, ...] = codec.from_json(tuple[Shard, ...], json.loads(text))
    return found
