"""Saves that are copied while the next step's forward and backward run: the bytes of the step's end, or none."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import xxhash
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.vault import SLOTS
from ray_dr.model.attempt import Assignment, Cadence
from ray_dr.model.checkpoint import Part
from ray_dr.model.journal import Noted, Record
from ray_dr.stores.open import open_store
from ray_dr.train import fence
from ray_dr.train.context import Context, Control, State, StopAttempt
from ray_dr.train.fence import Fence
from ray_dr.train.link import Link
from ray_dr.train.staging import Copy, Marks, Piece, Planner, stage
from ray_dr.train.state import bytes_of, flatten
from tests.unit.train_programs import GUARD_S, TOKEN, Rows

Bytes = dict[tuple[str, tuple[int, ...]], bytes]
without_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, without_cuda])


def cut(part: Any, stream: memoryview) -> Bytes:
    """The bytes of every box of a part or a plan."""
    return {(s.box.name, s.box.offsets): bytes(stream[s.at : s.at + s.box.size]) for s in part.shards}


def snapshot(objects: Mapping[str, Any]) -> Bytes:
    """What a save of these objects holds if it is made here and now."""
    flat = flatten(objects, rank=0, world=1)
    plan = Planner(0, 1).plan(flat)
    stream = memoryview(bytearray(plan.size))
    stage(plan, flat, stream)
    return cut(plan, stream)


class Tapped(Link):
    """A link that keeps what goes over it: each save's bytes at the moment of its handing over."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent.address, TOKEN, "w0", 1)
        self.agent = agent
        self.saves: dict[int, Bytes] = {}
        self.rest: dict[int, dict[str, Any]] = {}
        self.taken: list[int] = []
        self.returned: list[int] = []
        self.notes: list[Noted] = []

    def take_slot(self, size: int, wait_s: float) -> tuple[int, memoryview] | None:
        """Waits, so that no save is left out because the agent has not sealed the one before, which then counts as complete."""
        deadline = time.monotonic() + GUARD_S
        while (found := super().take_slot(size, 0.01)) is None and time.monotonic() < deadline:
            for held in self.agent.vault.held():
                self.agent.vault.completed(held.version)
        assert found is not None
        self.taken.append(found[0])
        return found

    def full(self) -> bool:
        """Never: `take_slot` waits."""
        return False

    def give_back(self, slot: int) -> None:
        self.returned.append(slot)
        super().give_back(slot)

    def staged(self, slot: int, part: Part, **rest: Any) -> None:
        self.saves[part.version.step] = cut(part, self._slots[slot])
        self.rest[part.version.step] = rest
        super().staged(slot, part, **rest)

    def record(self, record: Record) -> None:
        if isinstance(record, Noted):
            self.notes.append(record)
        super().record(record)


class Gate:
    """Holds every copy in the thread back until it is opened for it. `clock` goes on by `took_s` with each."""

    def __init__(self) -> None:
        self._opened = threading.Semaphore(0)
        self._last: object = None
        self.fence = Fence()
        self.count = 0
        self.took_s = 0.0
        self.clock = 0.0
        self.error: Exception | None = None

    def open(self, *_: Any) -> None:
        """For the copy under way, if there is one."""
        if self.fence._behind is not self._last:
            self._last = self.fence._behind
            self._opened.release()

    def run(self, copy: Copy) -> None:
        if threading.current_thread().name.startswith("staging"):
            self.count += 1
            assert self._opened.acquire(timeout=GUARD_S)
            if self.error is not None:
                raise self.error
            self.clock += self.took_s
        copy_now(copy)


copy_now = Copy.run


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr(fence, "AT_ONCE_BYTES", 1)
    monkeypatch.setattr(Copy, "run", lambda copy: made.run(copy))
    return made


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent("node-a", "127.0.0.1", "memory://fence", TOKEN)
    yield made
    made.close()


@pytest.fixture
def link(agent: Agent) -> Iterator[Tapped]:
    made = Tapped(agent)
    yield made
    made.close()


attempts = itertools.count(1)


