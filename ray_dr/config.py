"""job.yaml -> model.job.Job: the only reader of YAML and of the environment.

    job: nightly                        # required: the name it resumes by
    store: s3://bucket/prefix           # short for a store tier with the defaults; also a directory
    workers: {nodes: 2..4, min_nodes_to_run: 1, per_node: 1, gpus_per_node: 0, cpus_per_worker: 1}
      # standby_nodes: 1, standby_processes: 1     also of workers: what waits, ready, for a node or a worker to be lost
    checkpoint:
      every: auto                       # or 30s, 500 steps, never; what a tier without its own `every` does
      tiers:
        - {kind: memory, copies: 2}       # on so many nodes, the rank's own among them
        - {kind: disk, path: /mnt/nvme/ray_dr, every: 1m, keep: {last: 2}}       # a directory of each node's own
        - {kind: s3, url: s3://bucket/prefix, every: 5m, keep: {last: 3, hourly: 24, daily: 7, weekly: 4, within: 2d}}
        - {kind: s3, url: s3://elsewhere/prefix, every: 1h}       # a second store
          # share_with: base-job    in a store tier: the job it was tuned from; what it has of it is not put again
    recovery: {unwind: 15s, start: 5m, settle: 1s, silent: 5s, attempts_without_progress: 5}
      # notices: aws                    # or gcp, azure, file:/path: who on each node knows that it will be taken away
    detection: {shadow: [straggler], off: [], preflight: true}
    deterministic: false
    seed: 0
    rpo: 2m                             # work that may be lost with all nodes; none is promised without
    overhead: 1%                        # of a step, for memory checkpoints with `every: auto`
    backend: auto                       # or gloo, nccl
    health: {non_finite: skip, skips_in_a_row: 5, spike: rollback, rollbacks: 3, check_every: 100}
    settings: {lr: 3e-4}                # the program's own, as ctx.settings

Whatever cannot hold is a ConfigError with file, line, key and remedy; nothing else is ever raised. A relative path is
relative to the file it stands in. Without a store, the directory in $RAY_DR_STORE is used, else ~/.ray_dr/store.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

from ray_dr.errors import AccessDenied, ConfigError, StoreError, StoreFull
from ray_dr.model.job import (
    DETECTORS,
    Detecting,
    DiskTier,
    Every,
    Health,
    Job,
    Keep,
    MemoryTier,
    Recovery,
    StoreTier,
    Workers,
)
from ray_dr.stores.base import Traits
from ray_dr.yaml_text import Place, Setting, compose, describe, short

T = TypeVar("T")

STORE_VARIABLE = "RAY_DR_STORE"
JOB_KEYS = (
    "job", "store", "workers", "checkpoint", "recovery", "deterministic", "seed", "overhead", "rpo", "settings", "backend",
    "detection", "health",
)  # fmt: skip
WORKER_KEYS = (
    "nodes", "min_nodes_to_run", "per_node", "gpus_per_node", "cpus_per_worker", "standby_nodes", "standby_processes",
)  # fmt: skip
RECOVERY_KEYS = ("unwind", "start", "settle", "silent", "hang", "attempts_without_progress", "notices")
DETECTION_KEYS = ("shadow", "off", "preflight")
NOTICES_VARIABLE = "RAY_DR_NOTICES"
HEALTH_KEYS = ("non_finite", "skips_in_a_row", "spike", "rollbacks", "check_every")
HEALTH_WAYS = (("non_finite", ("skip", "stop", "ignore")), ("spike", ("rollback", "ignore")))
STORE_TIER_KEYS = ("kind", "url", "path", "every", "keep", "share_with")
KEEP_KEYS = ("last", "hourly", "daily", "weekly", "within")
TIER_KINDS = ("memory", "file", "disk", "s3", "store")
SCHEMES = ("file", "s3", "memory")
NODES_MAX = 10_000
COPIES_MAX = 8
KEPT_MAX = 1_000_000

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]*(\.[a-zA-Z0-9_-]+)*")
_RANGE = re.compile(r"(\d{1,9})\s*\.\.\s*(\d{1,9})")
_NOTICE = re.compile(r"(aws|gcp|azure)(@https?://[\w.:\[\]-]+)?|file:/[^,]+")
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)\s*%")


def load(path: str | Path) -> Job:
    """The job a file describes. Raises ConfigError."""
    return parse(_read(path), str(path))


def parse(text: str, file: str = "job.yaml") -> Job:
    """The job that `text` describes; `file` is what errors call it and where its relative paths begin."""
    return _parse(text, file)[0]


def parse_keep(text: str) -> Keep:
    """The rules in `last=5,daily=7,within=2d`, as on a command line. Raises ConfigError."""
    place = Place("", 0, "--keep")
    rules = [rule.partition("=") for rule in text.split(",")]
    for name, _, value in rules:
        if not re.fullmatch(r"[a-z]+", name.strip()) or not re.fullmatch(r"[\w.]+", value.strip()):
            place.fail(f"{short(text)} says no rules", "write for example last=5,hourly=24,daily=7,weekly=4,within=2d")
    flow = ", ".join(f"{name.strip()}: {value.strip()}" for name, _, value in rules)
    return _keep(Setting(compose(f"{{{flow}}}", ""), place))


def parse_span(text: str, key: str) -> float:
    """Seconds of a duration on a command line. Raises ConfigError naming `key`."""
    place = Place("", 0, key)
    if not re.fullmatch(r"[\w. ]+", text):
        place.fail(f"{short(text)} is no duration", "write a unit: 30s, 5m")
    return Setting(compose(text, ""), place).duration_s(least=0.0)


def check_store(job: Job, path: str | Path | None = None) -> Traits:
    """What the job's store was found to guarantee. Raises ConfigError when it can't be read and written now; with `path`
    it names the line."""
    from ray_dr.stores.open import open_store, probe

    try:
        return probe(open_store(job.store.url))
    except StoreError as error:
        place = _parse(_read(path), str(path))[1] if path is not None else Place("", 0, "store")
        raise ConfigError(
            f"the store {job.store.url} cannot be used: {error}",
            remedy=_store_remedy(error), key=place.key, file=place.file, line=place.line,
        ) from error  # fmt: skip


def default_store() -> str:
    """URL of the store of a job that names none: $RAY_DR_STORE, else the local directory ~/.ray_dr/store."""
    place = Place(f"${STORE_VARIABLE}", 0, "")
    given = os.environ.get(STORE_VARIABLE, "").strip()
    return _store_url(given, place) if given else _local_default()


def store_url(text: str) -> str:
    """A store's URL as a command line gives it, meaning the same in every process. Raises ConfigError."""
    return _store_url(text, Place("", 0, "--store"))


