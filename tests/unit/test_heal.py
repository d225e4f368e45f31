"""What survivors of a broken step still have: said when they leave, staged when asked, and restored to the last bit."""

from __future__ import annotations

import hashlib
import os
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.model.checkpoint import VersionId
from ray_dr.train.context import Context
from tests.unit.laid_out import wait_until
from tests.unit.test_train_session import Stage
from tests.unit.train_programs import Rows, optimizer_of, whole_tensors, wrap

pytestmark = pytest.mark.slow

STEPS, BREAK_AT = 8, 5
NEVER = Cadence(0, 1000, 0)
ARRAYS: list[weakref.ref[Any]] = []
"""In a worker: the memory of the parameters of its last attempt."""


class Tally:
    """An object of the program's own, which changes while a step is under way."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "sum": torch.tensor([float(self.seen)])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = int(state["seen"])


def network(norm: bool) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Linear(8, 5))


def breaks(ctx: Context, state: Any, where: str) -> None:
    """Once, in the attempt that has it among its settings: `die` or `raise`, at this place of step BREAK_AT + 1."""
    want = ctx.settings
    if state.step == BREAK_AT and want.get("where") == where and ctx.world.rank == want.get("rank"):
        if want["how"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("bad luck")


def fit(ctx: Context) -> None:
    """Trains, and puts a digest of the final state into the journal."""
    want = ctx.settings
    model = wrap(network(bool(want.get("norm"))), str(want.get("kind", "ddp")))
    optimizer = optimizer_of(model, "adamw")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    objects: dict[str, Any] = {"tally": Tally()} if want.get("tally") else {}
    micro = 4 if want.get("kind", "ddp") == "ddp" else None
    ctx.data(Rows(), global_batch=8, micro_batches=micro)
    state = ctx.restore(model=model, optimizer=optimizer, scheduler=scheduler, **objects)
    for batch in ctx.steps(state, until=STEPS):
        if "tally" in objects:
            objects["tally"].seen += 1
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01 * (1 + state.step % 3)
        breaks(ctx, state, "forward")
        for x, y in ctx.micro_batches(batch):
            nn.functional.mse_loss(model(x), y).backward()
        breaks(ctx, state, "backward")
        optimizer.step()
        breaks(ctx, state, "stepped")
        optimizer.zero_grad()
        scheduler.step()
    tensors = whole_tensors(ctx, {"model": model, "optimizer": optimizer})
    digest = hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()
    last = [group["weight_decay"] for group in optimizer.param_groups], scheduler.get_last_lr(), scheduler.last_epoch
    if ctx.world.rank == 0:  # running statistics are those of rank 0
        ctx.mark(f"final {digest} {last} {objects['tally'].seen if objects else ''}")


def fit_anew(ctx: Context) -> None:
    """Trains a plain model, and says before it builds that how much of the last attempt's is still there."""
    ctx.mark(f"alive {sum(array() is not None for array in ARRAYS)} of {len(ARRAYS)}")
    ARRAYS.clear()
    plain = network(False)
    for parameter in plain.parameters():
        array = parameter.detach().numpy().copy()
        parameter.data = torch.from_numpy(array)
        ARRAYS.append(weakref.ref(array))
        del array
    model = wrap(plain, "ddp")
    optimizer = optimizer_of(model, "adamw")
    ctx.data(Rows(), global_batch=8)
    state = ctx.restore(model=model, optimizer=optimizer)
    for batch in ctx.steps(state, until=STEPS):
        for x, y in ctx.micro_batches(batch):
            nn.functional.mse_loss(model(x), y).backward()
        breaks(ctx, state, "backward")
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def stage(tmp_path: Any) -> Iterator[Stage]:
    made = Stage(f"file://{tmp_path}")
    yield made
    made.close()


def start(stage: Stage, attempt: int, members: list[int], origin: Origin | None = None, **settings: Any) -> None:
    kind = settings.get("kind", "ddp")
    for rank, worker in enumerate(members):
        assignment = Assignment(
            "job", attempt, f"w{worker}", rank, len(members), rank, stage.rendezvous[members[0]], stage.agent.address, (),
            origin, NEVER, "gloo", kind == "ddp", 0, 4, stage.store_url, settings, {"store": 1},
        )  # fmt: skip
        assert stage.ask(worker, "start", assignment)


def run_through(stage: Stage, attempt: int, members: list[int], origin: Origin | None = None, **settings: Any) -> str:
    """What its rank 0 ends with."""
    start(stage, attempt, members, origin, **settings)
    said, returned = set(), set()
    while len(returned) < len(members):
        message = stage.said.get(timeout=90)
        found = message.get("event") or message.get("record") or {}
        assert found.get("type") not in ("WorkerRaised", "WorkerStopped"), found
        if found.get("type") == "WorkerReturned":
            returned.add(found["worker"])
        if found.get("type") == "Marked" and found["name"].startswith("final"):
            said.add(found["name"])
    return str(said.pop())


def leave(stage: Stage, attempt: int, workers: list[int], lost: int = -1) -> dict[int, dict[str, Any]]:
    """What each says as it leaves a broken attempt, once `lost` is gone, or one has raised: then those that wait are aborted."""
    said: dict[int, dict[str, Any]] = {}
    broken = False
    while len(said) < len(workers) or not broken:
        message = stage.said.get(timeout=90)
        event = message.get("event", {})
        if event.get("type") in ("WorkerStopped", "WorkerRaised"):
            said[int(event["worker"][1:])] = event
        if not broken and (message.get("lost") == f"w{lost}" or (lost < 0 and said)):
            broken = True
            for worker in workers:
                stage.ask(worker, "abort", attempt)
    return said


