"""Part lists: one JSON object per rank and version, named in the manifest together with its hash."""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from ray_dr.errors import CheckpointError, CorruptChunk
from ray_dr.model.checkpoint import Part, PartRef
from ray_dr.model.codec import from_json, to_json
from ray_dr.repository.layout import part_key
from ray_dr.stores.base import Store


def encode_part(part: Part) -> bytes:
    """The object's bytes: JSON in ASCII, keys sorted, but for the state's own mappings: those keep their order."""
    fields = sorted(to_json(part).items())
    return ("{" + ",".join(f'"{name}":{_text(value, name)}' for name, value in fields) + "}").encode()


def _text(value: Any, field: str) -> str:
    return json.dumps(value, sort_keys=field != "scalars", separators=(",", ":"))


def write_part(store: Store, job: str, part: Part, *, term: int, base: str = "") -> PartRef:
    """Store a part list and say where it is. Storing an equal one again changes nothing.

    Its name holds its hash, so that no part list ever overwrites a different one, which a manifest may already name:
    a save that was cut off and is repeated may carry other step records, or reuse other chunks.
    base    digest of the part list whose chunks are reused
    """
    data = encode_part(part)
    digest = _digest(data)
    key = part_key(job, part.version, term=term, rank=part.rank, digest=digest)
    store.put(key, data)
    return PartRef(part.rank, key, digest, len(data), base)


def read_part(store: Store, ref: PartRef) -> Part:
    """The part that `ref` names, verified. Raises NotFound, CorruptChunk; CheckpointError for a newer format."""
    data = store.get(ref.key)
    if _digest(data) != ref.digest:
        raise CorruptChunk(ref.digest, source=f"{store.url}/{ref.key}")
    try:
        return _decode(data)
    except ValueError as error:
        raise CheckpointError(f"{store.url}/{ref.key} can't be read: {error}") from error


def _decode(data: bytes) -> Part:
    part = from_json(Part, json.loads(data))
    assert isinstance(part, Part)
    return part


def _digest(data: bytes) -> str:
    return str(blake3(data).hexdigest())
