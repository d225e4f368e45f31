"""Nodes that are taken away with a notice, in virtual time: no step is lost where the deadline allows it, and no job is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ray_dr.model.job import MemoryTier, Recovery, Workers
from ray_dr.model.recovery import FailureKind, Recovering, Running
from ray_dr.recovery import preemption
from ray_dr.recovery.preemption import Choice
from ray_dr.simulator import promises
from ray_dr.simulator.breach import Breach
from ray_dr.simulator.swarm import Swarm, draw
from ray_dr.simulator.things import Node
from ray_dr.simulator.world import World

SEEDS = range(12)
CALM_S = 300.0


def calm(dice: random.Random, nodes: tuple[int, int, int], *, copies: int) -> Swarm:
    """A world in which nothing happens by itself: `nodes` is (min, max, min_nodes_to_run)."""
    low, high, run = nodes
    drawn = draw(dice, nodes=high)
    job = replace(drawn.job, workers=Workers(low, high, run), memory=MemoryTier(copies=copies),
                  recovery=replace(Recovery(), attempts_without_progress=0))  # fmt: skip
    return replace(drawn, job=job, machines=high, rates={}, step_s=1.0, seal_s=0.5, copy_s=0.5, write_s=5.0, stuck=0.0,
                   call_lost=0.0, start_fails=0.0, unruly=False, poison=0, total_steps=10**9, autoscale_s=60.0,
                   reboot_s=120.0, applied_yet_failed=0.0)  # fmt: skip


def running(seed: int, nodes: tuple[int, int, int] = (2, 3, 1), *, copies: int = 2) -> World:
    dice = random.Random(seed)
    world = World(calm(dice, nodes, copies=copies), dice, trace=None)
    live(world, CALM_S)
    assert world.supervisor is not None
    assert isinstance(world.supervisor.state.phase, Running)
    return world


def live(world: World, for_s: float) -> None:
    world.clock.run(world.clock.now + for_s, lambda: world.over)


def chosen(world: World, since: int) -> list[str]:
    """What was decided about departures."""
    return [why for _, _, why in list(world.trace)[since:] if "preemption: " in why]


def take_away(world: World, nodes: list[Node], left_s: float) -> list[str]:
    """A notice for all of them, their end, and time to get over it; the decisions."""
    before = len(world.trace)
    for node in nodes:
        world.noticed(node, left_s)
    promised = [promises.notice_given(world, node) for node in nodes]
    live(world, left_s)
    for node, word in zip(nodes, promised, strict=True):
        promises.left_in_time(world, node, word)
        world.node_dies(node)
    live(world, CALM_S)
    return chosen(world, before)


def assert_runs(world: World) -> None:
    """It may be growing just now."""
    for _ in range(20):
        if world.supervisor is None or not isinstance(world.supervisor.state.phase, Running):
            live(world, 7.0)
    promises.expect_well(world, "some time after the end of a node")
    assert world.supervisor is not None
    assert world.supervisor.state.failures == 0


@pytest.mark.parametrize("left_s", [0.0, 2.0, 5.0, 10.0, 30.0, 120.0])
def test_no_step_is_lost_where_a_move_was_begun(left_s: float) -> None:
    moved = 0
    for seed in SEEDS:
        world = running(seed)
        lost = world.tally.lost_steps
        said = take_away(world, [next(iter(world.nodes.values()))], left_s)
        moves = any("stops at its next common step" in why for why in said)
        moved += moves
        assert not moves or world.tally.lost_steps == lost
        assert_runs(world)
    assert moved == (len(SEEDS) if left_s >= 10 else 0 if left_s <= 2 else moved)


def test_a_job_whose_nodes_all_leave_saves_waits_and_goes_on_from_there() -> None:
    for seed in SEEDS:
        world = running(seed, (1, 3, 1))
        lost = world.tally.lost_steps
        said = take_away(world, list(world.nodes.values()), 120.0)
        assert any("everywhere" in why or "to every store" in why for why in said)
        assert world.tally.lost_steps == lost
        assert_runs(world)


def test_nodes_that_leave_one_after_the_other_are_each_left_in_time() -> None:
    for seed in SEEDS:
        world = running(seed, (1, 4, 1))
        lost = world.tally.lost_steps
        for node in list(world.nodes.values()):
            world.noticed(node, 60.0)
            live(world, world.dice.uniform(0.0, 5.0))
        live(world, 120.0)
        for node in [node for node in world.nodes.values() if node.leaves_at is not None]:
            world.node_dies(node)
        live(world, CALM_S)
        assert world.tally.lost_steps == lost
        assert_runs(world)


def test_without_copies_the_next_group_has_read_before_the_node_goes() -> None:
    for seed in SEEDS:
        world = running(seed, copies=1)
        lost = world.tally.lost_steps
        take_away(world, [next(iter(world.nodes.values()))], 60.0)
        assert world.tally.lost_steps == lost
        assert_runs(world)


def test_a_preemption_too_soon_is_one_incident_that_is_charged_to_nobody() -> None:
    for seed in SEEDS:
        world = running(seed)
        failures, kinds = 0, set()
        world.noticed(node := next(iter(world.nodes.values())), 1.0)
        live(world, 1.0)
        world.node_dies(node)
        for _ in range(int(CALM_S)):
            live(world, 1.0)
            assert world.supervisor is not None
            state = world.supervisor.state
            failures = max(failures, state.failures)
            kinds |= {state.phase.incident.kind} if isinstance(state.phase, Recovering) else set()
        # It may be gone before the supervisor hears that it was announced: then that is found out behind it.
        assert kinds <= {FailureKind.PREEMPTED, FailureKind.GROUP_BROKEN, FailureKind.NODE_LOST}
        assert failures == 0
        assert_runs(world)


def never(*args: object, **kwargs: object) -> preemption.Plan:
    return preemption.Plan(Choice.NOTHING, 0.0, 0.0)


def test_a_supervisor_that_takes_no_notice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "choose", never)

    def lives() -> Iterator[bool]:
        for seed in SEEDS:
            world = running(seed)
            try:
                take_away(world, [next(iter(world.nodes.values()))], 120.0)
            except Breach as breach:
                yield "said in time that it would leave" in str(breach)

    assert [*lives()] == [True] * len(SEEDS)
