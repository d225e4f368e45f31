"""A job's program in its store: what `ray-dr resume` runs when the cluster, and whoever submitted the job, are gone.

    jobs/<job>/program.json         model.lease.Program
    jobs/<job>/program/<digest>     the pickled training function; the working directory as a zip

It is the one thing in a store that becomes code, and only where somebody asks for it by `resume` or `guard`: no restore, no
supervisor and no other verb reads it. Blobs are named by the first half of their BLAKE3 hash, and it is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from blake3 import blake3

from ray_dr.errors import AlreadyExists, NotFound, StoreError
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.lease import Program
from ray_dr.repository.layout import DIGEST_CHARS, job_prefix
from ray_dr.stores.base import Store


def program_key(job: str) -> str:
    """Where the description lies."""
    return f"{job_prefix(job)}program.json"


def blob_key(job: str, digest: str) -> str:
    """Where its bytes lie."""
    return f"{job_prefix(job)}program/{digest}"


def digest_of(data: bytes) -> str:
    """What a blob is called."""
    return str(blake3(data).hexdigest())[:DIGEST_CHARS]


def write_program(store: Store, job: str, program: Program, blobs: Mapping[str, bytes]) -> bool:
    """Keep a program, in place of the one before. False: that one is the same, nothing was written. Raises StoreError."""
    assert {program.train, *filter(None, (program.package,))} <= blobs.keys(), "what is named is kept"
    with suppress(StoreError):  # one that can't be read is replaced
        before = read_program(store, job)
        if before is not None and replace(before, term=program.term, at=program.at) == program:
            return False
    for digest, data in blobs.items():
        with suppress(AlreadyExists):
            store.put(blob_key(job, digest), data, if_absent=True)
    store.put(program_key(job), json.dumps(to_json(program), sort_keys=True, separators=(",", ":")).encode())
    for entry in list(store.list(blob_key(job, ""))):
        if entry.key.rpartition("/")[2] not in blobs:
            store.delete(entry.key)
    return True


def read_program(store: Store, job: str) -> Program | None:
    """The program, None when none was kept. Raises StoreError, also for one that is damaged."""
    try:
        program: Program = from_json(Program, json.loads(store.get(program_key(job))))
    except NotFound:
        return None
    except (ValueError, TypeError) as error:
        what = f"the job's program is damaged, or of another version of ray_dr ({error})"
        raise StoreError(what, key=program_key(job)) from error
    return program


def read_blob(store: Store, job: str, digest: str) -> bytes:
    """The bytes of that name, compared with it. Raises StoreError."""
    data = store.get(blob_key(job, digest))
    if digest_of(data) != digest:
        raise StoreError("the job's program is damaged: its bytes do not match their hash", key=blob_key(job, digest))
    return data
