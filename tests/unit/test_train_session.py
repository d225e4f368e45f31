"""A worker's session over attempts: peers that die or freeze, common stops, errors; with a real agent, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.writer import Task
from ray_dr.errors import StoreError
from ray_dr.model import codec
from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.model.checkpoint import PartRef, VersionId
from ray_dr.stores.wire import connect
from ray_dr.train.data import StepBatch
from ray_dr.train.session import normalise
from tests.unit.laid_out import VERSION, hold, saved, wait_until
from tests.unit.test_pools import mapped
from tests.unit.train_programs import GUARD_S, TOKEN, Program, answer, host_session, linger, misuse, walk

pytestmark = pytest.mark.slow


class Stage:
    """An agent that is watched, and worker processes beside it."""

    def __init__(self, store_url: str) -> None:
        self.agent = Agent("node-a", "127.0.0.1", store_url, TOKEN)
        self.store_url = store_url
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        self.workers: list[Any] = []
        self.pipes: list[Any] = []
        self.rendezvous: list[str] = []
        self._watch = connect(self.agent.address, TOKEN)
        self._watch.send({"op": "watch"})
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def add(self, count: int, program: Program) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.unit.train_programs"])
        known = len(self.workers)
        for number in range(known, known + count):
            here, there = context.Pipe()
            arguments = (there, f"w{number}", self.agent.address, program)
            process = context.Process(target=host_session, args=arguments, daemon=True)
            process.start()
            there.close()
            self.workers.append(process)
            self.pipes.append(here)
        self.rendezvous += [answer(pipe) for pipe in self.pipes[known:]]

    def ask(self, worker: int, method: str, *arguments: Any) -> Any:
        self.pipes[worker].send((method, arguments))
        return answer(self.pipes[worker])

    def start(self, attempt: int, members: list[int], origin: Origin | None = None, **settings: Any) -> None:
        for rank, worker in enumerate(members):
            assignment = Assignment(
                "job", attempt, f"w{worker}", rank, len(members), rank, self.rendezvous[members[0]],
                self.agent.address, (), origin, Cadence(0, 1, 0), "gloo", False, 0, 4, self.store_url, settings,
                {"store": 1},
            )  # fmt: skip
            assert self.ask(worker, "start", assignment)

    def wait_for(self, kind: str, worker: str = "", step: int = 0) -> dict[str, Any]:
        """The next event or record of a kind. Others are skipped."""
        while True:
            message = self.said.get(timeout=GUARD_S)
            found = message.get("event") or message.get("record") or {}
            enough = found.get("record", {}).get("step", step) >= step
            if found.get("type") == kind and worker in ("", found.get("worker")) and enough:
                return dict(found)

    def wait_for_lost(self, worker: str) -> None:
        while self.said.get(timeout=GUARD_S).get("lost") != worker:
            pass

    def close(self) -> None:
        for process in self.workers:
            process.kill()
            process.join()
        self._watch.close()
        self._listener.join()
        self.agent.close()

    def _listen(self) -> None:
        try:
            while True:
                report, _ = self._watch.receive()
                for message in report["messages"]:
                    self.said.put(message)
                self._watch.send({"ack": report["last"]})
        except StoreError:
            return


@pytest.fixture
def stage(tmp_path: Any) -> Iterator[Stage]:
    made = Stage(f"file://{tmp_path}")
    yield made
    made.close()


@pytest.mark.parametrize(("frozen", "behind"), [(0, False), (1, False), (1, True)])
def test_an_abort_frees_a_rank_whose_peer_is_frozen_and_it_trains_on_alone(
    stage: Stage, frozen: int, behind: bool
) -> None:
    stage.add(2, walk)
    stage.start(1, [0, 1], steps=10**9, behind=behind)
    stage.wait_for("Stepped", step=3)
    os.kill(stage.workers[frozen].pid, signal.SIGSTOP)
    survivor = 1 - frozen
    begun = time.monotonic()
    assert stage.ask(survivor, "abort", 1)
    assert stage.wait_for("WorkerStopped", f"w{survivor}")["attempt"] == 1
    assert time.monotonic() - begun < 10  # milliseconds; without the abort it would be the group's half hour
    stage.start(2, [survivor], steps=3)
    assert stage.wait_for("WorkerReturned", f"w{survivor}")["step"] == 3


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_peer_is_noticed_and_the_survivor_calls_it_somebody_elses_fault(
    stage: Stage, victim: int, behind: bool
) -> None:
    stage.add(2, walk)
    stage.start(1, [0, 1], steps=10**9, behind=behind)
    stage.wait_for("Stepped", step=3)
    os.kill(stage.workers[victim].pid, signal.SIGKILL)
    raised = stage.wait_for("WorkerRaised", f"w{1 - victim}")
    assert raised["collateral"]
    stage.start(2, [1 - victim], steps=2)
    assert stage.wait_for("WorkerReturned", f"w{1 - victim}")["step"] == 2


def test_a_dead_workers_connection_tells_the_supervisor_at_once(stage: Stage) -> None:
    stage.add(1, walk)
    os.kill(stage.workers[0].pid, signal.SIGKILL)
    stage.wait_for_lost("w0")


@pytest.mark.parametrize("behind", [False, True])
def test_all_ranks_stop_at_the_common_step_and_the_state_goes_on_from_there(stage: Stage, behind: bool) -> None:
    stage.add(2, walk)
    stage.start(1, [0, 1], steps=10**9, behind=behind)
    stage.wait_for("Stepped", step=2)
    target = 60 + max(stage.ask(rank, "status")["step"] for rank in (0, 1))
    assert all(stage.ask(rank, "stop_at", 1, target, False) < target for rank in (0, 1))
    assert [stage.wait_for("WorkerStopped")["step"] for _ in (0, 1)] == [target, target]
    assert stage.ask(0, "stop_at", 1, 1, False) == target
    assert stage.agent.writer.settle(GUARD_S)
    version = VersionId(1, target)
    assert {held.rank for held in stage.agent.vault.held() if held.version == version} == {0, 1}
    stage.agent.vault.begin(version)
    holders = {"0": (stage.agent.address,), "1": (stage.agent.address,)}
    stage.start(2, [1], Origin(version, 2, holders), steps=target + 2)
    assert stage.wait_for("WorkerReturned", "w1")["step"] == target + 2


def stored(stage: Stage, version: VersionId) -> PartRef:
    """The part list of a version that one rank put into the store."""
    while True:
        message = stage.said.get(timeout=GUARD_S)
        found = message.get("record") or {}
        if found.get("where") == "store" and found["version"] == codec.to_json(version):
            ref: PartRef = codec.from_json(PartRef, message["ref"])
            return ref


@pytest.mark.parametrize("committed", [True, False])
def test_without_a_step_left_to_do_a_version_is_saved_anew_if_and_only_if_the_store_lacks_it(
    stage: Stage, committed: bool
) -> None:
    stage.add(1, walk)
    stage.start(1, [0], steps=3)
    ref = stored(stage, VersionId(1, 3))
    for attempt in (2, 3):
        holders = {"0": (stage.agent.address,)}
        stage.agent.vault.begin(VersionId(1, 3))
        stage.start(attempt, [0], Origin(VersionId(1, 3), 1, holders, (ref,) if committed or attempt == 3 else ()), steps=3)
        while stage.wait_for("WorkerReturned", "w0")["attempt"] < attempt:
            pass
        assert stage.agent.writer.drain(GUARD_S)
        saved = {held.version for held in stage.agent.vault.held()}
        assert saved == {VersionId(1, 3), *([VersionId(2, 3)] if attempt == 2 and not committed else [])}


def test_the_agent_is_told_that_the_job_waits_for_its_last_save_and_for_that_of_a_stop(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: dict[VersionId, Task] = {}
    submit = stage.agent.writer.submit
    monkeypatch.setattr(stage.agent.writer, "submit", lambda task: (tasks.update({task.part.version: task}), submit(task)))
    stage.add(1, walk)
    stage.start(1, [0], steps=3)
    stage.wait_for("WorkerReturned", "w0")
    stage.start(2, [0], steps=10**9)
    stage.wait_for("Stepped", step=5)
    target = 60 + stage.ask(0, "status")["step"]
    assert stage.ask(0, "stop_at", 2, target, True) < target
    stage.wait_for("WorkerStopped", "w0")
    assert {version for version, task in tasks.items() if task.forced} == {VersionId(1, 3), VersionId(2, target)}


def test_an_error_of_the_program_is_reported_without_what_changes_from_run_to_run(stage: Stage) -> None:
    stage.add(1, walk)
    stage.start(1, [0], steps=10, raise_at=2)
    raised = stage.wait_for("WorkerRaised", "w0")
    assert (raised["error"], raised["collateral"]) == ("ValueError: bad luck at #", False)
    assert raised["step"] == 2


def test_what_is_mapped_for_a_restore_that_does_not_come_goes_with_the_attempt(stage: Stage) -> None:
    stage.add(1, linger)
    hold(stage.agent, *saved())
    pid = stage.workers[0].pid
    assert not mapped(pid)
    stage.start(1, [0], Origin(VERSION, 1, {"0": (stage.agent.address,)}))
    wait_until(lambda: bool(mapped(pid)))
    assert stage.ask(0, "abort", 1)
    wait_until(lambda: not mapped(pid))
    assert stage.ask(0, "status")["running"]


def test_taking_micro_batches_for_a_batch_says_what_to_write(stage: Stage) -> None:
    stage.add(1, misuse)
    stage.start(1, [0])
    assert "for micro in ctx.micro_batches(batch)" in stage.wait_for("WorkerRaised", "w0")["error"]


def test_an_older_attempt_is_not_started_nor_aborted(stage: Stage) -> None:
    stage.add(1, walk)
    stage.start(2, [0], steps=1)
    stage.wait_for("WorkerReturned", "w0")
    assert not stage.ask(0, "abort", 1)
    assert stage.ask(0, "stop_at", 1, 5, False) == -1
    assert not stage.ask(0, "set_cadence", 1, Cadence(0, 1, 0))


def test_an_attempt_that_was_aborted_before_it_began_is_not_begun(stage: Stage) -> None:
    stage.add(1, walk)
    assert not stage.ask(0, "abort", 2)
    with pytest.raises(AssertionError):
        stage.start(2, [0], steps=1)
    stage.start(3, [0], steps=1)
    assert stage.wait_for("WorkerReturned", "w0")["attempt"] == 3


@pytest.mark.parametrize("use", [iter, len, lambda batch: batch[0], lambda batch: batch.shape])
def test_a_batch_in_pieces_explains_itself_however_it_is_touched(use: Any) -> None:
    with pytest.raises(TypeError, match=r"ctx\.micro_batches\(batch\)"):
        use(StepBatch(lambda: iter(())))


def test_errors_that_differ_by_numbers_only_read_the_same() -> None:
    assert normalise(ValueError("row 7 at 0x7f00")) == normalise(ValueError("row 81 at 0xbeef"))
    assert len(normalise(ValueError("x" * 5000))) < 500