def variables(names: Iterable[str]) -> dict[str, str]:
    """Those of these variables that this process's environment has."""
    return {name: os.environ[name] for name in names if name in os.environ}


def environment() -> dict[str, str]:
    """This process's environment, for a command that it runs."""
    return dict(os.environ)


def store_is_default(job: Job) -> bool:
    """Whether the job keeps its checkpoints in the local directory nobody chose."""
    return job.store.url == _local_default()


def _parse(text: str, file: str) -> tuple[Job, Place]:
    """The job, and where its store is said."""
    top = Setting(compose(text, file), Place(file, 1, ""))
    keys = top.sections(JOB_KEYS)
    if "job" not in keys:
        Place(file, 1, "job").fail("missing", "give the job a name to resume by: `job: my-run`")
    workers = _one(keys, "workers", _workers, Workers())
    tiers, store_place = _tiers(keys, workers, file)
    name = _job_name(keys["job"])
    if name in (tiers.store.share_with, tiers.second.share_with if tiers.second else ""):
        keys["job"].fail(f"{name} can't share with itself", "write the job it was tuned from as share_with")
    job = Job(
        name=name,
        store=tiers.store,
        workers=workers,
        memory=tiers.memory,
        disk=tiers.disk,
        second=tiers.second,
        recovery=_one(keys, "recovery", _recovery, Recovery(notices=default_notices())),
        deterministic=_one(keys, "deterministic", Setting.flag, False),
        seed=_one(keys, "seed", lambda setting: setting.whole(0, 2**53), 0),
        overhead=_one(keys, "overhead", _overhead, 0.01),
        rpo_s=_one(keys, "rpo", lambda setting: setting.duration_s(least=1.0), math.inf),
        settings=_one(keys, "settings", _settings, {}),
        backend=_one(keys, "backend", lambda setting: _backend(setting, workers), "auto"),
        detection=_one(keys, "detection", _detection, Detecting()),
        health=_one(keys, "health", _health, Health()),
    )
    return job, store_place


