"""One attempt as it really goes: steps, saves and copies. Between two happenings it is a straight line, never stepped.

A version's parts lie where its attempt's ranks stood: each in its own node's agent once it is sealed, and with the keepers
that `recovery.replicas` names once it is copied. What is left of it later follows from which agents are left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from ray_dr.checkpoint.cadence import Bounds, Costs, choose
from ray_dr.checkpoint.failures import Tally, rates
from ray_dr.checkpoint.pace import SPENT
from ray_dr.model.checkpoint import Held, VersionId
from ray_dr.model.job import Every
from ray_dr.model.recovery import Group
from ray_dr.simulator.swarm import Swarm
from ray_dr.simulator.things import Agent, Node, Worker

SLOTS = 3
STALL_SHARE = 0.02
"""What a save costs, in steps: for the cadence."""
STORE_EVERY = Every(seconds=30.0)
EDGE = 1e-6


class Doing(Enum):
    """What an attempt is doing."""

    JOINING = auto()
    GOING = auto()
    BROKEN = auto()
    OVER = auto()


@dataclass(slots=True, eq=False)
class Version:
    """A save of one attempt: every rank's part was staged at `done_at`."""

    id: VersionId
    done_at: float
    run: Run
    uploaded_at: float = math.inf
    staged_by: tuple[Agent, ...] = ()
    copied_to: Mapping[Agent, tuple[Agent, ...]] | None = None
    """Of a rescued one: beside which agents its parts were staged, by rank, and who keeps copies of each one's now."""

    @property
    def owners(self) -> Sequence[Agent]:
        """By rank."""
        return self.staged_by or self.run.owners

    @property
    def keepers(self) -> Mapping[Agent, tuple[Agent, ...]]:
        """Of each owner's parts."""
        return self.run.keepers if self.copied_to is None else self.copied_to

    def own(self, now: float) -> bool:
        """Whether each rank's part is sealed, where its agent lives."""
        return now >= self.done_at + self.run.swarm.seal_s

    def copied(self, owner: Agent, now: float) -> bool:
        """Whether the copies of an agent's parts were made while it could give them."""
        at = self.done_at + self.run.swarm.seal_s + self.run.swarm.copy_s
        return at <= now and at <= owner.gone_at

    def held(self, agents: Collection[Agent], now: float) -> Iterator[Held]:
        """What these agents say they have of it."""
        world, own = len(self.owners), self.own(now)
        for rank, owner in enumerate(self.owners):
            if own and owner in agents and owner.alive and owner.holds(self):
                yield Held(owner.node.id, self.id, rank, world, 1, own=True)
            if self.copied(owner, now):
                for keeper in self.keepers[owner]:
                    if keeper in agents and keeper.alive and keeper.holds(self) and self.copied(keeper, now):
                        yield Held(keeper.node.id, self.id, rank, world, 1, own=False)

    def in_part(self, agent: Agent) -> bool:
        """Whether an agent has, or is about to have, anything of it."""
        return agent in self.keepers and agent.holds(self)

    def available(self, agents: Collection[Agent], now: float) -> bool:
        """Whether every part of it can be read from these."""
        own = self.own(now)
        for owner in dict.fromkeys(self.owners):
            if own and owner in agents and owner.holds(self):
                continue
            if not self.copied(owner, now):
                return False
            if not any(k in agents and k.holds(self) and self.copied(k, now) for k in self.keepers[owner]):
                return False
        return True

    def armed(self, now: float) -> bool:
        """Whether all parts have all their copies."""
        keepers = self.keepers
        return all(a.alive and self.copied(a, now) for owner in dict.fromkeys(self.owners) for a in (owner, *keepers[owner]))


