"""Who stands by, who takes whose place, who keeps whose copies meanwhile; and what of it job.yaml may say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_dr import config
from ray_dr.actors.cluster import RayNode, fits
from ray_dr.cli.status import describe
from ray_dr.errors import ConfigError
from ray_dr.model.actions import FormGroup, ReleaseNode, RequestNodes, StartWorkers, StopGroup
from ray_dr.model.events import (
    Event,
    FirstStep,
    InventoryTaken,
    NodeJoined,
    NodeLost,
    Opened,
    Tick,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)
from ray_dr.model.job import Job, StoreTier, Workers
from ray_dr.model.journal import Decided
from ray_dr.model.recovery import Node, Policy, Queued, Running, State
from ray_dr.recovery.fleet import ranked
from ray_dr.recovery.invariants import check
from ray_dr.recovery.machine import initial, step
from ray_dr.recovery.policy import policy_of
from ray_dr.recovery.replicas import replicas
from ray_dr.recovery.standbys import chosen, in_words, keepers, takers
from ray_dr.telemetry.timeline import status

POLICY = Policy(2, 2, 1, 2, 15.0, 300.0, 1.0, 3, standby_nodes=1)
DOMAINS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.tuples(st.sampled_from(["", "r1", "r2"]), st.sampled_from(["", "z1", "z2"])),
    min_size=1, max_size=12,
)  # fmt: skip


def state(*ready: str, order: str = "") -> State:
    """Nodes a, b, ... with workers named by digits: `state("12", "1")` has a/1, a/2 and b/1."""
    nodes = [Node(name, ready=tuple(f"{name}/{one}" for one in workers)) for name, workers in zip("abcdef", ready, strict=False)]
    return State(Queued(), nodes=tuple(nodes), order=tuple(order.split()))


class Life:
    """A job told one event after the other; every decision is checked."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.state, self.at = policy, initial(), 100.0
        self.records: list[Decided] = []

    def meet(self, event: Event) -> Decided:
        decision = step(self.state, event, self.policy)
        check(self.state, event, decision, self.policy)
        self.state = decision.state
        self.records.append(Decided(event.at, 1, len(self.records), event, decision.state, decision.actions, decision.reason))
        return self.records[-1]

    def begin(self, nodes: str) -> None:
        """Nodes come with all their workers, and the first group does a step."""
        self.meet(Opened(self.at, 1, 0))
        for node in nodes:
            self.meet(NodeJoined(self.at, node))
        self.all_ready()
        self.meet(InventoryTaken(self.at, 0, None))
        self.meet(FirstStep(self.at, 1, 1))
        self.all_ready()

    def all_ready(self) -> None:
        while node := next((node for node in self.state.nodes if node.starting), None):
            self.meet(WorkerReady(self.at, f"{node.id}/{len(self.records)}", node.id))

    def recover(self) -> tuple[str, ...]:
        """Survivors leave, nothing is found, the next group does a step: its members."""
        while unwinding := getattr(self.state.phase, "unwinding", ()):
            self.meet(WorkerStopped(self.at, unwinding[0], self.state.attempt, 1))
        self.meet(InventoryTaken(self.at, self.state.incidents, None))
        self.meet(FirstStep(self.at, self.state.attempt, self.state.step + 1))
        assert isinstance(self.state.phase, Running)
        return self.state.phase.group.members

    def actions(self, kind: type) -> list[object]:
        return [action for record in self.records for action in record.actions if isinstance(action, kind)]


# ------------------------------------------------------------------------------------------------------------ who is chosen


def test_a_group_takes_the_fullest_nodes_then_those_of_members_then_the_oldest() -> None:
    assert chosen(state("12", "12", "12"), POLICY) == ("a/1", "a/2", "b/1", "b/2")
    assert chosen(state("12", "1", "12"), POLICY) == ("a/1", "a/2", "c/1", "c/2")
    assert chosen(state("12", "12", "12", order="c/1 c/2 a/1 a/2"), POLICY) == ("a/1", "a/2", "c/1", "c/2")
    assert chosen(state("1", "", "1"), POLICY) == ("a/1", "c/1")