def _one(keys: Mapping[str, Setting], name: str, read: Callable[[Setting], T], default: T) -> T:
    return read(keys[name]) if name in keys else default


def _job_name(setting: Setting) -> str:
    name = setting.text()
    if len(name) > 64 or not _NAME.fullmatch(name):
        setting.fail(
            f"{short(name)} is no job name",
            "use at most 64 of a-z A-Z 0-9 . _ -, beginning with a letter or digit",
        )
    return name


def _workers(setting: Setting) -> Workers:
    keys = setting.sections(WORKER_KEYS)
    least, most = _one(keys, "nodes", _nodes, (1, 1))
    minimum = _one(keys, "min_nodes_to_run", lambda value: value.whole(1, NODES_MAX), 1)
    if minimum > least:
        keys["min_nodes_to_run"].fail(
            f"{minimum} is more than the {least} it may start with", f"write at most {least}, or raise workers.nodes"
        )
    gpus = _one(keys, "gpus_per_node", lambda value: value.whole(0, 1024), 0)
    per_node = _one(keys, "per_node", lambda value: value.whole(1, 1024), gpus or 1)
    if gpus % per_node:
        keys["per_node"].fail(
            f"{gpus} GPUs cannot be shared evenly by {per_node} workers", f"write a divisor of {gpus}, or leave it out"
        )
    cpus = _one(keys, "cpus_per_worker", Setting.positive, 1.0)
    spare = _one(keys, "standby_nodes", lambda value: value.whole(0, NODES_MAX), 0)
    return Workers(least, most, minimum, per_node, cpus, gpus / per_node, spare, _standby_processes(keys, per_node, gpus))


def _standby_processes(keys: Mapping[str, Setting], per_node: int, gpus: int) -> int:
    """They take the places, and the GPUs, of single workers on the same node."""
    processes = _one(keys, "standby_processes", lambda value: value.whole(0, 1024), 0)
    if processes > per_node:
        keys["standby_processes"].fail(
            f"{processes} can never be needed on a node of {per_node} workers", f"write at most {per_node}"
        )
    if processes and gpus not in (0, per_node):
        keys["standby_processes"].fail(
            f"a worker of {gpus // per_node} GPUs can't be replaced by a standby process",
            f"leave it out, or write per_node: {gpus}, a worker for each GPU",
        )
    return processes


def _nodes(setting: Setting) -> tuple[int, int]:
    value = setting.scalar()
    if isinstance(value, int):
        return (setting.whole(1, NODES_MAX),) * 2
    span = _RANGE.fullmatch(str(value).strip())
    if span is None:
        setting.fail(f"expected a number of nodes, found {describe(setting.node)}", "write 3, or a range: 2..4")
    least, most = int(span[1]), int(span[2])
    if least > most:
        setting.fail(f"the range {least}..{most} is empty", f"write the smaller number first: {most}..{least}")
    if not 1 <= least <= most <= NODES_MAX:
        setting.fail(f"{least}..{most} is out of range", f"write numbers from 1 to {NODES_MAX}")
    return least, most


def _recovery(setting: Setting) -> Recovery:
    keys, standard = setting.sections(RECOVERY_KEYS), Recovery()
    return Recovery(
        unwind_s=_one(keys, "unwind", Setting.duration_s, standard.unwind_s),
        start_s=_one(keys, "start", Setting.duration_s, standard.start_s),
        settle_s=_one(keys, "settle", lambda value: value.duration_s(least=0.0), standard.settle_s),
        attempts_without_progress=_one(
            keys, "attempts_without_progress", lambda value: value.whole(1, 1000), standard.attempts_without_progress
        ),
        silent_s=_one(keys, "silent", lambda value: value.duration_s(least=0.1), standard.silent_s),
        hang_s=_one(keys, "hang", lambda value: value.duration_s(least=0.0), standard.hang_s),
        notices=_one(keys, "notices", _notices_said, default_notices()),
    )


