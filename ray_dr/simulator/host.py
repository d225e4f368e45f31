"""The simulated supervisor: hosts the job's machine as `actors.supervisor` does, in virtual time.

Events come in, `recovery.machine.step` decides, its invariants are checked, and `perform` carries the actions out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_dr.model.actions import CloseJob, FormGroup, KillWorker, ReleaseNode, RequestNodes, StartWorkers
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import (
    Adopted,
    Diagnosed,
    Event,
    FirstStep,
    NodeJoined,
    NodeLost,
    Opened,
    Saved,
    Tick,
    WorkerLost,
    WorkerReady,
)
from ray_dr.model.recovery import Failed, Finished, Group
from ray_dr.model.signal import FaultKind
from ray_dr.recovery.adoption import Living, living_group, who_left
from ray_dr.recovery.invariants import check
from ray_dr.recovery.machine import initial, step
from ray_dr.recovery.policy import policy_of
from ray_dr.recovery.timers import next_due
from ray_dr.simulator import promises
from ray_dr.simulator.breach import Breach
from ray_dr.simulator.perform import CALL_S, Performer
from ray_dr.simulator.things import Agent, Lost, Message, Worker

if TYPE_CHECKING:
    from ray_dr.simulator.world import World

PACE_S = 0.5
"""The real host looks at the clock this often while it is busy, and five times as often while it is not."""
FEW, WALK_EVERY = 256, 64
"""With more nodes, what takes a walk over all of them is checked at every decision to do something, and now and then."""
OF_ONE = (StartWorkers, RequestNodes, KillWorker, ReleaseNode)
"""Actions that come with every node or worker."""
ACK_S = 1.0
"""An agent's messages are acknowledged, and forgotten there, about so long after they came."""