def test_on_a_node_members_come_first() -> None:
    policy = replace(POLICY, standby_nodes=0, standby_processes=1)
    assert chosen(state("123", "12", order="a/2 a/3 b/1 b/2"), policy) == ("a/2", "a/3", "b/1", "b/2")
    assert ranked(state("12", "12", order="a/2 a/3 b/1 b/2"), policy) == ("a/2", "a/1", "b/1", "b/2")


def test_a_full_standby_node_is_worth_more_than_a_survivor_alone() -> None:
    lost = state("1", "12", "12", order="a/1 a/2 b/1 b/2")
    assert ranked(lost, POLICY) == ("c/1", "c/2", "b/1", "b/2")
    assert takers(lost.order, ranked(lost, POLICY)) == (("c/1", "a/1"), ("c/2", "a/2"))


def test_a_smaller_group_has_no_places_taken() -> None:
    assert takers(("a/1", "b/1"), ("c/1",)) == ()
    assert in_words((("x", "a"), ("y", "b"), ("z", "c"), ("w", "d"))) == (
        "x takes the place of a, y that of b, z that of c, 1 more take others'"
    )


# ------------------------------------------------------------------------------------------------------------------- lives


def test_a_lost_node_is_made_up_for_at_once_and_its_own_successor_stands_by() -> None:
    life = Life(POLICY)
    life.begin("abc")
    before = life.state.order
    life.meet(NodeLost(110.0, "a", "gone", 1))
    members = life.recover()
    assert len(members) == len(before)
    assert [member.split("/")[0] for member in members] == ["c", "c", "b", "b"]
    assert life.actions(RequestNodes) == [RequestNodes(3)] * 2
    life.meet(NodeJoined(120.0, "d"))
    life.all_ready()
    life.meet(Tick(5000.0))
    assert life.state.order == members
    assert not life.actions(StopGroup)


def test_a_lost_worker_without_a_standby_process_makes_the_whole_standby_node_step_in() -> None:
    life = Life(POLICY)
    life.begin("abc")
    lost = life.state.order[0]
    life.meet(WorkerLost(110.0, lost, "a", "signal 9", 1))
    assert {member.split("/")[0] for member in life.recover()} == {"b", "c"}
    life.all_ready()
    life.meet(Tick(5000.0))
    assert not life.actions(StopGroup)
    assert len(status(life.records).standbys) == 2


def test_processes_that_stand_by_start_only_while_steps_are_done_and_only_beside_members() -> None:
    life = Life(replace(POLICY, standby_processes=1))
    life.begin("abc")
    assert [len(node.ready) for node in life.state.nodes] == [3, 3, 2]
    lost = life.state.order[0]
    began = len(life.records)
    life.meet(WorkerLost(110.0, lost, "a", "signal 9", 1))
    members = life.recover()
    assert members[1:] == life.records[began - 1].state.order[1:]
    assert members[0].startswith("a/")
    started = [(type(record.event), record.actions) for record in life.records[began:] if any(
        isinstance(action, StartWorkers) for action in record.actions)]  # fmt: skip
    assert started == [(FirstStep, (StartWorkers("a", 1),))]


def test_a_standby_node_on_which_nothing_starts_is_given_back_and_the_group_goes_on() -> None:
    life = Life(POLICY)
    life.begin("ab")
    life.meet(NodeJoined(110.0, "c"))
    for number in range(20):
        if not any(node.starting for node in life.state.nodes):
            break
        life.meet(WorkerLost(111.0, f"c/x{number}", "c", "exit code 1", 1))
    assert life.actions(ReleaseNode) == [ReleaseNode("c")]
    assert isinstance(life.state.phase, Running)
    assert not life.actions(StopGroup)


def test_a_group_that_went_on_smaller_grows_with_who_would_else_stand_by() -> None:
    life = Life(POLICY)
    life.begin("ab")
    life.meet(NodeLost(110.0, "a", "gone", 1))
    assert len(life.recover()) == 2
    life.meet(NodeJoined(120.0, "c"))
    life.all_ready()
    assert len(life.actions(StopGroup)) == 1


