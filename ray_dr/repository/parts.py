"""Part lists: one JSON object per rank and version, named in the manifest together with its hash."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from blake3 import blake3

from ray_dr.errors import CheckpointError, CorruptChunk
from ray_dr.model.checkpoint import Part, PartRef, Shard
from ray_dr.model.codec import from_json, to_json
from ray_dr.repository.layout import DIGEST_CHARS, part_key, part_of
from ray_dr.stores.base import Store

PLANS_KEPT = 16

_texts: dict[int, tuple[tuple[Shard, ...], str]] = {}


def encode_part(part: Part) -> bytes:
    """The object's bytes: JSON in ASCII, keys sorted, but for the state's own mappings: those keep their order."""
    texts = {name: _text(value, name) for name, value in to_json(replace(part, shards=())).items()}
    texts["shards"] = encode_shards(part.shards)
    return ("{" + ",".join(f'"{name}":{text}' for name, text in sorted(texts.items())) + "}").encode()


def encode_shards(shards: tuple[Shard, ...]) -> str:
    """JSON of a part's shards, as it stands in its list. Kept for the last PLANS_KEPT plans, as it stays the same from save to
    save; found by identity: comparing shards would cost as much as writing them."""
    known = _texts.get(id(shards))
    if known is not None and known[0] is shards:
        return known[1]
    text = _text(to_json(shards), "shards")
    for oldest in list(_texts)[: 1 - PLANS_KEPT]:  # a copy: other threads add and remove meanwhile
        _texts.pop(oldest, None)
    _texts[id(shards)] = (shards, text)
    return text


def _text(value: Any, field: str) -> str:
    return json.dumps(value, sort_keys=field != "scalars", separators=(",", ":"))


def write_part(store: Store, job: str, part: Part, *, term: int, base: str = "") -> PartRef:
    """Store a part list and say where it is. Storing an equal one again changes nothing.

    Its name holds its hash, so that no part list ever overwrites a different one, which a manifest may already name:
    a save that was cut off and is repeated may carry other step records, or reuse other chunks.
    base    digest of a part list of the checkpoint whose chunks are reused
    """
    data = encode_part(part)
    digest = _digest(data)
    key = part_key(job, part.version, term=term, rank=part.rank, digest=digest)
    store.put(key, data)
    return PartRef(part.rank, key, digest, len(data), base)


def read_part(store: Store, ref: PartRef) -> Part:
    """The part that `ref` names, verified. Raises NotFound, CorruptChunk; CheckpointError for a newer format."""
    return parse_part(store, ref, read_list(store, ref))


def read_list(store: Store, ref: PartRef) -> bytes:
    """The object that `ref` names, verified. Raises NotFound, CorruptChunk."""
    data = store.get(ref.key)
    if _digest(data) != ref.digest:
        raise CorruptChunk(ref.digest, source=f"{store.url}/{ref.key}")
    return data


def parse_part(store: Store, ref: PartRef, data: bytes) -> Part:
    """The part in an object's bytes. Raises CheckpointError for a newer format."""
    return _parsed(data, f"{store.url}/{ref.key}")


def read_listed(store: Store, key: str) -> Part:
    """The part in the object that a listing showed, verified by the hash in its name. Raises as `read_part`."""
    data = store.get(key)
    named = part_of(key)
    if named is None or _digest(data)[:DIGEST_CHARS] != named[1]:
        raise CorruptChunk(named[1] if named else "", source=f"{store.url}/{key}")
    return _parsed(data, f"{store.url}/{key}")


def _parsed(data: bytes, name: str) -> Part:
    try:
        part = from_json(Part, json.loads(data))
    except ValueError as error:
        raise CheckpointError(f"{name} can't be read: {error}") from error
    assert isinstance(part, Part)
    return part


def _digest(data: bytes) -> str:
    return str(blake3(data).hexdigest())
