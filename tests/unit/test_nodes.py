"""What is held against machines: in a store, in the supervisor's choice of nodes, on the command line."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ray_dr.actors.cluster import RayNode
from ray_dr.actors.machines import Machines
from ray_dr.cli.main import main
from ray_dr.model.job import Job, StoreTier
from ray_dr.model.nodes import Charge, Entry, Pardon
from ray_dr.model.recovery import FailureKind, Group, Incident, Node, Policy, Queued, Recovering, Running, State
from ray_dr.model.signal import FaultKind
from ray_dr.stores.base import Store
from ray_dr.stores.disk import FileStore
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore
from ray_dr.telemetry.nodes import ENTRIES_MOST, FORGOTTEN_S, NodeBook, key_of, machine_name

NOW = 1_800_000_000.0
WAIT_S = 60.0
POLICY = Policy(1, 4, 1, 1, 15.0, 300.0, 1.0, 3)
JOB = Job("job", StoreTier("memory://x"))


def charge(machine: str, number: int, at: float = NOW, job: str = "job") -> Charge:
    return Charge(machine, FaultKind.NODE_GONE, at, job, f"1.{number}", "connection closed")


def book(store: Store, now: float = NOW) -> NodeBook:
    return NodeBook(store, lambda: now)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else FileStore(str(tmp_path / "store"))


# -- in a store


def test_what_racing_writers_tell_is_all_there_and_what_both_tell_is_there_once(store: Store) -> None:
    start = threading.Barrier(2)

    def write(job: str) -> None:
        mine = book(store)
        start.wait()
        for number in range(8):
            mine.add(charge("a", number, job=job))
            mine.add(charge("b", number, job="both"))
            mine.entries()

    writers = [threading.Thread(target=write, args=(job,)) for job in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    told = book(store).entries()
    assert sorted((entry.machine, entry.job, entry.incident) for entry in told if isinstance(entry, Charge)) == sorted(
        [(machine, job, f"1.{number}") for machine, job in (("a", "one"), ("a", "two"), ("b", "both")) for number in range(8)]
    )


def test_what_is_read_is_what_was_written_and_counts_for_every_job(store: Store) -> None:
    told: list[Entry] = [charge("a", 1), Pardon("a", NOW + 1), replace(charge("a.i-0f", 2, NOW + 2), share=0.5)]
    for entry in told:
        book(store).add(entry)
    assert set(book(store).entries()) == set(told)


def test_only_the_newest_of_a_machine_are_kept_and_nothing_that_has_faded(store: Store) -> None:
    mine = book(store)
    for number in range(ENTRIES_MOST + 5):
        mine.add(charge("a", number, NOW - number))
    mine.add(charge("b", 1, NOW - FORGOTTEN_S - 1))
    assert {entry.incident for entry in mine.entries() if isinstance(entry, Charge)} == {f"1.{n}" for n in range(ENTRIES_MOST)}
    assert len(list(store.list("nodes/"))) == ENTRIES_MOST


def test_what_was_read_once_is_not_read_again() -> None:
    store = FaultyStore(MemoryStore())
    mine = book(store)
    mine.add(charge("a", 1))
    assert mine.entries() == mine.entries()
    assert sum(operation == "get" for operation, _ in store.calls) == 1


def test_what_cannot_be_understood_is_held_against_nobody(store: Store) -> None:
    good, newer, moved = charge("a", 1), charge("a", 2), charge("b", 3)
    book(store).add(good)
    store.put(key_of(newer), json.dumps({"type": "Charge", "machine": "a", "kind": "struck_by_lightning"}).encode())
    store.put(key_of(moved), json.dumps({"type": "Pardon", "machine": "a", "at": NOW}).encode())
    store.put(f"nodes/a/{1:015d}-{0:016x}.json", b"\xff{")
    store.put("nodes/readme", b"")
    assert book(store).entries() == (good,)


def test_every_host_has_a_name_that_can_stand_in_a_store() -> None:
    store = MemoryStore()
    for name in (machine_name("ip-10-0-0-1.ec2", "i-0f/3"), machine_name("-_"), machine_name("a..b"), machine_name("h" * 300)):
        store.put(key_of(charge(name, 1)), b"")
    assert machine_name("node-1", "i-0f") == "node-1.i-0f"


# -- in the supervisor


@dataclass
class Host:
    store: Store
    policy: Policy = POLICY
    job: Job = JOB
    term: int = 2
    noted: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    told: threading.Event = field(default_factory=threading.Event)

    def note(self, name: str, **fields: object) -> None:
        self.noted.append((name, fields))
        self.told.set()


def nodes(*names: str) -> list[RayNode]:
    return [RayNode(f"ray-{name}", "10.0.0.1", 4.0, 0.0, name, {}) for name in names]


def machines(host: Any) -> Machines:
    return Machines(host)


def condemn(store: Store, machine: str) -> None:
    for number in range(3):
        book(store).add(charge(machine, number, time.time() - number, "another job"))


def test_a_machine_another_job_had_trouble_with_is_left_out_and_that_is_said_once() -> None:
    host = Host(MemoryStore())
    condemn(host.store, "b")
    known = machines(host)
    alive = nodes("a", "b", "c")
    assert [known.usable(alive, alive) for _ in range(2)] == [["ray-a", "ray-c"]] * 2
    assert known.left_out == 1
    ((name, fields),) = host.noted
    assert (name, fields["machine"]) == ("node.quarantined", "b")
    assert "another job" in str(fields["reason"])
    known.close(WAIT_S)


def test_a_condemned_machine_is_used_where_too_few_are_left_without_it() -> None:
    host = Host(MemoryStore(), policy=replace(POLICY, nodes_min=2, min_nodes_to_run=2))
    condemn(host.store, "b")
    known = machines(host)
    assert known.usable(nodes("a", "b"), nodes("a", "b")) == ["ray-a", "ray-b"]
    assert [name for name, _ in host.noted] == ["node.spared"]
    known.close(WAIT_S)


def test_a_machine_just_lost_is_the_last_to_be_taken_again_also_after_its_ray_restarted() -> None:
    host = Host(MemoryStore())
    known = machines(host)
    known.usable(nodes("a", "b"), nodes("a", "b"))
    known.lost("ray-a")
    again = [RayNode("ray-a2", "10.0.0.1", 4.0, 0.0, "a", {}), *nodes("b", "c")]
    assert known.usable(again, again) == ["ray-b", "ray-c", "ray-a2"]
    known.close(WAIT_S)


def test_ray_nodes_on_one_machine_are_told_apart() -> None:
    host = Host(MemoryStore())
    condemn(host.store, "a")
    known = machines(host)
    two = [RayNode("r1", "", 4.0, 0.0, "a", {}), RayNode("r2", "", 4.0, 0.0, "a", {})]
    assert known.usable(two, two) == ["r1", "r2"]
    other = [RayNode("r1", "", 4.0, 0.0, "c", {"instance-id": "i-1"}), RayNode("r2", "", 4.0, 0.0, "c", {"instance-id": "i-2"})]
    condemn(host.store, "c.i-2")
    second = machines(host)
    assert second.usable(other, other) == ["r1"]
    known.close(WAIT_S)
    second.close(WAIT_S)


def recovering(incident: Incident) -> State:
    return State(Recovering(incident, (), None, incident.at), nodes=(Node("ray-a", lost=("a/0.1",)), Node("ray-b")))


def test_an_incident_is_stored_against_its_root_cause_once_it_is_over() -> None:
    host = Host(MemoryStore())
    known = machines(host)
    known.usable(nodes("a", "b"), nodes("a", "b"))
    broken = Incident(1, FailureKind.GROUP_BROKEN, "attempt 1", NOW, 9)
    known.decided(recovering(broken))
    known.decided(recovering(replace(broken, kind=FailureKind.WORKER_LOST, subject="a/0.1", detail="signal 9")))
    known.decided(State(Running(Group(2, ("b/0.1",), None))))
    known.decided(recovering(Incident(2, FailureKind.USER_ERROR, "a/0.1", NOW + 1, 9)))
    known.decided(recovering(Incident(3, FailureKind.NODE_LOST, "ray-b", NOW + 2, 9)))
    known.close(WAIT_S)
    assert book(host.store).entries() == (
        Charge("a", FaultKind.PROCESS_GONE, NOW, "job", "2.1", "signal 9"),
        Charge("b", FaultKind.NODE_GONE, NOW + 2, "job", "2.3"),
    )


def test_a_job_counts_its_own_incidents_while_the_store_is_away_and_says_once_that_it_is() -> None:
    store = FaultyStore(MemoryStore())
    store.unavailable = True
    host = Host(store)
    known = machines(host)
    alive = nodes("a", "b", "c")
    assert known.usable(alive, alive) == ["ray-a", "ray-b", "ray-c"]
    for number in range(1, 5):
        known.decided(State(Recovering(Incident(number, FailureKind.NODE_LOST, "ray-b", time.time(), 9), (), None, NOW)))
    known.decided(State(Queued()))
    assert known.usable(alive, alive) == ["ray-a", "ray-c"]
    assert host.told.wait(WAIT_S)
    known.close(WAIT_S)
    assert [name for name, _ in host.noted if name == "nodes.unknown"] == ["nodes.unknown"]


# -- on the command line


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["nodes", *arguments])
    return done.exit_code, done.output


def test_nodes_are_listed_with_reasons_and_released(tmp_path: Path) -> None:
    place = str(tmp_path / "store")
    assert run("--store", place)[1].startswith("nothing is held against any machine")
    condemn(FileStore(place), "gpu-7")
    status, shown = run("--store", place)
    assert status == 0
    assert "gpu-7" in shown
    assert "condemned" in shown
    (listed,) = json.loads(run("--store", place, "--json")[1])["nodes"]
    assert (listed["machine"], listed["standing"], listed["incidents"]) == ("gpu-7", "condemned", 3)
    assert run("release", "gpu-8", "--store", place)[0] == 2
    assert run("--store", place, "release", "gpu-7") == (0, "gpu-7 is released\n")
    assert run("--store", place)[1].startswith("nothing is held against any machine")
