"""Where everything lies in a store. No other module writes a key by hand, but for those that are named here.

    jobs/<job>/log/<seq>.json                            the commit log, numbered from 1 without a gap
    jobs/<job>/log/<seq>.mark                            empty: says that the log has this number
    jobs/<job>/parts/<save>/r<rank>-<digest>.json        part lists, named by the first half of their BLAKE3 hash
    jobs/<job>/chunks/<save>/<id>                        bytes, named by their BLAKE3 hash and the save that put them
    jobs/<job>/journal/<term>-<segment>.jsonl            journal segments, written by `telemetry.journal`
    jobs/<job>/live.json                                 what goes on now, overwritten by `telemetry.live`
    jobs/<job>/lease/<term>.json                         a supervisor's sign of life, overwritten by `repository.lease`
    jobs/<job>/guard.json                                what a guard has done about its absence, by `repository.lease`
    jobs/<job>/program.json, program/<digest>            what `resume` runs, by `repository.program`
    nodes/<machine>/<milliseconds>-<digest>.json         what is held against machines, by `telemetry.nodes`
    keys/<data key>-<wrapper>.json                       of an encrypted store only, written by `stores.keys`

<save> is <attempt>-<step>-<term>. A later save of the job, or of another one (see `sharing`), may reuse its chunks; when
they may go is told in `prune`.
"""

from __future__ import annotations

import re

from ray_dr.errors import StoreError
from ray_dr.model.checkpoint import Chunk, VersionId

_JOB = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9._=-]{0,127}$")
_LOG = re.compile(r"/log/(\d{12})\.(?:json|mark)$")
_SAVE = re.compile(r"/(?:parts|chunks)/((\d{6,})-(\d{12,})-(\d{6,}))/")

_PART = re.compile(r"/r(\d{5,})-([0-9a-f]{32})\.json$")

JOBS_PREFIX = "jobs/"
DIGEST_CHARS = 32
"""Of a part list's hash in its name: the first half."""


def job_prefix(job: str) -> str:
    if not _JOB.match(job) or ".." in job:
        raise StoreError(f"not a valid job name ({_JOB.pattern})", key=job)
    return f"{JOBS_PREFIX}{job}/"


def log_prefix(job: str) -> str:
    return f"{job_prefix(job)}log/"


def log_key(job: str, seq: int) -> str:
    return f"{log_prefix(job)}{seq:012d}.json"


def mark_key(job: str, seq: int) -> str:
    return f"{log_prefix(job)}{seq:012d}.mark"


def log_seq(key: str) -> int | None:
    """The number of a log entry, or of the mark that there was one; None for any other key."""
    found = _LOG.search(key)
    return int(found[1]) if found else None


def parts_prefix(job: str) -> str:
    return f"{job_prefix(job)}parts/"


def save_folder(version: VersionId, term: int) -> str:
    """The name of one save of a version: by a writer of one term."""
    return f"{version.attempt:06d}-{version.step:012d}-{term:06d}"


def part_key(job: str, version: VersionId, *, term: int, rank: int, digest: str) -> str:
    return f"{parts_prefix(job)}{save_folder(version, term)}/r{rank:05d}-{digest[:DIGEST_CHARS]}.json"


def part_of(key: str) -> tuple[int, str] | None:
    """The rank and the first DIGEST_CHARS of the hash of a part list; None for any other key."""
    found = _PART.search(key)
    return (int(found[1]), found[2]) if found else None


def folder_of(key: str) -> str:
    """The save that a part list or chunk belongs to; empty for any other key."""
    found = _SAVE.search(key)
    return found[1] if found else ""


def version_of(key: str) -> VersionId | None:
    """The version whose save put a part list or chunk; None for any other key."""
    found = _SAVE.search(key)
    return VersionId(int(found[2]), int(found[3])) if found else None


def chunks_prefix(job: str, folder: str = "") -> str:
    """All chunks of a job, or of one of its saves."""
    return f"{job_prefix(job)}chunks/{folder}{'/' if folder else ''}"


def chunk_key(job: str, chunk: Chunk) -> str:
    """Where a chunk that `job` names lies: in one of its own saves, or in one of another job's."""
    assert chunk.folder, f"chunk {chunk.id} is in no store"
    other, _, folder = chunk.folder.rpartition("/")
    return f"{chunks_prefix(other or job, folder)}{chunk.id}"
