"""A job on a store without conditional writes: found out at its start, and said on the console and in the journal."""

from __future__ import annotations

from typing import Any

import pytest

from ray_dr import config
from ray_dr.actors import host as hosts
from ray_dr.actors import launch
from ray_dr.actors.perform import Found
from ray_dr.checkpoint import depot
from ray_dr.model.job import Job, StoreTier
from ray_dr.model.journal import JobOpened, Noted, Record
from ray_dr.stores import open as opening
from ray_dr.stores.base import Buffer, Store
from ray_dr.stores.memory import MemoryStore
from ray_dr.telemetry.journal import read_journal

JOB = Job("night", StoreTier("s3://bucket/prefix"))


class Ignoring(MemoryStore):
    """Ignores the condition, as some S3 servers do."""

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        super().put(key, data)


class NoCluster:
    """Stands for the Performer where there is nothing to act upon."""

    def __init__(self, *_: object) -> None:
        pass

    def find_living(self) -> Found:
        return Found((), 0, None, 0)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def opened(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What a supervisor's journal holds when it has opened its job."""
    monkeypatch.setattr(depot, "open_store", lambda _: store)
    monkeypatch.setattr(hosts, "Performer", NoCluster)
    host = hosts.Host(JOB, b"", b"")
    host._open()
    assert host.journal.close()
    return list(read_journal(store, JOB.name))


def test_the_journal_says_that_the_store_is_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = opened(Ignoring(), monkeypatch)
    assert isinstance(first, JobOpened)
    assert isinstance(second, Noted)
    assert second.name == "store.weaker"
    assert "one cluster at a time" in str(second.fields["guarantee"])


def test_the_journal_says_nothing_of_a_sound_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [record for record in opened(MemoryStore(), monkeypatch) if isinstance(record, Noted)]


@pytest.mark.parametrize(("store", "warned"), [(Ignoring(), True), (MemoryStore(), False)])
def test_the_console_says_so_before_anything_starts(
    store: Store, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "open_store", lambda _: store)
    monkeypatch.setattr(launch, "connect", lambda: None)
    monkeypatch.setattr(launch, "submit", lambda *_: None)
    monkeypatch.setattr(launch, "_follow", lambda *_: launch.Outcome(JOB.name, False, 3))
    monkeypatch.setattr(launch.cluster, "kill", lambda _: None)
    assert launch.run(lambda _: None, JOB).step == 3
    assert ("has no conditional writes" in capsys.readouterr().err) == warned
    assert config.check_store(JOB).conditional_put != warned
    assert not list(store.list("")), "the probe leaves nothing behind"