def context(agent: Agent, link: Tapped, gate: Gate) -> Context:
    """The next attempt of the process that has the gate's fence."""
    number = next(attempts)
    link.reset()
    a = Assignment("job", number, "w0", 0, 1, 0, "", agent.address, (), None, Cadence(0, 1, 0), "gloo", False, 0, 4,
                   "memory://fence", {})  # fmt: skip
    return Context(a, link, Control(number, Cadence(0, 1, 0)), TOKEN, open_store("memory://fence"), gate.fence)


class Net(nn.Module):
    """Two layers, tied if asked, with batch statistics between them."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.norm(self.first(x)).relu()) * self.frozen
        return found


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, device = Rows().x, next(model.parameters()).device
    return model(x[step : step + 4].to(device)).square().mean()


def train(ctx: Context, state: State, body: Callable[[int], None], steps: int = 5) -> dict[int, Bytes]:
    """Steps of `body`; what the state was at the end of each, to the byte."""
    ends = {}
    for step in ctx.steps(state, until=steps):
        body(step)
        ends[step + 1] = snapshot(state.objects)
    return ends


def stepping(model: nn.Module, *optimizers: Optimizer, passes: int = 1) -> Callable[[int], None]:
    """The usual body: forward and backward, then the optimizers in their order."""

    def body(step: int) -> None:
        for piece in range(passes):
            loss_of(model, step + piece).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return body


def opening(ctx: Context, gate: Gate) -> None:
    """Whoever waits for the copy under way opens the gate."""

    class Opening(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            gate.open()
            return super().wait(timeout)

    behind = ctx._fence._behind
    assert behind is not None
    behind.copied = Opening()


OPTIMIZERS = {
    "adam": lambda model: Adam(model.parameters(), 0.1),
    "fused": lambda model: AdamW(model.parameters(), 0.1, fused=True),
    "momentum": lambda model: SGD(model.parameters(), 0.1, momentum=0.9),
}


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_save_copied_at_the_last_moment_has_the_bytes_of_its_steps_end(
    agent: Agent, link: Tapped, gate: Gate, kind: str, tied: bool, passes: int, device: str
) -> None:
    model = Net(tied).to(device)
    optimizer = OPTIMIZERS[kind](model)
    optimizer.register_step_pre_hook(gate.open)  # before the fence: forward and backward are through, the step begins
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)
    ends = train(ctx, state, stepping(model, optimizer, passes=passes))
    ctx.close()
    assert gate.count == 4, "all but the last"
    assert link.saves == ends
    assert not link.notes
    assert len({ends[step]["model/norm.running_mean", (0,)] for step in ends}) == 5


def test_what_moves_between_saves_is_copied_from_where_it_is(agent: Agent, link: Tapped, gate: Gate) -> None:
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(gate.open)
    usual = stepping(model, optimizer)
    moves: dict[int, Callable[[], object]] = {
        4: lambda: setattr(model.first.weight, "data", model.first.weight.data.clone()),
        6: lambda: optimizer.state[model.last.bias].update(exp_avg=torch.ones(6)),
        7: lambda: model.register_parameter("late", nn.Parameter(torch.ones(3))),
        8: lambda: optimizer.add_param_group({"params": [model.late]}),
        10: lambda: setattr(model.last, "weight", model.first.weight),
    }

    def body(step: int) -> None:
        usual(step)
        moves.get(step, lambda: None)()

    ctx = context(agent, link, gate)
    ends = train(ctx, ctx.restore(model=model, optimizer=optimizer), body, steps=12)
    ctx.close()
    assert link.saves == ends
    assert gate.count == 11
    assert not link.notes


SIZES = (40_000, 150_001, 2**21 + 5)
"""Elements: one that is copied along with others, one of one run, one of two."""


class Frozen(nn.Module):
    """Large buffers, and large parameters of an optimizer, of which now and then some change."""

    def __init__(self) -> None:
        super().__init__()
        for number, size in enumerate(SIZES):
            self.register_buffer(f"b{number}", torch.arange(size).float())
            self.register_parameter(f"p{number}", nn.Parameter(torch.arange(size).float() + number))

    def poke(self, chosen: random.Random) -> None:
        """Change one element somewhere: in none, one, a few, or all of the tensors."""
        every = [*self.parameters(), *self.buffers()]
        with torch.no_grad():
            for tensor in chosen.sample(every, chosen.choice((0, 0, 1, 1, 3, len(every)))):
                tensor[chosen.randrange(len(tensor))] += 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_stays_the_same_for_however_long_every_save_has_its_bytes_and_their_names(
    agent: Agent, link: Tapped, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "AT_ONCE_BYTES", 1)
    model, chosen, looked = Frozen(), random.Random(seed), Looked(monkeypatch)
    optimizer = SGD(model.parameters(), 0.1)
    ctx = context(agent, link, Gate())
    ends, names = {}, {}
    for step in ctx.steps(ctx.restore(model=model, optimizer=optimizer), until=30):
        optimizer.step()  # without gradients: the fence is passed, nothing changes
        model.poke(chosen)
        ends[step + 1] = snapshot({"model": model, "optimizer": optimizer})
        while len(names) < len(link.saves):
            names |= named_right(agent)
    ctx.close()
    while len(names) < 30:
        names |= named_right(agent)
    assert link.saves == ends
    assert all(names.values())
    assert looked.worker > looked.agent, "most of it the agent is told"


@given(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 2), st.sampled_from("AB0")), min_size=8, max_size=40))
@settings(max_examples=60, deadline=None)
def test_bytes_that_come_back_to_what_they_were_are_in_every_slot_what_they_are(
    slots: int, course: list[tuple[int, str]]
) -> None:
    tensor = torch.zeros(SIZES[1])
    size, marks = tensor.nbytes, Marks()
    rooms = [memoryview(bytearray(size)) for _ in range(slots)]
    copies = [Copy([Piece("t", 0, size, tensor)], room, marks) for room in rooms]
    for slot, value in course:
        tensor.fill_({"A": 1.0, "B": 2.0, "0": 0.0}[value])
        marks.begin()
        copies[slot % slots].run()
        assert rooms[slot % slots] == bytes_of(tensor)


@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_small_pieces_behind_all_that_the_optimizer_has_are_saved(agent: Agent, link: Tapped, kind: str) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("zsteps", torch.zeros((), dtype=torch.int64))
    model.register_buffer("zzz", torch.zeros(6, dtype=torch.int64))
    optimizer = OPTIMIZERS[kind](model)
    ctx = context(agent, link, Gate())
    ends = {}
    for step in ctx.steps(ctx.restore(a=optimizer, model=model), until=4):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        model.zsteps += 1  # type: ignore[operator]
        model.zzz += step + 1  # type: ignore[operator]
        ends[step + 1] = snapshot({"a": optimizer, "model": model})
    ctx.close()
    assert link.saves == ends


def named_right(agent: Agent) -> dict[int, bool]:
    """Of the sealed saves that the agent holds: whether every chunk's name is that of the bytes there are."""
    found = {}
    for held in agent.vault.held():
        holding = agent.vault.read(held.version, held.rank)
        assert holding.part is not None
        pairs = ((c.id, blake3(holding.view[c.at : c.at + c.size]).hexdigest()) for c in holding.part.chunks)
        found[held.version.step] = all(name == real for name, real in pairs)
        agent.vault.done(holding)
    return found


