"""Whole lives in virtual time: nothing that must hold is broken, and what is broken on purpose is found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from ray_dr.cli.main import FAILED, main
from ray_dr.detection.detectors import Detection
from ray_dr.model.actions import Decision, StartWorkers, TakeInventory
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.data import Slice, share
from ray_dr.model.events import Event, FencedOff, NodeLost
from ray_dr.model.recovery import Policy, Recovering, State
from ray_dr.model.signal import FaultKind, Finding, Sample
from ray_dr.recovery import groups
from ray_dr.recovery.adoption import Living, living_group
from ray_dr.recovery.fleet import ranked
from ray_dr.recovery.machine import step
from ray_dr.recovery.plan import choose_version
from ray_dr.simulator import host, listening, perform, promises
from ray_dr.simulator.bucket import Bucket
from ray_dr.simulator.swarm import Fault
from ray_dr.simulator.sweep import live, sweep

SEEDS = range(500)
"""Two thousand and more, at about ten milliseconds each: `ray-dr simulate --seeds 2000`."""
BOTHERED = 300
DAY_S = 86_400.0
commit = Bucket.commit


def test_no_seed_is_broken() -> None:
    lives = list(sweep(SEEDS))
    assert [(life.seed, life.broken) for life in lives if life.broken] == []
    assert sum(life.attempts for life in lives) > 5 * len(lives)
    assert sum(life.lost_steps > 0 for life in lives) > len(lives) / 4


NETWORK = ("late message", "overtaken message", "doubled message", "lost call", "lost answer of a commit", "zombie")


def test_every_fault_takes_effect_in_some_seed_and_detectors_find_what_they_are_for() -> None:
    lives = list(sweep(range(60)))
    met, found = (sum((Counter(getattr(life, name)) for life in lives), Counter[str]()) for name in ("faults", "found"))
    assert {what: met[what] for what in (*Fault, *NETWORK) if met[what] < 3} == {}
    assert found["node_frozen"] > met[Fault.NODE_FREEZE] / 2
    assert found["hang"] > met[Fault.WORKER_HANG] / 2
    assert sum(life.false_alarms for life in lives) < found["node_frozen"] / 20


def told(seed: int) -> list[str]:
    life, world = live(seed, trace=None)
    return [*(f"{at!r} {what} {why}" for at, what, why in world.trace), repr(life)]


def test_the_same_seed_is_the_same_life_to_the_last_word() -> None:
    assert told(7) == told(7)
    assert told(7) != told(8)


def test_a_seed_is_the_same_life_in_every_process() -> None:
    program = (
        "import hashlib; from tests.simulation.test_simulator import told;"
        "print(hashlib.sha256(repr(told(7)).encode()).hexdigest())"
    )
    said = {
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True,
                       text=True, timeout=60, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1


@pytest.mark.parametrize(("nodes", "workers", "days"), [(128, 8, 1.0), (700, 1, 0.5)])
def test_large_clusters_live_for_days(nodes: int, workers: int, days: float) -> None:
    life, world = live(2, nodes=nodes, per_node=workers, duration_s=days * DAY_S)
    assert not life.broken, life.last
    assert life.virtual_s > days * DAY_S
    assert life.breaks >= 2
    assert world.run is not None
    assert len(world.run.members) > nodes * workers / 2


# ----------------------------------------------------------------------------------------------- what is broken on purpose


def without_the_dead(workers: list[Living]) -> Any:
    """As if a group whose members are all alive were whole."""
    group, done = living_group(workers)
    if group is None:
        return None, 0
    return replace(group, members=tuple(name for name in group.members if not name.startswith("rank "))), done


def from_the_store_only(held: Any, committed: Any, rollbacks: Any) -> Any:
    return committed


def whatever_is_newest(held: Any, committed: Any, rollbacks: Any) -> Any:
    """As if training had never gone wrong."""
    return choose_version(held, committed)


def the_nearest_keep_them(domains: Mapping[str, Any], copies: int) -> Mapping[str, tuple[str, ...]]:
    return {node: (node,) * (copies - 1) for node in domains}


def starts_nobody_again(state: State, event: Event, policy: Policy) -> Decision:
    decision = step(state, event, policy)
    if not state.attempt:
        return decision
    return replace(decision, actions=tuple(action for action in decision.actions if not isinstance(action, StartWorkers)))


def believes_what_was_found_before(state: State, event: Event, policy: Policy) -> Decision:
    """A node is lost while the version that was found may have lain there."""
    decision = step(state, event, policy)
    before, now = getattr(state.phase, "found", None), getattr(decision.state.phase, "found", "")
    if isinstance(event, NodeLost) and before is not None and now is None:
        actions = tuple(action for action in decision.actions if not isinstance(action, TakeInventory))
        after = replace(decision.state, phase=replace(decision.state.phase, found=before), retry_at=None)
        return replace(decision, state=after, actions=actions)
    return decision


def waits_for_nobody(state: State, event: Event, policy: Policy) -> Decision:
    """A group is formed while members of the one before are still in it."""
    decision = step(state, event, policy)
    if not isinstance(decision.state.phase, Recovering):
        return decision
    return replace(decision, state=replace(decision.state, phase=replace(decision.state.phase, unwinding=())))


def does_not_mind_the_fence(state: State, event: Event, policy: Policy) -> Decision:
    return Decision(state, (), "never mind") if isinstance(event, FencedOff) else step(state, event, policy)


def commits_in_any_term(bucket: Bucket, version: VersionId, term: int) -> bool:
    return commit(bucket, version, bucket.term)


def by_name(state: State, policy: Policy) -> tuple[str, ...]:
    """Ranks are dealt anew for each group."""
    return tuple(sorted(ranked(state, policy), reverse=bool(state.attempt % 2)))


def rounds_up(step: int, *, global_batch: int, rank: int, world: int) -> Slice:
    """The last sample of a rank is the first of the next one, where shares do not come out even."""
    piece = share(step, global_batch=global_batch, rank=rank, world=world)
    return replace(piece, last=piece.first - (-global_batch // world))


class SeesNoHang(Detection):
    def observe(self, sample: Sample) -> tuple[Finding, ...]:
        return tuple(finding for finding in super().observe(sample) if finding.kind is not FaultKind.HANG)


PLANTED: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "adopts the survivors of a broken group": (host, "living_group", without_the_dead, "I8"),
    "forgets what is in memory": (perform, "choose_version", from_the_store_only, "I6"),
    "takes what was saved since training went wrong": (perform, "choose_version", whatever_is_newest, "went wrong"),
    "keeps copies where the original is": (perform, "replicas", the_nearest_keep_them, "I6"),
    "starts no worker again": (host, "step", starts_nobody_again, "I9"),
    "does not look again after a further loss": (host, "step", believes_what_was_found_before, "nowhere"),
    "forms a group while the last one is half left": (host, "step", waits_for_nobody, "I8"),
    "goes on though fenced off": (host, "step", does_not_mind_the_fence, "I3"),
    "lets a zombie commit": (Bucket, "commit", commits_in_any_term, "I3"),
    "mixes up ranks": (groups, "ranked", by_name, "keeps its rank"),
    "uses samples twice": (promises, "share", rounds_up, "I7"),
    "sees no hang": (listening, "Detection", SeesNoHang, "I9"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_broken_on_purpose_is_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, broken, says = PLANTED[planted]
    monkeypatch.setattr(where, name, broken)
    found = next((life for life in sweep(range(BOTHERED)) if life.broken), None)
    assert found is not None
    assert says in found.broken


# ---------------------------------------------------------------------------------------------------- the command line


def test_simulate_says_how_fast_it_was_and_which_seeds_are_broken() -> None:
    result = CliRunner().invoke(main, ["simulate", "--seeds", "5", "--nodes", "4", "--days", "0.1", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["broken_seeds"] == []
    assert said["speed_ratio"] > 0
    assert said["virtual_s"] > 5 * 0.1 * DAY_S


def test_a_broken_seed_is_told_with_its_last_events_and_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "step", starts_nobody_again)
    result = CliRunner().invoke(main, ["simulate", "--nodes", "3", "--days", "0.02", "--seeds", "10", "--json"])
    assert result.exit_code == FAILED
    (seed, *_) = json.loads(result.stdout.splitlines()[-1])["broken_seeds"]
    assert f"again: ray-dr simulate --nodes 3 --days 0.02 --seeds 1 --first-seed {seed}" in result.stderr
    assert "NodeLost(" in result.stderr or "WorkerLost(" in result.stderr
