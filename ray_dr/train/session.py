"""One worker process: runs `train(ctx)` for attempt after attempt without ever being thrown away."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ray_dr.errors import CheckpointError, CopiesAway, IncompatibleState, RayDrError, UnsupportedState
from ray_dr.model import codec
from ray_dr.model.attempt import Assignment, Cadence
from ray_dr.model.events import WorkerRaised, WorkerReturned, WorkerStopped
from ray_dr.model.journal import Marked, Noted
from ray_dr.model.signal import WorkerPhase
from ray_dr.stores.open import open_store
from ray_dr.train import collectives
from ray_dr.train.context import Context, Control, StopAttempt
from ray_dr.train.fence import Fence
from ray_dr.train.link import Link
from ray_dr.train.rescue import hand_over
from ray_dr.train.standing import Stood
from ray_dr.train.warmth import rehearse

ERROR_CHARS = 4000
FOREIGN_ERROR_CHARS = 400


class Session:
    """What lives as long as the process: the line to the agent, the rendezvous store, the thread that trains."""

    def __init__(self, worker: str, agent: str, token: bytes, host: str, train: Callable[[Context], None],
                 store_url: str = "") -> None:  # fmt: skip
        """store_url: of the job, to make ready for it; empty: nothing is made ready."""
        self._worker, self._token, self._train = worker, token, train
        self._link, self._fence = Link(agent, token, worker, os.getpid()), Fence()
        self._store = collectives.host_store(host)
        self.rendezvous = f"{host}:{self._store.port}"
        self._lock = threading.Lock()
        self._threads = torch.get_num_threads()
        self._control = Control(0)
        self._refused = 0
        self._breaker: collectives.Breaker | None = None
        self._stood: Stood | None = None
        self._assignment: Assignment | None = None
        self._thread: threading.Thread | None = None
        # The first use of either, a setting like this one or an optimizer's step, imports torch's compiler: a second, and
        # many on a machine that has not read it from disk yet. Better before the worker is ready than within a recovery.
        torch.use_deterministic_algorithms(False)
        if store_url:
            self._warm_up(store_url)
        gc.collect()
        gc.freeze()  # what is imported stays: a collection between attempts then takes milliseconds

    def _warm_up(self, store_url: str) -> None:
        number = self._worker.rpartition(".")[2]
        try:
            rehearse(self._store, store_url, number=int(number) if number.isdigit() else 0)
        except (RuntimeError, RayDrError) as error:  # it can take part all the same, if less quickly
            self._link.record(Noted(time.time(), "worker.cold", {"worker": self._worker, "error": str(error)[:ERROR_CHARS]}))

    def start(self, assignment: Assignment) -> bool:
        """Begin an attempt in a thread of its own. False when this or a newer attempt has already begun, or was aborted."""
        with self._lock:
            if assignment.attempt <= max(self._control.attempt, self._refused):
                return False
            self._control = Control(assignment.attempt, assignment.cadence)
            self._breaker = collectives.Breaker()
            self._assignment, self._stood = assignment, None
            args = (assignment, self._control)
            self._thread = threading.Thread(target=self._run, args=args, name="train", daemon=True)
            self._thread.start()
            return True

    def abort(self, attempt: int) -> bool:
        """Make the attempt's `train` leave wherever it is: in a collective at once, else at its next step. False when this
        worker is not in it; then it will not begin it either."""
        with self._lock:
            self._refused = max(self._refused, attempt)
            if attempt != self._control.attempt or self._assignment is None or self._breaker is None:
                return False
            self._control.abort()
            breaker, rendezvous = self._breaker, self._assignment.rendezvous
        self._link.pools.drop()
        breaker.abort(rendezvous)
        return True

    def rescue(self, attempt: int, step: int, ranks: Sequence[int], copy_to: Sequence[str]) -> str:
        """Stage the parts of `ranks` of the state that this worker still has after its attempt. Why not, in words; or empty."""
        with self._lock:
            stood, self._stood = self._stood, None
        if stood is None or (stood.version.attempt, stood.version.step) != (attempt, step):
            return "the state is not there any more"
        return hand_over(stood, ranks, copy_to, self._link)

    def stop_at(self, attempt: int, step: int, everywhere: bool) -> int:
        """Ask to stop after `step` steps. The steps done so far; from `step` on: too late, choose a later one."""
        with self._lock:
            return self._control.stop_at(step, everywhere) if attempt == self._control.attempt else -1

    def set_terms(self, attempt: int, terms: dict[str, int]) -> bool:
        """The places that can be saved to, with the term there, have changed."""
        with self._lock:
            if attempt != self._control.attempt:
                return False
            self._control.terms = dict(terms)
            return True

    def set_keepers(self, attempt: int, addresses: Sequence[str]) -> bool:
        """Copies of this rank's parts go to these agents from the next save on."""
        with self._lock:
            if attempt != self._control.attempt:
                return False
            self._control.keepers = tuple(addresses)
            return True

    def set_cadence(self, attempt: int, cadence: Cadence) -> bool:
        """Save at other intervals from a later step on."""
        with self._lock:
            if attempt != self._control.attempt:
                return False
            self._control.next_cadence = cadence
            return True

    def status(self) -> dict[str, Any]:
        """What this worker is doing: attempt, rank, steps done, whether `train` is running, the version it began from."""
        thread, assignment = self._thread, self._assignment
        origin = assignment.origin if assignment else None
        return {
            "attempt": self._control.attempt, "step": self._control.step,
            "running": thread is not None and thread.is_alive(), "rank": assignment.rank if assignment else -1,
            "restore": codec.to_json(origin.version) if origin else None, "world": assignment.world if assignment else 0,
        }  # fmt: skip

    def _run(self, a: Assignment, control: Control) -> None:
        outcome: WorkerReturned | WorkerStopped | WorkerRaised
        try:
            self._link.reset()
            self._link.beacon.begin(a.attempt, a.rank)
            self._link.map_ahead(a, self._token)
            self._attempt(a, control)
            outcome = WorkerReturned(time.time(), a.worker, a.attempt, control.step)
        except StopAttempt:
            outcome = WorkerStopped(time.time(), a.worker, a.attempt, control.step)
        except BaseException as error:
            outcome = self._raised(a, control, error)
            traceback.clear_frames(error.__traceback__)
        self._link.beacon.enter(WorkerPhase.DONE)
        groups = collectives.leave()
        if (stood := self._stood) is not None and not isinstance(outcome, WorkerReturned):
            outcome = replace(outcome, stands_at=stood.version.step, twins=stood.twins)
        self._link.pools.drop()  # a program that restored nothing
        gc.collect()
        del groups
        self._link.event(outcome)

    def _attempt(self, a: Assignment, control: Control) -> None:
        started = time.monotonic()
        _prepare_process(a, threads=self._threads)
        collectives.join(
            a.rendezvous, self._store, attempt=a.attempt, rank=a.rank, world=a.world, backend=_backend(a.backend)
        )
        if a.rank == 0:
            self._link.record(Marked(time.time(), a.attempt, "group_joined", time.monotonic() - started))
        ctx = Context(a, self._link, control, self._token, open_store(a.store_url), self._fence)
        try:
            self._train(ctx)
        except BaseException as error:
            ctx.close(error)
            if control.aborted or not isinstance(error, StopAttempt):  # else it is saved
                self._stood = ctx.left()
            raise
        ctx.close()

    def _raised(self, a: Assignment, control: Control, error: BaseException) -> WorkerStopped | WorkerRaised:
        if control.aborted:
            return WorkerStopped(time.time(), a.worker, a.attempt, control.step)
        away = isinstance(error, CopiesAway)  # no fault of the program's, nor of the version's: another attempt may succeed
        collateral = away or collectives.is_collective_error(error)
        if away or not collateral:
            text = "".join(traceback.format_exception(error))[-ERROR_CHARS:]
            self._link.record(Noted(time.time(), "train.raised", {"worker": a.worker, "rank": a.rank, "trace": text}))
        readable = IncompatibleState | UnsupportedState | CopiesAway
        unreadable = isinstance(error, CheckpointError) and not isinstance(error, readable)
        return WorkerRaised(
            time.time(), a.worker, a.attempt, normalise(error), collateral, control.step, unreadable=unreadable
        )


def normalise(error: BaseException) -> str:
    """An exception without what changes from run to run: addresses, ports, numbers of lines and ranks."""
    text = str(error)
    if not isinstance(error, RayDrError):  # a torch error begins with a path of its build and ends with advice
        text = re.sub(r"0x[0-9a-f]+|\d+", "#", re.sub(r"^\[\S+:\d+\] ", "", text).partition(". This may ")[0])
    most = ERROR_CHARS if isinstance(error, RayDrError) else FOREIGN_ERROR_CHARS
    if len(text) > most:
        text = text[:most] + "... " + hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{type(error).__name__}: {text}"


def _prepare_process(a: Assignment, *, threads: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(a.local_rank % torch.cuda.device_count())
    torch.use_deterministic_algorithms(a.deterministic)
    torch.set_num_threads(1 if a.deterministic else threads)  # how a kernel splits its sums depends on their number
    if a.deterministic:
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=":4096:8")  # else cuBLAS refuses to be deterministic
    os.environ.update(RANK=str(a.rank), WORLD_SIZE=str(a.world), LOCAL_RANK=str(a.local_rank))


def _backend(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
