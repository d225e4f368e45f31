"""`ray_dr.save` and `ray_dr.load`: checkpoints without a cluster, in the same repository format.

With `torch.distributed` initialised, every rank of the default group calls them, in the same order and with the same
arguments; each writes and reads its own share. What ranks tell each other goes over a Gloo group of its own, so that it
never mixes with the program's collectives. An error on one rank is an error on all, and nothing was committed or loaded.

`save_async` is a function of its own and not an argument of `save`, because it gives something else: a save that is
under way. It copies the state to memory, returns, and writes from a background thread. One is under way at a time: the
next one first waits for it, so that one copy of the state is the most it takes.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ray_dr.checkpoint.direct import DEFAULT_JOB, DirectJob, Opening, find_version
from ray_dr.checkpoint.memory import Pool
from ray_dr.checkpoint.reader import StoreSource, read_state
from ray_dr.checkpoint.restore_plan import Index, build_index
from ray_dr.errors import CheckpointError, ConfigError, CorruptChunk, IncompatibleState, UnsupportedState
from ray_dr.model.checkpoint import Box, Manifest, Part, VersionId
from ray_dr.repository.parts import read_part
from ray_dr.stores.open import open_store
from ray_dr.train.data import Data
from ray_dr.train.restore import wanted
from ray_dr.train.staging import Planner, stage
from ray_dr.train.state import Target, bytes_of, flatten
from ray_dr.train.tree import Tree, alike, differences, overlaps, settle, wrap

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """A committed checkpoint: its step, this rank's bytes of state, and how many of them had to be sent."""

    step: int
    attempt: int
    size: int
    sent: int


class Saving:
    """A save that is under way."""

    def __init__(self, future: Future[Saved]) -> None:
        self._future = future

    def wait(self, timeout_s: float | None = None) -> Saved:
        """The checkpoint, when it is committed. Raises what went wrong; TimeoutError when it takes longer."""
        return self._future.result(timeout_s)

    @property
    def done(self) -> bool:
        """Whether it is committed or failed."""
        return self._future.done()


def save(
    objects: Mapping[str, Any], url: str, *, step: int | None = None, job: str = DEFAULT_JOB, share_with: str = ""
) -> Saved:
    """Save named objects to a store: modules, optimizers, whatever has `state_dict` and `load_state_dict`, and nested
    mappings and lists of tensors, arrays, numbers and strings. Returns when the checkpoint is committed.

    step   what it is called; without it, one more than the newest
    job    the name it lies under: `ray-dr checkpoints JOB --store URL`. One process (or group) saves to it at a time
    share_with   a job in the same store whose newest checkpoint this one was made from: what did not change since is not
                 sent again, and stays there for as long as this job needs it. Counts with the job's first save
    Raises UnsupportedState naming what cannot be stored, StoreError, Fenced when another process saved meanwhile.
    """
    try:
        return _begin(objects, _Request(url, job, step, share_with)).result()
    finally:
        _settle()
        _give_back_slot()


def save_async(
    objects: Mapping[str, Any], url: str, *, step: int | None = None, job: str = DEFAULT_JOB, share_with: str = ""
) -> Saving:
    """Like `save`, but returns as soon as the state is copied to memory, which is kept for the next time.

    A save that fails raises in `wait()`, and is logged. One that nobody waits for is finished before the program ends;
    wait for it before the process group is destroyed.
    """
    request = _Request(url, job, step, share_with)
    future = _begin(objects, request)
    future.add_done_callback(lambda done: _log_failure(request, done.exception()))
    return Saving(future)


def load(objects: Mapping[str, Any], url: str, *, step: int | None = None, job: str = DEFAULT_JOB) -> int:
    """Bring named objects to a checkpoint, the newest or the newest of a step, and give its step.

    Any world size and sharding will do. What the checkpoint has besides these objects is left out. All or nothing: the
    objects change when every byte is here, verified, on every rank. Raises IncompatibleState with all differences,
    NoCheckpoint, StoreError, CheckpointError.
    """
    _settle()
    ranks = _ranks()
    request = _Request(url, job, step)
    found = ranks.together(lambda: _find(request) if ranks.rank == 0 else None)[0]
    assert found is not None
    wrapped = wrap(objects)
    fetched = ranks.together(lambda: _fetch(objects, wrapped, request, found, ranks), share=False)[ranks.rank]
    try:
        ranks.together(fetched.target.apply)
    except BaseException:
        for undo in fetched.undo:
            undo()
        raise
    for tensor, staged in fetched.late:
        tensor.copy_(staged)
    fetched.target.check_shared()
    if isinstance(objects, MutableMapping):
        settle(objects, wrapped)
    return found.version.step