def _detection(setting: Setting) -> Detecting:
    keys = setting.sections(DETECTION_KEYS)
    shadow, off = (_one(keys, key, _detectors, tuple[str, ...]()) for key in ("shadow", "off"))
    if both := set(shadow) & set(off):
        keys["off"].fail(f"{min(both)} is on trial as well", "write it under shadow or under off")
    return Detecting(shadow, off, _one(keys, "preflight", Setting.flag, True))


def _detectors(setting: Setting) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.choice(DETECTORS) for item in setting.items()))


def default_notices() -> tuple[str, ...]:
    """Who is asked for notices by a job that says nothing about it: those in $RAY_DR_NOTICES, else nobody."""
    return _notices(os.environ.get(NOTICES_VARIABLE, "off"), Place(f"${NOTICES_VARIABLE}", 0, "").fail)


def _notices_said(setting: Setting) -> tuple[str, ...]:
    said = setting.scalar()
    return _notices("off" if said is False else str(said), setting.fail)  # a bare `off` is YAML's word for false


def _notices(text: str, fail: Callable[[str, str], NoReturn]) -> tuple[str, ...]:
    given = tuple(part.strip() for part in text.split(",") if part.strip() not in ("", "off"))
    for part in given:
        if not _NOTICE.fullmatch(part):
            fail(f"{short(part)} gives no notices", "write off, aws, gcp, azure, or file:/path, several with commas between")
    return given


def _health(setting: Setting) -> Health:
    keys, standard = setting.sections(HEALTH_KEYS), Health()
    non_finite, spike = (keys[name].choice(allowed) if name in keys else getattr(standard, name) for name, allowed in HEALTH_WAYS)
    found = Health(
        cast(Literal["skip", "stop", "ignore"], non_finite),
        _one(keys, "skips_in_a_row", lambda value: value.whole(1, 1_000_000), standard.skips_in_a_row),
        cast(Literal["rollback", "ignore"], spike),
        _one(keys, "rollbacks", lambda value: value.whole(0, 1000), standard.rollbacks),
        _one(keys, "check_every", lambda value: value.whole(0, 1_000_000_000), standard.check_every),
    )
    if "skips_in_a_row" in keys and found.non_finite != "skip":
        keys["skips_in_a_row"].fail(f"no step is skipped with non_finite: {found.non_finite}", "remove it, or write skip")
    return found


def _overhead(setting: Setting) -> float:
    share = _PERCENT.fullmatch(str(setting.scalar()).strip())
    if share is None:
        setting.fail(f"{describe(setting.node)} is no percentage", "write a percentage: 1%")
    if not 0 < float(share[1]) <= 100:
        setting.fail(f"{share[0]} is out of range", "write more than 0% and at most 100%")
    return float(share[1]) / 100


def _settings(setting: Setting) -> dict[str, str | int | float | bool]:
    return {name: value.scalar() for name, value in setting.sections(None).items()}


def _backend(setting: Setting, workers: Workers) -> Literal["auto", "gloo", "nccl"]:
    backend = setting.choice(("auto", "gloo", "nccl"))
    if backend == "nccl" and not workers.gpus_per_worker:
        setting.fail("nccl needs GPUs and the workers have none", "set workers.gpus_per_node, or write gloo")
    return cast(Literal["auto", "gloo", "nccl"], backend)


# -------------------------------------------------------------------------------------------------------------- tiers


@dataclass(frozen=True, slots=True)
class _Tiers:
    memory: MemoryTier
    store: StoreTier
    disk: DiskTier | None = None
    second: StoreTier | None = None