def held(stage: Stage, world: int, version: VersionId) -> Origin:
    wait_until(lambda: {one.rank for one in stage.agent.vault.held() if one.version == version} == set(range(world)))
    stage.agent.begin(version)
    return Origin(version, world, {str(rank): (stage.agent.address,) for rank in range(world)})


@pytest.mark.parametrize(("victim", "where"), [(0, "forward"), (1, "backward")])
def test_a_survivor_of_two_stages_both_parts_and_goes_on_to_the_same_bits(stage: Stage, victim: int, where: str) -> None:
    stage.add(2, fit)
    undisturbed = run_through(stage, 1, [0, 1])
    start(stage, 2, [0, 1], rank=victim, where=where, how="die")
    survivor = 1 - victim
    said = leave(stage, 2, [survivor], victim)[survivor]
    stands_at = said["stands_at"]
    assert stands_at in (BREAK_AT, BREAK_AT + (where == "backward"))
    assert said["twins"] == []
    assert stage.ask(survivor, "rescue", 2, stands_at, [0, 1], []) == ""
    origin = held(stage, 2, VersionId(2, stands_at))
    told = witnessed(stage, victim, stands_at)
    assert {record["step"] for record in told} == set(range(1, stands_at + 1))
    first = [record["ranges"] for record in told if record["step"] == 1]
    assert first == [[[2 * victim, 2 * victim + 2], [2 * victim + 4, 2 * victim + 6]]]
    assert run_through(stage, 3, [survivor], origin) == undisturbed


def witnessed(stage: Stage, rank: int, steps: int) -> list[dict[str, Any]]:
    """What is told of a lost rank's steps."""
    told: list[dict[str, Any]] = []
    while len(told) < steps:
        record = stage.said.get(timeout=90).get("witness", {})
        told += [record] if record.get("rank") == rank else []
    return told


def test_running_statistics_and_what_a_step_changes_early_are_those_of_the_boundary(stage: Stage) -> None:
    stage.add(2, fit)
    settings = {"norm": True, "tally": True}
    undisturbed = run_through(stage, 1, [0, 1], **settings)
    start(stage, 2, [0, 1], rank=1, where="backward", how="die", **settings)
    said = leave(stage, 2, [0], 1)[0]
    assert stage.ask(0, "rescue", 2, said["stands_at"], [0, 1], []) == ""
    origin = held(stage, 2, VersionId(2, said["stands_at"]))
    stage.add(1, fit)
    assert run_through(stage, 3, [0, 2], origin, **settings) == undisturbed


def test_what_only_rank_0_can_say_is_not_said_for_it(stage: Stage) -> None:
    stage.add(2, fit)
    start(stage, 1, [0, 1], rank=0, where="forward", how="die", tally=True)
    assert leave(stage, 1, [1], 0)[1]["twins"] == [1]


def test_an_error_before_the_optimizers_step_leaves_everybody_whole_and_one_behind_it_nobody_who_raised(stage: Stage) -> None:
    stage.add(2, fit)
    start(stage, 1, [0, 1], rank=1, where="forward", how="raise")
    said = leave(stage, 1, [0, 1])
    assert {event["stands_at"] for event in said.values()} == {BREAK_AT}
    assert stage.ask(0, "rescue", 1, BREAK_AT - 1, [0, 1], []) == "the state is not there any more"
    start(stage, 2, [0, 1], rank=1, where="stepped", how="raise")
    said = leave(stage, 2, [0, 1])
    assert said[1]["stands_at"] == -1
    assert said[0]["stands_at"] in (BREAK_AT, BREAK_AT + 1)


@pytest.mark.parametrize("victim", [3])
def test_hybrid_sharding_has_the_lost_part_staged_by_the_rank_with_the_same_shards(stage: Stage, victim: int) -> None:
    stage.add(4, fit)
    undisturbed = run_through(stage, 1, [0, 1, 2, 3], kind="hybrid")
    start(stage, 2, [0, 1, 2, 3], rank=victim, where="backward", how="die", kind="hybrid")
    others = [rank for rank in range(4) if rank != victim]
    said = leave(stage, 2, others, victim)
    assert {event["stands_at"] for event in said.values()} == {BREAK_AT}  # nobody has passed the gate
    twin = (victim + 2) % 4
    assert said[twin]["twins"] == sorted((victim, twin))
    for rank in others:
        assert stage.ask(rank, "rescue", 2, BREAK_AT, [rank, victim] if rank == twin else [rank], []) == ""
    origin = held(stage, 4, VersionId(2, BREAK_AT))
    stage.add(1, fit)
    members = [4 if rank == victim else rank for rank in range(4)]
    assert run_through(stage, 3, members, origin, kind="hybrid") == undisturbed


def test_fully_sharded_everybody_has_its_own_part_alone(stage: Stage) -> None:
    stage.add(2, fit)
    start(stage, 1, [0, 1], rank=1, where="forward", how="die", kind="fsdp")
    said = leave(stage, 1, [0], 1)[0]
    assert (said["stands_at"], said["twins"]) == (BREAK_AT, [0])


@pytest.mark.parametrize("rescued", [True, False])
def test_what_was_left_is_let_go_before_the_next_attempt_begins(stage: Stage, rescued: bool) -> None:
    stage.add(1, fit_anew)
    start(stage, 1, [0], rank=0, where="backward", how="raise")
    assert leave(stage, 1, [0])[0]["stands_at"] == BREAK_AT
    if rescued:
        assert stage.ask(0, "rescue", 1, BREAK_AT, [0], []) == ""
    start(stage, 2, [0], rank=0, where="backward", how="raise")
    alive = (stage.wait_for("Marked")["name"] for _ in range(9))
    assert next(name for name in alive if name.startswith("alive")) == "alive 0 of 4"
