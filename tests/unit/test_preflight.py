"""Nodes examined when they come: what is measured, what is held to be bad beside the others, and what is done about it."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ray_dr.actors import gpus, preflight
from ray_dr.actors.examination import Examination
from ray_dr.actors.node_agent import Agent
from ray_dr.actors.preflight import Preflight
from ray_dr.detection.preflight import FACTORS, OFFSET_MOST_S, Doubt, doubts, verdict
from ray_dr.errors import AccessDenied
from ray_dr.model import codec
from ray_dr.model.job import Detecting
from ray_dr.model.preflight import Figures, GpuState
from ray_dr.model.signal import FaultKind, Xid
from ray_dr.stores.disk import FileStore

TOKEN = b"secret"
USUAL = {"compute": 0.02, "memory": 0.04, "disk": 0.05, "store": 0.2, "peer": 0.2}
NAMES = tuple(letter * 56 for letter in "abcd")


def fleet(count: int = 3, **own: float) -> list[Figures]:
    """Nodes of one kind; the first one's figures are changed as told, times what is usual."""
    made = [Figures(name, dict(USUAL)) for name in NAMES[:count]]
    made[0] = replace(made[0], costs={what: cost * own.get(what, 1.0) for what, cost in USUAL.items()})
    return made


def doubted(figures: list[Figures]) -> list[str]:
    return [doubt.what for doubt in doubts(figures[0], figures)]


# -- the judge


@pytest.mark.parametrize("what", FACTORS)
def test_what_is_far_worse_than_elsewhere_is_doubted_and_what_is_somewhat_worse_is_not(what: str) -> None:
    assert doubted(fleet(**{what: 40.0})) == [what]
    assert doubted(fleet(**{what: 2.0})) == []


def test_a_slow_but_uniform_cluster_is_fit_and_two_nodes_say_nothing_of_each_other() -> None:
    slow = [replace(one, costs={what: 50 * cost for what, cost in one.costs.items()}) for one in fleet()]
    assert all(doubts(one, slow) == () for one in slow)
    assert doubted(fleet(2, compute=40.0)) == []


def test_nodes_of_two_kinds_are_fit() -> None:
    mixed = [replace(one, costs={**USUAL, "compute": 0.02 * (3.5 if number % 2 else 1.0)}) for number, one in enumerate(fleet(4))]
    assert all(doubts(one, mixed) == () for one in mixed)


def test_what_only_this_node_cannot_do_is_doubted() -> None:
    alone = fleet()
    alone[0] = replace(alone[0], troubles={"disk": "Read-only file system"})
    (doubt,) = doubts(alone[0], alone)
    assert doubt.evidence == "its disk can't be used: Read-only file system"
    assert doubts(alone[0], alone[:1]) == (), "nobody to compare with"
    everywhere = [replace(one, troubles={"store": "away"}) for one in fleet()]
    assert all(doubts(one, everywhere) == () for one in everywhere)


def test_a_clock_that_is_wrong_is_doubted_beyond_what_it_was_measured_by() -> None:
    figures = fleet()
    assert doubts(replace(figures[0], offset_s=-2 * OFFSET_MOST_S), figures)[0].evidence.endswith("120 s behind the supervisor's")
    assert doubts(replace(figures[0], offset_s=OFFSET_MOST_S + 5, offset_error_s=6.0), figures) == ()


@pytest.mark.parametrize(
    ("state", "sure"),
    [
        (GpuState(0, "H"), None), (GpuState(0, "H", uncorrected=2), True), (GpuState(0, "H", pending=True), True),
        (GpuState(0, "H", failed=True), True), (GpuState(0, "H", slowed=True), False), (GpuState(0, error="lost"), False),
    ],
)  # fmt: skip
def test_a_drivers_word_needs_no_comparison(state: GpuState, sure: bool | None) -> None:
    found = doubts(Figures("a", gpus=(state,)), ())
    assert [doubt.sure for doubt in found] == ([] if sure is None else [sure])


def test_a_doubt_is_a_verdict_only_when_it_comes_back() -> None:
    slow, full, dead = Doubt("disk", "slow"), Doubt("no store", "denied"), Doubt("gpu 0 memory", "broken", sure=True)
    assert verdict((slow,), ()) == ""
    assert verdict((slow,), (full,)) == ""
    assert verdict((slow, full), (slow,)) == "slow"
    assert verdict((dead,), ()) == verdict((), (dead,)) == verdict((dead,), (dead,)) == "broken"