def _tiers(keys: Mapping[str, Setting], workers: Workers, file: str) -> tuple[_Tiers, Place]:
    """Where checkpoints go, and where the first store is said."""
    checkpoint = keys["checkpoint"].sections(("every", "tiers")) if "checkpoint" in keys else {}
    general = _one(checkpoint, "every", Setting.every, None)
    # `auto` leaves each tier its own default: for memory the overhead decides, for the store half a minute.
    every = general if general != Every() else None
    standard = MemoryTier(every or Every(), min(2, workers.nodes_max + workers.standby_nodes))
    tiers = _one(checkpoint, "tiers", Setting.items, None)
    if tiers is None:
        store, place = _shorthand(keys, every, file)
        return _Tiers(standard, store), place
    memories, disks, stores = _sort_tiers(tiers)
    if stores and "store" in keys:
        keys["store"].fail("the store is said twice: here and in checkpoint.tiers", "remove one of them")
    memory = _memory_tier(memories[0], standard, workers) if memories else MemoryTier(Every(seconds=math.inf), 1)
    disk = _disk_tier(disks[0], every) if disks else None
    store, place = _store_tier(stores[0], every) if stores else _shorthand(keys, every, file)
    second = _second_tier(stores[1], every, store) if len(stores) > 1 else None
    return _Tiers(memory, store, disk, second), place


def _shorthand(keys: Mapping[str, Setting], every: Every | None, file: str) -> tuple[StoreTier, Place]:
    place = keys["store"].place if "store" in keys else Place(file, 1, "store")
    url = _store_url(keys["store"].text(), place) if "store" in keys else default_store()
    return StoreTier(url, every) if every else StoreTier(url), place


def _sort_tiers(tiers: list[Setting]) -> tuple[list[dict[str, Setting]], ...]:
    """Memory, disk and store tiers: at most one, one and two."""
    memories: list[dict[str, Setting]] = []
    disks: list[dict[str, Setting]] = []
    stores: list[dict[str, Setting]] = []
    for tier in tiers:
        keys = tier.sections((*STORE_TIER_KEYS, "copies"))
        if "kind" not in keys:
            tier.fail("a tier needs a kind", f"write kind: {', '.join(TIER_KINDS)}")
        kind = keys["kind"].choice(TIER_KINDS)
        same, most = (memories, 1) if kind == "memory" else (disks, 1) if kind == "disk" else (stores, 2)
        if len(same) == most:
            tier.fail("one more tier of this sort than can be", "keep one memory, one disk and at most two store tiers")
        same.append(keys)
    return memories, disks, stores


def _disk_tier(keys: dict[str, Setting], every: Every | None) -> DiskTier:
    _refuse(keys, ("kind", "path", "url", "every", "keep"), "a disk tier")
    url, place = _place_of(keys, "disk")
    if urlsplit(url).scheme != "file":
        place.fail(f"{url} is no disk of a node", "write path: /a/dir; a bucket is a tier of kind s3")
    standard = DiskTier(url)
    last = standard.keep_last
    if "keep" in keys:
        last = _one(keys["keep"].sections(("last",)), "last", lambda value: value.whole(1, 1000), last)
    return DiskTier(url, _one(keys, "every", Setting.every, every or standard.every), last)


def _second_tier(keys: dict[str, Setting], every: Every | None, first: StoreTier) -> StoreTier:
    tier, place = _store_tier(keys, every or Every(seconds=600.0))
    if tier.url.partition("?")[0] == first.url.partition("?")[0]:
        place.fail(f"{tier.url} is the first store once more", "write another bucket or directory")
    return tier


def _memory_tier(keys: dict[str, Setting], standard: MemoryTier, workers: Workers) -> MemoryTier:
    _refuse(keys, ("kind", "copies", "every"), "a memory tier")
    copies = _one(keys, "copies", lambda value: value.whole(1, COPIES_MAX), standard.copies)
    nodes = workers.nodes_max + workers.standby_nodes
    if copies > nodes:
        keys["copies"].fail(f"{copies} copies need as many nodes, not {nodes}", f"write {nodes} or raise workers.nodes")
    return MemoryTier(_one(keys, "every", Setting.every, standard.every), copies)