# --------------------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The default group's ranks, or this process alone."""

    rank: int = 0
    world: int = 1
    group: Any = None

    def together(self, act: Callable[[], T], *, share: bool = True) -> list[T]:
        """What `act` gave on each rank (`share=False`: only on this one, at its place). Where it raised, so does this;
        on the other ranks CheckpointError then says which rank it was."""
        mine: Any = None
        error: Exception | None = None
        try:
            mine = act()
        except Exception as raised:
            error = raised
        if self.world == 1:
            if error is not None:
                raise error
            return [mine]
        said: list[Any] = [None] * self.world
        try:
            told = (mine if share else None, error and f"{type(error).__name__}: {error}")
            dist.all_gather_object(said, told, self.group)
        except RuntimeError as lost:
            raise CheckpointError(f"the ranks cannot agree, because one of them is gone or stuck: {lost}") from lost
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(said):
            if text is not None:
                raise CheckpointError(f"rank {rank} could not go on: {text}")
        return [mine if rank == self.rank else value for rank, (value, _) in enumerate(said)]


_THREAD = ThreadPoolExecutor(1, thread_name_prefix="ray-dr-save")
"""One thread, so that saves are written in the order of the calls, on every rank. It is waited for at exit."""
_under_way: Future[Saved] | None = None
_slot: Pool | None = None
_jobs: dict[tuple[str, str], DirectJob] = {}
_known_group: tuple[Any, _Ranks] | None = None


def _ranks() -> _Ranks:
    """The ranks now. The first call in a process group forms the Gloo group; all ranks are there then."""
    global _known_group
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return _Ranks()
    default = dist.group.WORLD
    if _known_group is None or _known_group[0] is not default:
        group = dist.new_group(backend="gloo")
        _known_group = (default, _Ranks(dist.get_rank(), dist.get_world_size(), group))
    return _known_group[1]


def _settle() -> None:
    """Wait for the save under way; whoever started it hears of its error."""
    if _under_way is not None:
        wait([_under_way])


@functools.cache
def _settle_at_exit() -> None:
    """An interpreter that ends refuses work to all thread pools before it waits for any; this comes before that."""
    threading._register_atexit(_settle)  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------- saving


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments, the same on every rank."""

    url: str
    job: str
    step: int | None
    share_with: str = ""


def _begin(objects: Mapping[str, Any], request: _Request) -> Future[Saved]:
    """Copy the state to memory and have it written in the background."""
    global _under_way
    _settle_at_exit()
    _settle()
    ranks = _ranks()
    try:
        part, stream = _stage(objects, request, ranks)
    except Exception as error:
        if ranks.world > 1:  # the others wait for this rank's word
            _under_way = _THREAD.submit(_carry, request, ranks, None, memoryview(b""), 0, error)
        raise
    position = next((value.position for value in objects.values() if isinstance(value, Data)), 0)
    _under_way = _THREAD.submit(_carry, request, ranks, part, stream, position, None)
    return _under_way


def _log_failure(request: _Request, error: BaseException | None) -> None:
    if error is not None:
        _log.error("save.failed job=%s store=%s step=%s error=%r", request.job, request.url, request.step, error)


def _stage(objects: Mapping[str, Any], request: _Request, ranks: _Ranks) -> tuple[Part, memoryview]:
    """This rank's share in memory: its part, still without version and chunks, and its bytes."""
    _check_arguments(objects, request)
    flat = flatten(wrap(objects), rank=ranks.rank, world=ranks.world)
    plan = Planner(ranks.rank, ranks.world).plan(flat)
    stream = _take_slot(plan.size)
    stage(plan, flat, stream)
    scalars = flat.scalars if ranks.rank == 0 else {}
    return Part(VersionId(0, 0), ranks.rank, ranks.world, plan.size, plan.shards, (), scalars), stream


def _check_arguments(objects: Mapping[str, Any], request: _Request) -> None:
    for name in objects:
        if not isinstance(name, str) or not name or "/" in name or name.startswith("$"):
            raise ConfigError(f"{name!r} cannot name an object", key="objects", remedy="a string without / and $")
    if request.step is not None and request.step < 0:
        raise ConfigError(f"{request.step} is no step", key="step", remedy="0 or more")


def _take_slot(size: int) -> memoryview:
    """Memory for a part of `size` bytes, touched before."""
    global _slot
    if _slot is None or _slot.size < size:
        _give_back_slot()
        try:
            _slot = Pool.create(max(size, 1))
        except OSError as error:
            raise CheckpointError(f"there is no memory to copy a state of {size} bytes into: {error}") from error
    return _slot.view[:size]


def _give_back_slot() -> None:
    global _slot
    if _slot is not None:
        _slot.close()
        _slot = None


