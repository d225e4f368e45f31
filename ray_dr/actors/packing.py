"""A supervisor's program as it can be kept: the pickled function, the working directory, the runtime environment; and back."""

from __future__ import annotations

import io
import os
import platform
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import ray

from ray_dr.errors import StoreError
from ray_dr.model import codec
from ray_dr.model.job import Job
from ray_dr.model.lease import Program
from ray_dr.repository.program import digest_of

PACKAGE_MAX_BYTES = 100 * 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)
_UPLOADED = "gcs://"
"""Ray's own store of packages, which dies with the head."""


def describe(job: Job, term: int, train: bytes) -> tuple[Program, dict[str, bytes]]:
    """The program of the process that this is called in, a supervisor's, and its blobs."""
    environment = dict(ray.get_runtime_context().runtime_env)
    blobs = {digest_of(train): train}
    program = Program(codec.to_json(job), digest_of(train), platform.python_version(), ray.__version__, term, time.time())
    home = Path.cwd() if environment.pop("working_dir", None) else None
    if home is not None:
        program = _with_package(program, home, blobs)
    program = _with_environment(program, environment, keep_values=is_encrypted(job.store.url))
    return replace(program, paths=_own_paths(home)), blobs


def is_encrypted(url: str) -> bool:
    """Whether what is put there is unreadable without a key."""
    return "key" in parse_qs(urlsplit(url).query)


def _with_package(program: Program, home: Path, blobs: dict[str, bytes]) -> Program:
    packed = pack(home)
    if packed is None:
        what = f"the working directory ({home}) has more than {PACKAGE_MAX_BYTES >> 20} MiB"
        return replace(program, missing=(*program.missing, what))
    blobs[digest_of(packed)] = packed
    return replace(program, package=digest_of(packed))


def _with_environment(program: Program, environment: Mapping[str, Any], *, keep_values: bool) -> Program:
    rest = {name: value for name, value in environment.items() if name != "env_vars" and not name.startswith("_") and value}
    uploaded = sorted(name for name, value in rest.items() if _UPLOADED in str(value))
    lost = tuple(f"{name} of the runtime environment, which lay in the cluster" for name in uploaded)
    variables = {str(name): str(value) for name, value in (environment.get("env_vars") or {}).items()}
    return replace(
        program,
        env=variables if keep_values else {},
        names=() if keep_values else tuple(sorted(variables)),
        runtime={name: value for name, value in rest.items() if name not in uploaded},
        missing=(*program.missing, *lost),
    )


def _own_paths(home: Path | None) -> tuple[str, ...]:
    """Directories of Python's path that came with whoever submitted the job: not installed, and not the working directory."""
    installed = tuple(os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, os.path.dirname(ray.__file__)))
    found = dict.fromkeys(os.path.realpath(path) for path in sys.path if path and os.path.isdir(path))
    inside = (*installed, str(home)) if home else installed
    return tuple(path for path in found if not path.startswith(inside))


def pack(directory: Path) -> bytes | None:
    """The files below a directory as a zip, the same bytes for the same files; None when they are too many."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    if sum(path.stat().st_size for path in files) > PACKAGE_MAX_BYTES:
        return None
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(str(path.relative_to(directory)), _EPOCH)
            entry.external_attr = (path.stat().st_mode & 0o777) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    return sink.getvalue()


def unpack(packed: bytes, directory: Path) -> None:
    """Write the files of a zip below a directory. Raises StoreError for one that names places outside of it."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        for entry in archive.infolist():
            place = (directory / entry.filename).resolve()
            if not place.is_relative_to(directory.resolve()):
                raise StoreError(f"the kept working directory names a place outside of it: {entry.filename!r}")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(archive.read(entry))
            place.chmod((entry.external_attr >> 16) & 0o777 or 0o644)
