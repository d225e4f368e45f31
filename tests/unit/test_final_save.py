"""What the end of a job puts into its stores, and when it is content: a performer whose agents do as they are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ray_dr.actors import perform
from ray_dr.actors.progress import Progress
from ray_dr.model import codec
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Saved
from ray_dr.model.job import Job, Recovery, StoreTier
from ray_dr.model.journal import Where
from ray_dr.model.recovery import Queued, State
from ray_dr.telemetry.tiers import Completeness

BEGAN, OWN = VersionId(1, 8), VersionId(2, 8)


class Depot:
    """A store that has some versions."""

    def __init__(self, *versions: VersionId) -> None:
        self.versions, self.term = {*versions}, 1

    def refs(self, version: VersionId) -> tuple[object, ...]:
        return (version,) if version in self.versions else ()


class Host:
    """As much of the supervisor as a final save needs. `held`: what the one agent can put."""

    def __init__(self, step: int, held: set[VersionId], staged: bool, **depots: Depot) -> None:
        self.job, self.state = Job("job", StoreTier("memory://x"), recovery=Recovery(start_s=5.0)), State(Queued())
        self.saves = self
        self.depots = {Where(where): depot for where, depot in depots.items()}
        self.progress = Progress(2, 1, began=8, rank_steps={0: step} if step > 8 else {})
        self.complete = Completeness()
        if staged:
            self.complete, _ = self.complete.add(VersionId(2, step), 0, 1, Where.MEMORY, "node")
        self.held, self.posted = held, list[Any]()
        self.asked: list[tuple[VersionId, list[str]]] = []

    def post(self, event: Any) -> None:
        self.posted.append(event)

    def store_again(self, version: Any, to: dict[str, Any], orphans: object) -> None:
        wanted = codec.from_json(VersionId, version)
        self.asked.append((wanted, sorted(to)))
        for where in to if wanted in self.held else ():
            self.depots[Where(where)].versions.add(wanted)

    def save(self, version: VersionId) -> list[tuple[VersionId, list[str]]]:
        """What the agent was asked to put again until the version counted as saved."""
        performer = perform.Performer(self, b"", b"")  # type: ignore[arg-type]
        performer.forming.began = BEGAN
        performer._agents["node"] = SimpleNamespace(  # type: ignore[assignment]
            handle=SimpleNamespace(store_again=SimpleNamespace(remote=self.store_again))
        )
        performer._save_final(version)
        assert [type(event) for event in self.posted] == [Saved]
        return self.asked


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perform, "FINAL_RETRY_S", 0.0)


def test_a_finished_job_run_again_has_nothing_to_save() -> None:
    assert Host(8, set(), False, store=Depot(BEGAN), second=Depot(BEGAN)).save(OWN) == []


def test_what_a_group_without_a_step_staged_anew_is_what_its_stores_are_to_have() -> None:
    host = Host(8, {OWN}, True, store=Depot(), second=Depot(BEGAN))
    assert host.save(OWN) == [(OWN, ["second", "store"])]


def test_memory_that_still_has_what_a_group_began_from_fills_a_store_that_lacks_it() -> None:
    host = Host(8, {BEGAN}, False, store=Depot(), second=Depot(BEGAN))
    assert host.save(OWN) == [(BEGAN, ["store"])]


def test_a_group_that_did_a_step_ends_at_that() -> None:
    version = VersionId(2, 9)
    assert Host(9, {version}, True, store=Depot(BEGAN)).save(version) == [(version, ["store"])]
