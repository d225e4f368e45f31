"""What Ray says of a worker's end: its memory watch's word is a finding, anything else is known better already."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from ray_dr.actors import deaths
from ray_dr.detection.classify import classify
from ray_dr.model.journal import Noted
from ray_dr.model.signal import FaultKind
from ray_dr.recovery.witnesses import _findings

WORKER, NODE = "a" * 13 + "/1.1", "a" * 56


@pytest.mark.parametrize(
    ("error", "kinds"),
    [
        (OutOfMemoryError("Memory on the node was 30GB / 32GB (0.96), which exceeds the threshold"), ["out_of_memory"]),
        (ActorDiedError(), []), (None, []),
    ],
)  # fmt: skip
def test_only_the_memory_watchs_word_is_a_finding(error: Exception | None, kinds: list[str]) -> None:
    answer: Future[Any] = Future()
    notes: list[Noted] = []
    host = SimpleNamespace(note=lambda name, **fields: notes.append(Noted(time.time(), name, fields)))
    handle = SimpleNamespace(describe=SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: answer)))
    with ThreadPoolExecutor(1) as pool:
        deaths.ask(host, WORKER, NODE, handle, pool)  # type: ignore[arg-type]
        answer.set_exception(error) if error else answer.set_result({})
    assert [note.fields["kind"] for note in notes] == kinds
    for finding in _findings(notes):
        assert finding.subjects[0].worker == WORKER
        assert "exceeds the threshold" in finding.evidence
        diagnosis = classify([finding])
        assert diagnosis is not None
        assert diagnosis.kind is FaultKind.OUT_OF_MEMORY