def _carry(request: _Request, ranks: _Ranks, part: Part | None, stream: memoryview, position: int,
           failed: Exception | None) -> Saved:  # fmt: skip
    """Write this rank's part, and commit when all are there. In the background thread."""
    with stream:
        opened = ranks.together(lambda: _open(request, ranks, failed))
        if any(asked != request for asked, _ in opened):
            asked_for = ", ".join(str(asked) for asked, _ in opened)
            raise ConfigError(f"the ranks asked for different saves: {asked_for}", remedy="the same on every rank")
        opening = opened[0][1]
        assert opening is not None
        assert part is not None
        direct = _jobs[request.url, request.job]
        puts = ranks.together(lambda: direct.put(opening, part, stream))
        refs = [put.ref for put in puts]
        ranks.together(lambda: direct.commit(opening, refs, position=position) if ranks.rank == 0 else None)
        return Saved(opening.version.step, opening.version.attempt, part.size, puts[ranks.rank].sent)


def _open(request: _Request, ranks: _Ranks, failed: Exception | None) -> tuple[_Request, Opening | None]:
    """What this rank was asked for; on rank 0 also the save's version and term."""
    if failed is not None:
        raise failed
    key = (request.url, request.job)
    if key not in _jobs:
        _jobs[key] = DirectJob(open_store(request.url), request.job, share_with=request.share_with)
    return request, _jobs[key].begin(request.step) if ranks.rank == 0 else None


# --------------------------------------------------------------------------------------------------- loading


@dataclass(slots=True)
class _Fetched:
    """A checkpoint in memory: what to apply, and the bytes that still have to go into the objects' own tensors."""

    target: Target
    late: list[tuple[torch.Tensor, torch.Tensor]]
    undo: list[Callable[[], None]]


def _find(request: _Request) -> Manifest:
    return find_version(open_store(request.url), request.job, request.step)


def _fetch(
    objects: Mapping[str, Any], wrapped: Mapping[str, Any], request: _Request, manifest: Manifest, ranks: _Ranks
) -> _Fetched:
    """Read what the objects need of a checkpoint, verified. Nothing of theirs is touched."""
    _check_arguments(objects, request)
    plain = [name for name, value in wrapped.items() if isinstance(value, Tree)]
    if plain and not isinstance(objects, MutableMapping):
        raise ConfigError(f"{', '.join(plain)}: no value can be replaced in a {type(objects).__name__}",
                          key="objects", remedy="give a dict")  # fmt: skip
    store = open_store(request.url)
    parts = [read_part(store, ref) for ref in manifest.parts]
    every, scalars = build_index(parts), {name: value for part in parts for name, value in part.scalars.items()}
    index = Index({name: shards for name, shards in every.shards.items() if name.partition("/")[0] in wrapped})
    scalars = alike(wrapped, {name: value for name, value in scalars.items() if name in wrapped}, index)
    trees = {name: value for name, value in wrapped.items() if isinstance(value, Tree) and name in scalars}
    if found := [text for name, tree in trees.items() for text in differences(name, tree, scalars, index)]:
        raise IncompatibleState(tuple(found))
    target = Target(wrapped, index, scalars, rank=ranks.rank, world=ranks.world)
    buffers: dict[Box, memoryview] = {}
    late: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}
    for local, box in wanted(target):
        tensor, fresh = local.tensor, local.leaf.name in target.fresh
        if overlaps(tensor):
            raise UnsupportedState(f"{local.leaf.name}: an expanded tensor cannot be filled (make it contiguous)")
        if tensor.is_cuda or not tensor.is_contiguous() or not fresh:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            late[fresh].append((local.tensor, tensor))
        if local.leaf.name in target.shared:
            target.shared[local.leaf.name] = tensor
        buffers[box] = bytes_of(tensor)
    sources = {part.rank: (StoreSource(store, request.job, part),) for part in parts}
    read_state(parts, buffers, sources, on_corrupt=_note)
    for tensor, staged in late[True]:
        tensor.copy_(staged)
    return _Fetched(target, late[False], _snapshot(wrapped))


def _note(error: CorruptChunk) -> None:
    _log.warning("chunk.corrupt error=%s", error)


def _snapshot(objects: Mapping[str, Any]) -> list[Callable[[], None]]:
    """How to undo `Target.apply`: an object's own `load_state_dict` may raise when others were loaded already."""
    undo: list[Callable[[], None]] = []
    for value in objects.values():
        if isinstance(value, torch.optim.Optimizer):
            undo.append(_undo_optimizer(value))
        elif not isinstance(value, Tree | torch.nn.Module):
            undo.append(_undo_object(value))
    return undo


def _undo_object(value: Any) -> Callable[[], None]:
    before = copy.deepcopy(value.state_dict())
    return lambda: value.load_state_dict(before)


def _undo_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    state = {parameter: dict(held) for parameter, held in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]

    def undo() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)

    return undo
