"""Find and end the processes of one local Ray cluster, by process id and never by name.

Theory of operation. A local cluster is a tree of processes which Ray cuts in many places: workers whose raylet died
hang on process 1, titles overwrite the environment that `/proc` shows, job drivers open sessions of their own. So a
process belongs to the cluster when any of these holds:

    marker    its environment carries MARKER=<directory of the cluster>, which every process inherits
    directory its command line names the cluster's directory
    session   its session was opened by a process the cluster started (`sessions`)
    descent   its parent belongs

A process is signalled through a descriptor that is compared with its start time first, so that a recycled id can't
hit a stranger. Linux only. This module imports neither ray nor anything heavy: it is also the program of the reaper,
the process which outlives a killed owner just long enough to clean up behind it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

MARKER = "RAY_DR_LOCAL_CLUSTER"
SESSIONS_FILE = "sessions"
_PROC = Path("/proc")
_SHARED_MEMORY = "/dev/shm/"


@dataclass(frozen=True, slots=True)
class Process:
    """One process as `/proc` shows it. `started`: clock ticks since boot, which with `pid` names it for good."""

    pid: int
    parent: int
    session: int
    started: int
    dead: bool
    command: str
    environment: bytes

    def carries(self, name: str) -> str:
        """Value of an environment variable the process was started with, or "" when absent or overwritten."""
        for line in self.environment.split(b"\0"):
            if line.startswith(name.encode() + b"="):
                return line.partition(b"=")[2].decode(errors="replace")
        return ""


def read_processes() -> dict[int, Process]:
    """All processes of this machine that we may look at, by id."""
    found = (_read_process(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdigit())
    return {process.pid: process for process in found if process is not None}


def _read_process(pid: int) -> Process | None:
    place = _PROC / str(pid)
    try:
        # The name in brackets may hold anything, brackets too: what follows the last one is fields 3 and on.
        fields = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()
        command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        environment = (place / "environ").read_bytes()
    except OSError:  # gone meanwhile, a zombie's environment, or another user's
        try:
            command, environment = "", b""
            fields = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
    dead = fields[0] in "ZX"
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), dead, command, environment)


def members(
    processes: Mapping[int, Process], directory: Path, sessions: Mapping[int, int] | None = None
) -> dict[int, Process]:
    """Living processes of the cluster in `directory`.

    sessions   session id -> start time of the process that opened it; a session whose id went to another process
               meanwhile is left alone
    """
    opened = sessions or {}
    current = {
        session
        for session, started in opened.items()
        if session not in processes or processes[session].started == started
    }
    own = {os.getpid()}
    marked = {p.pid for p in processes.values() if p.pid not in own and _is_marked(p, directory)}
    inside = {p.pid for p in processes.values() if p.session in current}
    pids = descendants(processes, marked | inside) - own
    return {pid: processes[pid] for pid in sorted(pids) if not processes[pid].dead}


def _is_marked(process: Process, directory: Path) -> bool:
    return process.carries(MARKER) == str(directory) or f"{directory}/ray/" in process.command


def descendants(processes: Mapping[int, Process], roots: Collection[int]) -> set[int]:
    """The roots that exist and everything below them."""
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    waiting = [pid for pid in roots if pid in processes]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting.extend(children.get(pid, ()))
    return found


def kill(processes: Iterable[Process], *, with_signal: int = signal.SIGKILL) -> None:
    """SIGKILL, or another signal, to each, one right after the other; those already gone are skipped."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(process.pid)
            try:
                now = _read_process(process.pid)
                if now is not None and now.started == process.started:
                    signal.pidfd_send_signal(descriptor, with_signal)
            finally:
                os.close(descriptor)


def shared_memory(processes: Iterable[Process]) -> set[Path]:
    """Files in shared memory which the processes have mapped and which still have a name."""
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in (_PROC / str(process.pid) / "maps").read_text(errors="replace").splitlines():
                name = line.partition(_SHARED_MEMORY)[2]
                if name and not name.endswith("(deleted)"):
                    found.add(Path(_SHARED_MEMORY + name))
    return found


def end_all(find: Callable[[], Mapping[int, Process]], *, timeout_s: float = 20.0) -> None:
    """Kill what `find` finds until it finds nothing: a dying launcher may still have started one more.

    Also removes the shared memory those processes had mapped. Returns after timeout_s at the latest.
    """
    deadline = time.monotonic() + timeout_s
    segments: set[Path] = set()
    while (alive := find()) and time.monotonic() < deadline:
        segments |= shared_memory(alive.values())
        kill(alive.values())
        time.sleep(0.02)  # the kernel takes a moment to tear down large address spaces
    unlink(segments)


def unlink(segments: Iterable[Path]) -> None:
    """Remove segments; those without a name any more are skipped."""
    for segment in segments:
        segment.unlink(missing_ok=True)


def write_sessions(directory: Path, sessions: Mapping[int, int]) -> None:
    """Leave the cluster's sessions where the reaper finds them."""
    draft = directory / f"{SESSIONS_FILE}.new"
    draft.write_text("".join(f"{session} {started}\n" for session, started in sessions.items()))
    draft.replace(directory / SESSIONS_FILE)


def read_sessions(directory: Path) -> dict[int, int]:
    """What write_sessions left; nothing when there is no such file."""
    try:
        lines = (directory / SESSIONS_FILE).read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {int(session): int(started) for session, started in (line.split() for line in lines)}


def _reap(directory: Path) -> None:
    sys.stdin.buffer.read()  # ends when the owner closes the pipe or dies, however it dies
    if not directory.exists():
        return
    sessions = read_sessions(directory)
    end_all(lambda: members(read_processes(), directory, sessions))
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _reap(Path(sys.argv[1]))