@pytest.mark.parametrize("nodes", [8, 64])
def test_nodes_of_a_noisy_but_even_cluster_are_never_given_up(nodes: int) -> None:
    """Figures as they were seen on a machine that others fill: elapsed times by a lognormal law with p99 at five medians."""
    dice = random.Random(nodes)

    def measured(name: str) -> Figures:
        noise = {what: dice.gauss(0, 0.02 if what in ("compute", "memory") else 0.7) for what in USUAL}
        return Figures(name, {what: cost * 2.718 ** noise[what] for what, cost in USUAL.items()})

    for _ in range(2000 // nodes):
        short = [measured(str(number)) for number in range(nodes)]
        for one in short:
            if found := doubts(one, short):
                assert verdict(found, doubts(measured(one.node), short)) == ""


# -- what is measured


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent("b" * 56, "127.0.0.1", f"file://{tmp_path}/store", TOKEN)
    yield made
    made.close()


def test_an_examination_measures_everything_and_leaves_nothing(agent: Agent, tmp_path: Path) -> None:
    other = Agent("c" * 56, "127.0.0.1", "memory://other", TOKEN)
    (tmp_path / "disk").mkdir()
    own = Examination("b", lambda: FileStore(str(tmp_path / "store")), str(tmp_path / "disk"), TOKEN)
    threads = threading.active_count()
    figures = own.run(other.address, long=False)
    assert set(figures.costs) == set(FACTORS)
    assert all(cost > 0 for cost in figures.costs.values())
    assert (figures.troubles, figures.took_s > 0) == ({}, True)
    assert codec.from_json(Figures, codec.to_json(figures)) == figures
    assert not list((tmp_path / "disk").iterdir())
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    other.close()
    end = time.monotonic() + 60
    while threading.active_count() > threads:
        assert time.monotonic() < end


def test_what_cannot_be_measured_is_said_and_the_rest_is_measured(tmp_path: Path) -> None:
    def denied() -> Any:
        raise AccessDenied("no rights there")

    figures = Examination("b", denied, str(tmp_path / "nowhere"), TOKEN).run("127.0.0.1:1", long=False)
    assert set(figures.costs) == {"compute", "memory"}
    assert set(figures.troubles) == {"disk", "store", "peer"}
    assert "no rights there" in figures.troubles["store"]


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.states() == ()
    listening = gpus.Xids()
    assert listening.take() == ()
    listening.close()


class Driver(ModuleType):
    """A driver's library with one GPU that had errors, and one that is lost."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, nvmlEventTypeXidCriticalError = 1, 0, 8
    nvmlClocksThrottleReasonHwSlowdown = 8

    class NVMLError(Exception): ...

    class NVMLError_Timeout(NVMLError): ...

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.said = [SimpleNamespace(device=0, eventData=79)]
        for name in ("Init", "Shutdown", "EventSetCreate", "DeviceRegisterEvents"):
            setattr(self, f"nvml{name}", lambda *_: None)
        self.nvmlDeviceGetCount = lambda: 2
        self.nvmlDeviceGetIndex = lambda gpu: gpu
        self.nvmlDeviceGetName = lambda gpu: b"H200"
        self.nvmlDeviceGetTotalEccErrors = lambda gpu, kind, counter: 3
        self.nvmlDeviceGetRemappedRows = lambda gpu: (0, 0, 1, 0)
        self.nvmlDeviceGetRetiredPagesPendingStatus = self._unsupported
        self.nvmlDeviceGetCurrentClocksThrottleReasons = lambda gpu: 8 | 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> Any:
        if self.said:
            return self.said.pop()
        raise self.NVMLError_Timeout

    def _unsupported(self, *_: object) -> Any:
        raise self.NVMLError("Not Supported")


def test_a_driver_is_asked_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert gpus.states() == (GpuState(0, "H200", 3, pending=True, slowed=True), GpuState(1, error="GPU is lost"))
    driver.nvmlDeviceGetHandleByIndex = lambda index: index  # type: ignore[method-assign]
    listening = gpus.Xids()
    found: list[Xid] = []
    end = time.monotonic() + 60
    while not found:
        assert time.monotonic() < end
        found += listening.take()
    assert found == [Xid(0, 79)]
    listening.close()


# -- what is done about it


class Handle:
    """A node's agent, as the supervisor calls it; `says(long)` are its figures."""

    def __init__(self, says: Callable[[bool], Figures]) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.examine = SimpleNamespace(remote=lambda peer, long: self._examine(says, peer, long))
        self.clock = SimpleNamespace(remote=time.time)

    def _examine(self, says: Callable[[bool], Figures], peer: str, long: bool) -> Any:
        self.asked.append((peer, long))
        return codec.to_json(says(long))


class Host:
    def __init__(self, *, wanted: bool = True) -> None:
        self.job = SimpleNamespace(detection=Detecting(preflight=wanted))
        self.notes: list[dict[str, Any]] = []
        self.lost: list[tuple[str, str]] = []
        self.condemned: list[tuple[str, FaultKind, str]] = []
        self.machines = SimpleNamespace(condemn=lambda *what: self.condemned.append(what))
        self.perform = SimpleNamespace(lose_node=lambda *what: self.lost.append(what))

    def note(self, name: str, **fields: Any) -> None:
        self.notes.append({"name": name, **codec.to_json(fields)})


class Inline(ThreadPoolExecutor):
    """Runs what is submitted at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        fn(*args, **kwargs)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(preflight.cluster, "gather", lambda refs, timeout_s: list(refs))


def come(host: Host, *says: Callable[[bool], Figures]) -> list[Handle]:
    examined = Preflight(host)  # type: ignore[arg-type]
    handles = [Handle(say) for say in says]
    for number, handle in enumerate(handles):
        examined.came(NAMES[number], handle, f"address-{number}")
    examined.close()
    return handles


def well(name: str) -> Callable[[bool], Figures]:
    return lambda long: Figures(name, dict(USUAL))


def slow_when(name: str, when: Callable[[bool], bool]) -> Callable[[bool], Figures]:
    return lambda long: Figures(name, {**USUAL, "compute": 0.02 * (10.0 if when(long) else 1.0)})


def test_a_node_that_is_bad_twice_is_given_up_once_there_are_others_to_compare_with(at_once: None) -> None:
    host = Host()
    handles = come(host, slow_when(NAMES[0], lambda long: True), well(NAMES[1]), well(NAMES[2]), well(NAMES[3]))
    assert [long for _, long in handles[0].asked] == [False, True]
    assert all([long for _, long in handle.asked] == [False] for handle in handles[1:])
    assert handles[0].asked[1][0] == "address-2", "the second look is along another line than the third node's"
    why = "its processor takes 10.0 times as long as that of 2 other nodes"
    assert host.condemned == [(NAMES[0], FaultKind.PREFLIGHT, why)]
    ((node, how),) = host.lost
    assert (node, how.endswith(why)) == (NAMES[0], True)
    (finding,) = [note for note in host.notes if note["name"] == "finding"]
    assert (finding["kind"], finding["evidence"]) == ("preflight", how)
    examined = [note for note in host.notes if note["name"] == "node.examined"]
    assert len(examined) == 5
    assert all(abs(note["offset_s"]) < 60 for note in examined)


def test_a_node_that_was_slow_once_stays(at_once: None) -> None:
    host = Host()
    handles = come(host, well(NAMES[0]), well(NAMES[1]), slow_when(NAMES[2], lambda long: not long), well(NAMES[3]))
    assert [long for _, long in handles[2].asked] == [False, True]
    assert (host.lost, host.condemned) == ([], [])


def test_an_agent_that_fails_to_answer_is_noted_and_nothing_else(at_once: None) -> None:
    def fail(long: bool) -> Figures:
        raise OSError("away")

    host = Host()
    come(host, fail, well(NAMES[1]))
    assert [note["name"] for note in host.notes] == ["preflight.failed", "node.examined"]


def test_nobody_is_examined_when_the_owner_wants_none(at_once: None) -> None:
    (handle,) = come(host := Host(wanted=False), well(NAMES[0]))
    assert (handle.asked, host.notes) == ([], [])