class Run:
    """The truth about an attempt. `nodes`: those of its members, with the agents that stood there when it began."""

    def __init__(self, group: Group, members: Sequence[Worker], keepers: Mapping[Agent, tuple[Agent, ...]], swarm: Swarm) -> None:
        self.group, self.members, self.swarm = group, members, swarm
        self.owners = [worker.agent for worker in members]
        self.keepers = keepers
        self.nodes: dict[Node, Agent] = {worker.node: worker.agent for worker in members}
        self.by_node: dict[Node, list[Worker]] = {}
        for worker in members:
            self.by_node.setdefault(worker.node, []).append(worker)
        self.began = group.restore.step if group.restore else 0
        self.doing = Doing.JOINING
        self.aborted = False
        self.base, self.base_at, self.rate = float(self.began), 0.0, 0.0
        self.epoch = 0
        self.stop_at: int | None = None
        self.saves: list[Version] = []
        self.saved = self.began
        self.uploaded = self.began
        self.memory_every, self.store_every = _cadence(swarm, len(self.nodes))

    @property
    def attempt(self) -> int:
        return self.group.attempt

    def steps(self, now: float) -> int:
        """Steps that every rank has done."""
        return int(self.base + (now - self.base_at) * self.rate + EDGE)

    def time_of(self, step: int) -> float:
        """When a step is done, at the speed of now; inf while it stands still."""
        if step <= self.base:
            return self.base_at
        return self.base_at + (step - self.base) / self.rate if self.rate else math.inf

    def pace(self, now: float, rate: float) -> None:
        """From now on so many steps a second. What was saved so far must have been noted before (`advance`)."""
        done = self.base + (now - self.base_at) * self.rate
        self.base = done if rate or self.doing is not Doing.BROKEN else float(self.steps(now))
        self.base_at, self.rate = now, rate
        self.epoch += 1

    def advance(self, now: float) -> list[Version]:
        """Note what was saved up to now. Gives the new versions, oldest first."""
        if self.doing is Doing.JOINING:
            return []
        done = self.steps(now)
        newest = done - done % self.memory_every
        steps = {newest - back * self.memory_every for back in range(SLOTS)} | self._to_store(done, now)
        new = [self._version(step) for step in sorted(steps) if step > self.saved]
        self.saves += new
        self.saved = max([self.saved, *(version.id.step for version in new)])
        return new

    def final(self, step: int, now: float) -> Version:
        """What every member saves at the step at which it stops."""
        found = next((version for version in self.saves if version.id.step == step), None)
        if found is None:
            found = Version(VersionId(self.attempt, step), now, self)
            self.saves.append(found)
            self.saved = max(self.saved, step)
        found.uploaded_at = min(found.uploaded_at, now + self.swarm.write_s)
        return found

    def rescued(self, step: int, now: float, owners: Sequence[Agent], keepers: Mapping[Agent, tuple[Agent, ...]]) -> None:
        """What survivors staged after it had broken."""
        self.saves.append(Version(VersionId(self.attempt, step), now, self, math.inf, tuple(owners), keepers))
        self.saved = max(self.saved, step)

    def due(self, now: float) -> Iterator[Version]:
        """Versions whose upload is through, oldest first; each is given once."""
        for version in self.saves:
            if version.uploaded_at <= now and version.id.step > self.uploaded:
                self.uploaded = version.id.step
                yield version

    def _to_store(self, done: int, now: float) -> set[int]:
        """Of the steps that go to the store those that matter: the newest that is there by now, and what comes after it."""
        last = done - done % self.store_every
        there = int(self.base + (now - self.swarm.write_s - self.base_at) * self.rate + EDGE) if self.rate else done
        first = max(self.saved + 1, there - there % self.store_every)
        return {step for step in range(last, first - 1, -self.store_every) if step > self.saved}

    def _version(self, step: int) -> Version:
        done_at = self.time_of(step)
        version = Version(VersionId(self.attempt, step), done_at, self)
        if step % self.store_every == 0:
            version.uploaded_at = done_at + self.swarm.write_s
        return version


def _cadence(swarm: Swarm, nodes: int) -> tuple[int, int]:
    """Steps between saves to memory and to the store, as the job's own cadence would choose them."""
    expected = rates(Tally(), nodes)
    costs = Costs(swarm.step_s, STALL_SHARE * swarm.step_s, swarm.seal_s)
    memory = choose(costs, expected.own.plus(expected.peer), Bounds(budget=swarm.job.overhead, spent=SPENT)).steps
    durable = Costs(swarm.step_s, 0.0, swarm.write_s)
    return memory, choose(durable, expected.store, Bounds(STORE_EVERY, multiple=memory)).steps
