"""How a worker's process ended: asked of the kernel about real processes, and told to the supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_dr.actors import endings
from ray_dr.actors.endings import UNKNOWN, Endings
from ray_dr.actors.node_agent import Agent
from ray_dr.model.job import Detecting
from ray_dr.stores.wire import connect

TOKEN = b"secret"
CHILD = "import sys, os, signal; sys.stdin.read(1); {}"


def child(last: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD.format(last)], stdin=subprocess.PIPE)


def end(process: subprocess.Popen[bytes], *, reaped: bool) -> None:
    """Let it go on to its end, and wait for that: fetched by its parent, or left a zombie."""
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))


@pytest.mark.parametrize(
    ("last", "how"),
    [
        ("os._exit(7)", "it exited with status 7"), ("os._exit(0)", "it exited with status 0"),
        ("os.kill(os.getpid(), 9)", "it was ended by signal 9 (SIGKILL)"),
        ("signal.signal(6, signal.SIG_DFL); os.kill(os.getpid(), 6)", "it was ended by signal 6 (SIGABRT)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reaped", [False, True], ids=["zombie", "reaped"])
def test_an_end_is_known_by_its_status(last: str, how: str, reaped: bool) -> None:
    watched = Endings()
    with child(last) as process:
        watched.watch("w", process.pid)
        end(process, reaped=reaped)
        found = watched.of("w")
        process.returncode = 0 if reaped else None  # it is gone already
    if reaped and found.how == UNKNOWN:
        pytest.skip("this kernel forgets a process with its parent's word")
    assert (found.how, found.oom) == (how, False)


def test_one_that_lives_on_or_was_never_seen_is_not_known() -> None:
    watched = Endings()
    with child("0") as process:
        watched.watch("w", process.pid)
        assert watched.of("w").how == UNKNOWN
        end(process, reaped=False)
    assert watched.of("w").how == watched.of("stranger").how == UNKNOWN
    watched.watch("gone", process.pid)
    assert watched.of("gone").how == UNKNOWN


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_kernels_memory_killer_is_told_by_its_counters(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    counts = [(3, 8)]
    monkeypatch.setattr(endings, "_kills", lambda: counts[-1])
    watched = Endings()
    with child(f"signal.signal({number}, 0) if {number} != 9 else 0; os.kill(os.getpid(), {number})") as process:
        watched.watch("w", process.pid)
        counts.append((3, 9))
        end(process, reaped=False)
        found = watched.of("w")
    assert found.oom == (number == signal.SIGKILL)
    assert ("want of memory" in found.how) == found.oom


def test_the_kernels_counters_can_be_read() -> None:
    assert all(count >= 0 for count in endings._kills())
    assert "\noom_kill " in Path("/proc/vmstat").read_text()


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent("node-a", "127.0.0.1", "memory://endings", TOKEN)
    yield made
    made.close()


def test_an_agent_tells_how_its_worker_ended(agent: Agent) -> None:
    watcher = connect(agent.address, TOKEN)
    watcher.timeout(60.0)
    watcher.send({"op": "watch"})
    program = (
        "import sys, os; from ray_dr.stores.wire import connect; "
        f"c = connect({agent.address!r}, {TOKEN!r}); "
        "c.send({'op': 'worker', 'worker': 'w0', 'pid': os.getpid(), 'beacon': ''}); "
        "c.send({'op': 'want', 'skipped': None}); print(flush=True); sys.stdin.read(1)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while "w0" not in agent.witness.endings._open:
            assert time.monotonic() < deadline
        process.kill()
        threading.Thread(target=process.wait).start()  # as a raylet does
        while True:
            told = [message for message in watcher.receive()[0]["messages"] if "lost" in message]
            if told:
                break
    watcher.close()
    assert told == [{"lost": "w0", "how": "it was ended by signal 9 (SIGKILL)", "oom": False}]


def test_a_supervisor_takes_an_end_for_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.test_sensing import NODES, WORKERS, Stage

    stage = Stage(hang_s=300.0, detecting=Detecting())
    stage.senses.exited(NODES[1], WORKERS[1], "it was ended by signal 9 (SIGKILL)", oom=True)
    stage.senses.exited(NODES[1], WORKERS[1], "it was ended by signal 9 (SIGKILL)", oom=False)
    assert [(note["kind"], note["subjects"][0]["rank"]) for note in stage.notes] == [
        ("process_gone", 1), ("out_of_memory", 1),
    ]  # fmt: skip
    assert "signal 9" in stage.notes[0]["evidence"]