class Looked:
    """Bytes of which fingerprints are taken, in the worker and in the agent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worker = self.agent = 0
        taken = xxhash.xxh3_128_digest

        def take(data: memoryview) -> bytes:
            if threading.current_thread().name == "writer-seal":
                self.agent += len(data)
            else:
                self.worker += len(data)
            return taken(data)

        monkeypatch.setattr(xxhash, "xxh3_128_digest", take)


def test_the_first_step_of_any_optimizer_is_held_up(agent: Agent, link: Tapped, gate: Gate) -> None:
    one, two = Net(), nn.Linear(6, 6)
    optimizers = Adam(one.parameters(), 0.1), SGD(two.parameters(), 0.1)
    optimizers[1].register_step_pre_hook(gate.open)
    ctx = context(agent, link, gate)
    state = ctx.restore(one=one, two=two, a=optimizers[0], b=optimizers[1])

    def body(step: int) -> None:
        two(one(Rows().x[step : step + 4])).square().mean().backward()
        for optimizer in reversed(optimizers):  # the one that begins opens the gate
            optimizer.step()
            optimizer.zero_grad()

    assert link.saves == (ends := train(ctx, state, body))
    assert len(ends) == gate.count + 1


def test_what_no_saved_optimizer_has_is_copied_at_once(agent: Agent, link: Tapped, gate: Gate) -> None:
    class Average:
        value = torch.zeros(6)

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.value = state["value"]

    model, average = Net(), Average()
    optimizer, unsaved = Adam(model.first.parameters(), 0.1), Adam(model.last.parameters(), 0.1)
    optimizer.register_step_pre_hook(gate.open)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer, average=average)

    def body(step: int) -> None:
        with torch.no_grad():
            average.value += 1
            model.frozen += 1
        loss_of(model, step).backward()
        unsaved.step()  # while the fence's copy waits at the gate
        optimizer.step()

    assert link.saves == train(ctx, state, body)
    assert gate.count == 4
    assert not link.notes


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_parameter_changed_while_it_is_copied_is_no_save_and_from_then_on_all_is_copied_at_once(
    agent: Agent, link: Tapped, gate: Gate, device: str
) -> None:
    model = Net().to(device)
    optimizer = Adam(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(gate.open)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)

    def body(step: int) -> None:
        with torch.no_grad():
            model.last.weight.clamp_(-0.1, 0.1)
        stepping(model, optimizer)(step)

    ends = train(ctx, state, body)
    assert link.saves == {step: end for step, end in ends.items() if step != 1}
    assert gate.count == 1
    assert link.returned == link.taken[:1]
    (note,) = link.notes
    assert (note.name, note.fields["tensor"], note.fields["step"]) == ("save.torn", "model/last.weight", 1)
    assert "in place" in str(note.fields["remedy"])
    ctx.close()
    again = context(agent, link, gate)
    train(again, again.restore(model=model, optimizer=optimizer), stepping(model, optimizer))
    assert gate.count == 1, "the next attempt has not forgotten"


def test_an_optimizer_that_steps_past_its_hooks_is_copied_at_once(agent: Agent, link: Tapped, gate: Gate) -> None:
    model = Net()
    optimizer = AdamW(model.parameters(), 0.1, fused=True)  # its kernel does not move the version counters
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)

    def body(step: int) -> None:
        loss_of(model, step).backward()
        type(optimizer).step.__wrapped__(optimizer)  # type: ignore[attr-defined]

    assert link.saves == train(ctx, state, body)
    assert gate.count == 0


def test_parameters_swapped_through_data_while_they_are_copied_are_no_save(
    agent: Agent, link: Tapped, gate: Gate
) -> None:
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)

    def body(step: int) -> None:
        usual = model.last.weight.detach().clone()
        model.last.weight.data.zero_()  # moves no version counter, and is undone before the step
        gate.open()
        ctx._fence.wait()
        model.last.weight.data.copy_(usual)
        stepping(model, optimizer)(step)

    ends = train(ctx, state, body)
    assert link.saves == {step: end for step, end in ends.items() if step != 1}
    assert [note.fields["tensor"] for note in link.notes] == ["model/last.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler imports
def test_what_a_compiled_step_changes_is_copied_at_once(agent: Agent, link: Tapped, gate: Gate) -> None:
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)
    update = torch.compile(optimizer.step, backend="eager")

    def body(step: int) -> None:
        loss_of(model, step).backward()
        update()

    assert link.saves == train(ctx, state, body, steps=3)
    assert gate.count == 0


def test_steps_without_an_update_leave_the_saves_right(agent: Agent, link: Tapped, gate: Gate) -> None:
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)

    def body(step: int) -> None:
        gate.open()
        loss_of(model, step).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()

    assert link.saves == train(ctx, state, body, steps=6)
    assert gate.count == 2, "only saves after an update are copied behind"


def test_an_aborted_attempt_hands_nothing_over_and_the_next_one_has_all_its_slots(
    agent: Agent, link: Tapped, gate: Gate
) -> None:
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)
    steps = ctx.steps(state, until=5)
    stepping(model, optimizer)(next(steps))
    next(steps)
    ctx._control.abort()
    gate.open()
    with pytest.raises(StopAttempt):
        next(steps)
    ctx.close(StopAttempt())
    assert (gate.count, link.saves, link.returned) == (1, {}, link.taken)
    assert not optimizer._optimizer_step_pre_hooks
    agent.vault.begin(None)
    optimizer.register_step_pre_hook(gate.open)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)
    assert link.saves == train(ctx, state, stepping(model, optimizer), steps=SLOTS + 2)


def test_a_copy_under_way_when_a_collective_is_cut_off_is_not_handed_over(
    agent: Agent, link: Tapped, gate: Gate
) -> None:
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    ctx = context(agent, link, gate)
    steps = ctx.steps(ctx.restore(model=model, optimizer=optimizer), until=5)
    stepping(model, optimizer)(next(steps))
    next(steps)
    opening(ctx, gate)
    ctx.close(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert (gate.count, link.saves, link.returned) == (1, {}, link.taken)


@pytest.mark.parametrize("error", [None, ValueError("of the program")])
def test_a_copy_under_way_when_train_leaves_is_handed_over_first(
    agent: Agent, link: Tapped, gate: Gate, error: Exception | None
) -> None:
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)
    for step in ctx.steps(state, until=5):
        if step == 1:
            gate.open()
            break
        stepping(model, optimizer)(step)
        end = snapshot(state.objects)
    with torch.no_grad():
        model.first.weight.zero_()
    ctx.close(error)
    assert link.saves == {1: end}
    assert not optimizer._optimizer_step_pre_hooks
    assert not link.notes


def test_a_copy_that_fails_is_told_at_the_next_save_and_holds_nobody_up(
    agent: Agent, link: Tapped, gate: Gate
) -> None:
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(gate.open)
    gate.error = OSError("the device is gone")
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)
    with pytest.raises(OSError, match="the device is gone"):
        train(ctx, state, stepping(model, optimizer))
    assert state.step == 2
    assert (link.saves, link.returned) == ({}, link.taken)
    ctx.close(OSError())


def test_the_stall_is_what_training_stood_still_and_no_part_of_the_steps_time(
    agent: Agent, link: Tapped, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = type("Clock", (), {"monotonic": lambda: gate.clock, "time": lambda: 1000.0 + gate.clock})
    monkeypatch.setattr(fence, "time", clock)
    monkeypatch.setattr("ray_dr.train.context.time", clock)
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    ctx, body = context(agent, link, gate), stepping(model, optimizer)
    steps = ctx.steps(ctx.restore(model=model, optimizer=optimizer), until=3)
    gate.took_s = 7.0
    body(next(steps))
    step = next(steps)
    opening(ctx, gate)
    body(step)  # its update waits for the copy of the first save
    step = next(steps)
    gate.open()
    assert ctx._fence._carried is not None
    ctx._fence._carried.result(GUARD_S)  # the copy of the second one is through before the update
    body(step)
    assert next(steps, None) is None
    assert [link.rest[step]["stall_s"] for step in (1, 2, 3)] == [7.0, 0.0, 0.0]
    assert [link.rest[step]["staged_at"] for step in (1, 2, 3)] == [1007.0, 1007.0, 1014.0]
    assert [record.took_s for record in ctx._window] == [0.0, 0.0, 7.0]


def test_a_small_state_needs_no_thread(agent: Agent, link: Tapped, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = Net()
    optimizer = Adam(model.parameters(), 0.1)
    ctx = context(agent, link, gate)
    state = ctx.restore(model=model, optimizer=optimizer)
    ctx._fence._thread.shutdown()  # takes no more work
    assert link.saves == train(ctx, state, stepping(model, optimizer))


@pytest.mark.gpu
@without_cuda
def test_a_copy_from_a_device_comes_after_all_that_the_device_was_given_before_and_keeps_the_memory() -> None:
    slot = torch.zeros(8 * 2**20, dtype=torch.uint8).pin_memory()
    source = torch.zeros(2**10, 2**11, device="cuda")
    torch.cuda._sleep(200_000_000)  # about a tenth of a second, in which nothing below has happened on the device
    source.fill_(7.0)
    copy = Copy([Piece("w", 0, 8 * 2**20, source.T)], slot.numpy().data)
    del source
    thread = threading.Thread(target=copy.run)
    thread.start()
    others = [torch.full((2**10, 2**11), 9.0, device="cuda") for _ in range(4)]
    thread.join()
    assert bool((slot.view(torch.float32) == 7.0).all())
    assert len(others) == 4