class Supervisor:
    """One term. `stored`: the committed versions it knows of. It reacts only while it is `alive`."""

    def __init__(self, world: World) -> None:
        self.world, self.policy = world, policy_of(world.swarm.job)
        self.state = initial()
        self.term = world.bucket.take_term()
        self.stored: list[VersionId] = list(world.bucket.committed)
        self.alive, self.opened = True, False
        self.outcome: Finished | Failed | None = None
        self.perform = Performer(self)
        self.final: VersionId | None = None
        self._tick_at = float("inf")
        self._waiting: list[tuple[Agent, Message]] = []
        self._progress, self._attempt = 0, 0

    # -- opening

    def open(self) -> None:
        """Look for what lives, then take it over."""
        world = self.world
        agents = [agent for agent in world.agents() if agent.alive]
        slow = any(not agent.node.answers for agent in agents)
        world.clock.after(CALL_S if slow else world.delay(), self._find_workers, agents)

    def _find_workers(self, asked: list[Agent]) -> None:
        if not self.alive:
            return
        world = self.world
        found = [agent for agent in asked if agent.alive and agent.node.answers]
        for agent in asked:
            if agent not in found:
                world.kill(agent.node, agent)
        workers = [worker for node in world.nodes.values() for worker in node.workers.values() if worker.alive]
        late = [w for w in workers if not w.node.answers or (not w.ready and w.ready_at > world.clock.now)]
        world.clock.after(CALL_S if late else world.delay(), self._take_over, found, workers)

    def _take_over(self, agents: list[Agent], workers: list[Worker]) -> None:
        if not self.alive:
            return
        world, perform = self.world, self.perform
        for agent in agents:
            if agent.alive and agent.node.answers and agent.node.id not in perform.agents:
                perform.join(agent)
            else:
                world.kill(agent.node, agent)
        for worker in workers:
            node = worker.node
            if not (worker.alive and worker.ready and node.answers and perform.agents.get(node.id) is worker.agent):
                world.kill(node, worker)
                continue
            perform.workers[worker.id] = worker
        self._adopt(list(perform.workers.values()))

    def _adopt(self, workers: list[Worker]) -> None:
        agents = list(self.perform.agents.values())
        now = self.world.clock.now
        living = [
            Living(w.id, w.attempt, w.rank, self._steps_of(w), w.inside, w.run.group.restore if w.run else None,
                   len(w.run.members) if w.run else 0)
            for w in workers
        ]  # fmt: skip
        self.opened = True
        held = [version.id for version in self.world.versions() if any(map(version.in_part, agents))]
        attempts = [*(version.attempt for version in (*self.stored, *held)), *(worker.attempt for worker in workers)]
        self.decide(Opened(now, self.term, max([self.world.bucket.attempt, *attempts]), self.world.bucket.rollbacks))
        on: dict[str, list[str]] = {node: [] for node in sorted(self.perform.agents)}
        for worker in workers:
            on[worker.node.id].append(worker.id)
        for node, names in on.items():
            self.decide(NodeJoined(now, node, tuple(names)))
        for worker in workers:
            self.decide(WorkerReady(now, worker.id, worker.node.id))
        group, done = living_group(living)
        if group is not None:
            promises.adopts(group, workers)
            self._attempt, self._progress = group.attempt, done
            self.decide(Adopted(now, group, done, who_left(living, group)))
            self.world.detection.taken_over()
        for there in self.world.nodes.values():
            self.world.detection.node_leaves(there)
        self.perform.discover()
        waiting, self._waiting = self._waiting, []
        for agent, message in waiting:
            self._hear(agent, message)

    def _steps_of(self, worker: Worker) -> int:
        return worker.run.steps(self.world.clock.now) if worker.run else 0

    # -- what comes in

    def hear(self, agent: Agent, message: Message) -> None:
        """A message of a node's agent."""
        if not self.alive or agent.watcher is not self:
            return
        if not self.opened:
            self._waiting.append((agent, message))
            return
        self._hear(agent, message)

    def _hear(self, agent: Agent, message: Message) -> None:
        if isinstance(message, Lost):
            worker = self.perform.workers.get(message.worker)
            if worker is not None:  # else it was told to end, or belonged to a supervisor before this one
                now = self.world.clock.now
                self.post(WorkerLost(now, worker.id, worker.node.id, "its connection closed", self.progress))
        else:
            self.post(message)

    def agent_lost(self, agent: Agent, how: str) -> None:
        """A watch has ended."""
        agent.watcher = None
        if self.alive and self.perform.agents.get(agent.node.id) is agent:
            self.perform.bury(agent)
            self.post(NodeLost(self.world.clock.now, agent.node.id, how, self.progress))
            if agent.node.leaves_at is not None:
                self.post(Diagnosed(self.world.clock.now, self.state.incidents, FaultKind.PREEMPTION, agent.node.id))

    def first_step(self, attempt: int, done: int) -> None:
        """Every member has done the first step of an attempt."""
        if attempt == self._attempt:
            self.post(FirstStep(self.world.clock.now, attempt, done))

    def post(self, event: Event) -> None:
        """An event for the machine. What comes while the job is being opened is looked at afterwards."""
        if not self.alive:
            return
        if self.opened:
            self.decide(event)
        else:
            self.world.clock.after(PACE_S, self.post, event)

    @property
    def progress(self) -> int:
        """Steps of the group at work that it was told of."""
        run = self.world.run
        if run is not None and run.attempt == self._attempt:
            self._progress = max(self._progress, run.steps(self.world.clock.now - 2 * self.world.swarm.delay_s))
        return self._progress

    def begin(self, group: Group) -> None:
        """A group forms."""
        self._attempt, self._progress = group.attempt, group.restore.step if group.restore else 0
        self.world.detection.begins(group.attempt, self._progress)

    def committed(self, version: VersionId) -> None:
        """A version is in the store."""
        self.stored = [*self.stored[-8:], version]
        if version == self.final:
            self.world.clock.after(0.0, self.post, Saved(self.world.clock.now, version.attempt, version.step))

    # -- deciding

    def decide(self, event: Event) -> None:
        """One turn of the loop."""
        if self.outcome is not None:
            return
        before = self.state
        decision = step(before, event, self.policy)
        self.world.note(event, decision)
        try:
            few = len(before.nodes) <= FEW or self.world.clock.happened % WALK_EVERY == 0
            turns = any(not isinstance(action, OF_ONE) for action in decision.actions)
            check(before, event, decision, self.policy, walk=few or turns)
        except Breach:
            raise
        except AssertionError as error:
            raise Breach(f"the machine: {error}") from error
        self.state = decision.state
        for action in decision.actions:
            if isinstance(action, FormGroup):
                promises.attempt_begins(self.world, self, action.group)
            if isinstance(action, CloseJob):
                assert isinstance(self.state.phase, Finished | Failed), "only then a job is closed"
                self.outcome = self.state.phase
            self.perform.perform(action)
        if self.outcome is not None:
            self.world.ended(self)
        elif decision.state is not before or isinstance(event, Tick):
            self._arm(changed=decision.state is not before)

    def _arm(self, *, changed: bool) -> None:
        due = next_due(self.state, self.policy)
        if due is None:
            return
        now = self.world.clock.now
        at = max(due, now if changed else now + PACE_S) + PACE_S * self.world.dice.random()
        if at < self._tick_at:
            self._tick_at = at
            self.world.clock.at(at, self._tick, at)

    def _tick(self, planned: float) -> None:
        if self.alive and planned == self._tick_at:
            self._tick_at = float("inf")
            due = next_due(self.state, self.policy)
            if due is not None and due <= self.world.clock.now:
                self.decide(Tick(self.world.clock.now))
            else:
                self._arm(changed=True)
