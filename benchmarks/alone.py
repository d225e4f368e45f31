"""Run a function in a process of its own, that ends with everything it started, and tells when it failed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LONGEST_S = 3600.0
"""A process that has told nothing for so long has failed."""
ENDING_S = 60.0


def said(error: BaseException) -> str:
    """An error in one line, as a table has it."""
    text = str(error).strip()
    if "Traceback (" in text:
        text = text.splitlines()[-1]
    text = " ".join(text.split())
    return f"failed: {type(error).__name__}: {text[:300]}".replace("|", "/")


def run_alone(work: Callable[..., dict[str, Any]], *given: object) -> dict[str, Any]:
    """What `work(*given)` gave, or {"failed": why}. `work` and what it is given can be pickled."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(work, given, there))
    process.start()
    there.close()
    try:
        if not here.poll(LONGEST_S):
            return {"failed": f"failed: nothing came of it in {LONGEST_S:.0f} s"}
        told: dict[str, Any] = here.recv()
        process.join(ENDING_S)
    except EOFError:
        process.join(ENDING_S)
        told = {"failed": f"failed: its process ended ({process.exitcode})"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return told


def _run(work: Callable[..., dict[str, Any]], given: tuple[object, ...], pipe: Any) -> None:
    os.setpgid(0, 0)
    try:
        told = work(*given)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        traceback.print_exc()
        told = {"failed": said(error)}
    pipe.send(told)