def test_the_status_and_the_reasons_say_who_stands_by() -> None:
    life = Life(POLICY)
    life.begin("abc")
    standbys = status(life.records).standbys
    assert [worker.split("/")[0] for worker in standbys] == ["c", "c"]
    shown = describe("job", "memory://a", status(life.records), None, now=200.0)
    assert any(line.split() == ["standing", "by", f"{standbys[0]},", standbys[1]] for line in shown.splitlines())
    said = life.meet(NodeLost(110.0, "a", "gone", 1)).reason
    assert f"2 of 4 workers left, standby {standbys[0]} takes the place of {life.state.order[0]}" in said
    life.recover()
    formed = next(record for record in reversed(life.records) if any(isinstance(a, FormGroup) for a in record.actions))
    assert f"{standbys[0]} takes the place of" in formed.reason
    assert status(life.records).standbys == ()


# ----------------------------------------------------------------------------------------------------------------- copies


@given(DOMAINS, st.integers(1, 4), st.sets(st.text("abcdef", min_size=1, max_size=4), max_size=4))
def test_every_node_has_its_copies_elsewhere_and_no_standby_keeps_more_than_a_member(
    domains: dict[str, tuple[str, ...]], copies: int, spare: set[str]
) -> None:
    spare &= set(domains)
    found = keepers(domains, copies, sorted(spare))
    assert found.keys() == domains.keys()
    for node, on in found.items():
        assert len(set(on)) == len(on)
        assert node not in on
        assert len(on) == (0 if node in spare else min(copies - 1, len(domains) - 1))
    kept = Counter(keeper for on in found.values() for keeper in on)
    assert all(kept[node] <= copies for node in spare)


@given(DOMAINS, st.integers(1, 4))
def test_without_standbys_copies_lie_as_they_did(domains: dict[str, tuple[str, ...]], copies: int) -> None:
    assert keepers(domains, copies, ()) == replicas(domains, copies)


def test_standbys_keep_copies_first() -> None:
    nodes: Mapping[str, tuple[str, ...]] = dict.fromkeys("abc", ())
    assert keepers(nodes, 2, ["c"]) == {"a": ("c",), "b": ("c",), "c": ()}
    many = keepers(dict.fromkeys("abcdef", ()), 2, ["f"])
    assert [node for node, on in many.items() if on == ("f",)] == ["a", "b"], "as many as fit"


def test_a_copy_in_another_domain_is_worth_more_than_a_warm_one() -> None:
    racks = {"a": ("r1",), "b": ("r2",), "c": ("r1",)}
    assert keepers(racks, 2, ["c"]) == {"a": ("b",), "b": ("c",), "c": ()}


# -------------------------------------------------------------------------------------------------------------- job.yaml


def test_job_yaml_says_how_many_stand_by() -> None:
    job = config.parse("job: a\nstore: /s\nworkers: {nodes: 1, per_node: 2, standby_nodes: 1, standby_processes: 2}\n")
    assert (job.workers.standby_nodes, job.workers.standby_processes) == (1, 2)
    assert job.memory.copies == 2, "the standby node keeps one"
    policy = policy_of(job)
    assert (policy.nodes_wanted, policy.standby_processes) == (2, 2)
    assert not policy_of(Job("a", StoreTier("memory://a"))).has_standbys


@pytest.mark.parametrize(
    ("workers", "complaint"),
    [
        ("standby_nodes: -1", "standby_nodes: "),
        ("standby_processes: 1.5", "standby_processes: "),
        ("standby_processes: 2", "2 can never be needed on a node of 1 workers (write at most 1)"),
        ("gpus_per_node: 8, per_node: 4, standby_processes: 1",
         "a worker of 2 GPUs can't be replaced by a standby process (leave it out, or write per_node: 8, a worker for each GPU)"),
    ],
)  # fmt: skip
def test_what_cannot_stand_by_is_refused_with_a_remedy(workers: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.parse(f"job: a\nworkers: {{{workers}}}\n")
    assert complaint in str(raised.value)
    assert "workers.standby_" in str(raised.value)


def test_with_standby_processes_a_node_must_have_the_jobs_gpus_and_no_others() -> None:
    node = RayNode("n", "", 16.0, 8.0)
    assert fits(node, Workers(per_node=4, gpus_per_worker=1.0))
    assert not fits(node, Workers(per_node=4, gpus_per_worker=1.0, standby_processes=1))
    assert fits(node, Workers(per_node=8, gpus_per_worker=1.0, standby_processes=1))
    assert fits(node, Workers(per_node=8, standby_processes=1))