def _store_tier(keys: dict[str, Setting], every: Every | None) -> tuple[StoreTier, Place]:
    _refuse(keys, STORE_TIER_KEYS, "a store tier")
    url, place = _place_of(keys, "store")
    kind, scheme = keys["kind"].text(), urlsplit(url).scheme
    if kind != "store" and scheme != ("s3" if kind == "s3" else "file"):
        place.fail(f"{url} does not fit kind: {kind}", f"write kind: {'s3' if scheme == 's3' else 'store'}")
    tier = StoreTier(url)
    cadence = _one(keys, "every", Setting.every, every or tier.every)
    keep = _one(keys, "keep", _keep, tier.keep)
    share = _one(keys, "share_with", _job_name, "")
    return StoreTier(url, cadence, keep.last, keep.hourly, keep.daily, keep.weekly, keep.within_s, share), place


def _place_of(keys: dict[str, Setting], what: str) -> tuple[str, Place]:
    """The URL that a tier's `url` or `path` says, and where it says it."""
    where = keys.get("url") or keys.get("path")
    if where is None:
        or_url = "url: s3://bucket/prefix or " if what == "store" else ""
        keys["kind"].fail(f"a {what} tier needs to know where", f"add {or_url}path: /a/dir")
    if "url" in keys and "path" in keys:
        keys["path"].fail("the tier has a url as well", "remove one of them")
    return _store_url(where.text(), where.place), where.place


def _keep(setting: Setting) -> Keep:
    keys, standard = setting.sections(KEEP_KEYS), Keep()
    hourly, daily, weekly = (_one(keys, name, lambda value: value.whole(0, KEPT_MAX), 0) for name in KEEP_KEYS[1:4])
    last = _one(keys, "last", lambda value: value.whole(1, KEPT_MAX), standard.last)
    return Keep(last, hourly, daily, weekly, _one(keys, "within", lambda value: value.duration_s(least=0.0), 0.0))


def _refuse(keys: Mapping[str, Setting], known: Sequence[str], what: str) -> None:
    for name, setting in keys.items():
        if name not in known:
            setting.fail(f"{what} has no such key", f"known keys: {', '.join(known)}")


def _store_url(text: str, place: Place) -> str:
    """The URL of a store; a path becomes an absolute file URL, so that it means the same in every process."""
    if not text.strip() or not text.isprintable():
        place.fail(f"{short(text)} is no place for a store", "write s3://bucket/prefix or a directory")
    try:
        parts = urlsplit(text)
    except ValueError as error:
        place.fail(f"{short(text)} is no URL: {error}", "write s3://bucket/prefix or a directory")
    if "://" not in text:
        base = os.path.dirname(place.file) if place.line else ""
        return _file_url(os.path.abspath(os.path.join(base, os.path.expanduser(text))))
    if parts.scheme not in SCHEMES:
        place.fail(f"no store speaks {parts.scheme or 'that'}://", "use one of file://, s3://, memory://")
    if "@" in parts.netloc:
        place.fail("credentials do not belong in a store's URL", "use the AWS environment variables or a profile")
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        place.fail(f"{text} has no absolute path", "write file:///a/directory, with three slashes")
    if parts.scheme != "file" and not parts.netloc:
        place.fail(f"{text} names no {'bucket' if parts.scheme == 's3' else 'store'}", f"write {parts.scheme}://name")
    return _file_url(unquote(parts.path), parts.query) if parts.scheme == "file" else text


def _file_url(path: str, query: str = "") -> str:
    return f"file://{quote(os.path.normpath(path))}{'?' if query else ''}{query}"


def _local_default() -> str:
    return _file_url(os.path.abspath(os.path.expanduser(os.path.join("~", ".ray_dr", "store"))))


def _store_remedy(error: StoreError) -> str:
    if isinstance(error, AccessDenied):
        return "check the credentials and their rights: list, read, write, delete"
    if isinstance(error, StoreFull):
        return "free some space, or write another store"
    return f"check its address and its rights{', and that it is up, then run again' if error.retryable else ''}"


# -------------------------------------------------------------------------------------------------------- the text


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot be read: {reason}", remedy="check the path", file=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", remedy="save it as UTF-8", file=str(path)) from error
