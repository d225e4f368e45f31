"""Action -> effect in the simulated cluster, with the waits, refusals and losses that `actors.perform` meets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from ray_dr.model.actions import (
    AbortGroup,
    Action,
    CloseJob,
    FormGroup,
    KillWorker,
    ReleaseNode,
    RequestNodes,
    Rescue,
    SaveFinal,
    StartWorkers,
    StopGroup,
    TakeInventory,
)
from ray_dr.model.checkpoint import Held, VersionId
from ray_dr.model.events import ActionFailed, InventoryTaken, NodeJoined, Rescued, Saved, WorkerLost, WorkerReady
from ray_dr.model.recovery import Group
from ray_dr.recovery import standbys
from ray_dr.recovery.groups import group_of
from ray_dr.recovery.plan import choose_version, stays_behind
from ray_dr.recovery.quarantine import usable
from ray_dr.recovery.replicas import replicas
from ray_dr.simulator.breach import must
from ray_dr.simulator.things import Agent, Node, Worker
from ray_dr.simulator.training import Run, Version

if TYPE_CHECKING:
    from ray_dr.simulator.host import Supervisor

CALL_S = 10.0
SETTLE_S = 2.0
SEAL_S = 30.0
AGENT_START_S = 20.0
STOP_AHEAD_S = 0.4
RETRY_S = 1.0
POLL_S = 0.25


class Performer:
    """Holds what a supervisor knows of agents and workers; ends with it."""

    def __init__(self, host: Supervisor) -> None:
        self._host, self._world = host, host.world
        self.agents: dict[str, Agent] = {}
        self.workers: dict[str, Worker] = {}
        self._coming: dict[str, float] = {}
        self._seen: set[str] = set()
        self._looks: set[float] = set()
        self._started = 0
        self.target = 0
        self.promised: tuple[VersionId | None, Version | None] = (None, None)
        """Committed, and with all its copies made, when a version was last looked for."""

    def perform(self, action: Action) -> None:
        """Begin an action; its outcome comes back as an event."""
        world = self._world
        match action:
            case StartWorkers(node, count):
                for _ in range(count):
                    self._start_worker(node)
            case RequestNodes(count):
                self.target = count
                world.capacity_wanted()
            case ReleaseNode(node):
                agent = self.agents.pop(node, None)
                if agent is not None:
                    agent.watcher = None
                    self.bury(agent)
                    world.clock.after(world.delay(), self.discover)
            case AbortGroup(attempt, members):
                self._abort(attempt, members)
            case KillWorker(worker):
                self._drop_worker(worker)
            case TakeInventory(incident, ask):
                self._when_answered(self._take_inventory, incident, ask)
            case FormGroup(group):
                self._host.begin(group)
                self._when_answered(self._form, group, world.clock.now + SEAL_S)
            case StopGroup(attempt):
                self._when_answered(self._stop, attempt)
            case SaveFinal(attempt, step):
                self._host.final = VersionId(attempt, step)
                self._save_final(VersionId(attempt, step), world.clock.now)
            case Rescue():
                world.clock.after(world.delay() + world.swarm.seal_s * world.dice.random(), self._rescue, action)
            case CloseJob(outcome):
                self._close(outcome)
            case _:
                assert_never(action)

    # -- nodes and workers

    def discover(self) -> None:
        """Start agents on living nodes without one, as many as the job still wants."""
        world, now = self._world, self._world.clock.now
        if not self._host.alive or self._host.outcome is not None:
            return
        pending = sum(now - since < AGENT_START_S for since in self._coming.values())
        leaving = sum(node in self.agents for node in world.leaving)
        room = self._host.policy.nodes_wanted - (len(self.agents) - leaving) - pending
        if room <= 0:
            return
        taken = self.agents.keys() | self._coming.keys()
        free = [node for node in world.nodes.values() if node.alive and node.leaves_at is None and node.id not in taken]
        for node in free[:room]:
            again = node.id in self._seen
            self._seen.add(node.id)
            self._coming[node.id] = now - (AGENT_START_S if again else 0.0)
            world.clock.after(world.dice.uniform(1.0, 4.0), self._agent_up, node)
            self._look_again(math.ceil(now + AGENT_START_S) + 0.1)

    def _look_again(self, at: float) -> None:
        """At a time, once, however many wait for it."""
        if at not in self._looks:
            self._looks.add(at)
            self._world.clock.at(at, self.discover)

    def _agent_up(self, node: Node) -> None:
        host, world = self._host, self._world
        if not host.alive or host.outcome is not None:
            return
        if node.alive and not node.answers:
            node.later.append((self._agent_up, (node,)))
            return
        self._coming.pop(node.id, None)
        if not node.alive:
            self.discover()
            return
        agent = Agent(node)
        node.agents.append(agent)
        self.join(agent)
        host.post(NodeJoined(world.clock.now, node.id))
        world.detection.node_leaves(node)

    def join(self, agent: Agent) -> None:
        """Listen to an agent: all that was not acknowledged yet comes first."""
        self.agents[agent.node.id] = agent
        agent.watcher = self._host
        backlog, agent.outbox = agent.outbox, []
        for _, message in backlog:
            self._world.send(agent, message)

    def bury(self, agent: Agent) -> None:
        """What is left of a node that is taken for lost ends, as soon as that can be told it."""
        self.agents.pop(agent.node.id, None)
        self._world.kill(agent.node, agent)
        for worker in [ref for ref in agent.node.workers.values() if ref.id in self.workers]:
            self._drop_worker(worker.id)
        self._world.clock.after(self._world.delay(), self.discover)

    def _start_worker(self, node: str) -> None:
        agent, world = self.agents.get(node), self._world
        if agent is None:
            return
        self._started += 1
        takes_s = world.swarm.worker_start_s * world.dice.uniform(0.7, 1.5)
        worker = Worker(f"{node}/{self._host.term}.{self._started}", agent.node, agent, world.clock.now + takes_s)
        agent.node.workers[worker.id] = self.workers[worker.id] = worker
        world.clock.after(takes_s, self._worker_up, worker)

    def _worker_up(self, worker: Worker) -> None:
        world = self._world
        if not worker.alive:
            return
        if not worker.node.works:
            worker.node.later.append((self._worker_up, (worker,)))
            return
        if world.faulty and world.dice.random() < world.swarm.start_fails:
            world.worker_dies(worker)
            return
        worker.ready = True
        if worker.node.unheard:
            worker.node.later.append((self._say_ready, (worker,)))
        else:
            world.clock.after(world.delay(), self._say_ready, worker)

    def _say_ready(self, worker: Worker) -> None:
        if worker.id in self.workers:
            self._host.post(WorkerReady(self._world.clock.now, worker.id, worker.node.id))

    def start_failed(self, worker: Worker) -> None:
        """Ray's word: a process that was being started has ended."""
        if self.workers.pop(worker.id, None) is not None:
            now, host = self._world.clock.now, self._host
            host.post(WorkerLost(now, worker.id, worker.node.id, "it did not start", host.progress))

    def _drop_worker(self, name: str) -> None:
        worker = self.workers.pop(name, None)
        if worker is not None:
            self._world.kill(worker.node, worker)

    # -- groups

    def _when_answered(self, do: Callable[..., None], *args: Any) -> None:
        """Go on once all agents have answered, or were waited for long enough."""
        clock = self._world.clock
        clock.after(self._world.delay(), self._gather, clock.now + CALL_S, do, args)

    def _gather(self, until: float, do: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self._later():
            return
        if self._world.clock.now < until and not all(agent.node.answers for agent in self.agents.values() if agent.alive):
            self._world.clock.after(POLL_S, self._gather, until, do, args)
        else:
            do(*args)

    def _reached(self) -> dict[Agent, None]:
        return {agent: None for agent in self.agents.values() if agent.alive and agent.node.answers}

    def _later(self) -> bool:
        return self._host.alive and self._host.outcome is None

    def _failed(self, action: type, error: str, attempt: int) -> None:
        self._host.post(ActionFailed(self._world.clock.now, action.__name__, error, str(attempt)))

    def _take_inventory(self, incident: int, ask: int, settled: bool = False) -> None:
        if not self._later():
            return
        world, now = self._world, self._world.clock.now
        run = world.run
        world.advance()
        sealing = run is not None and any(not version.own(now) for version in run.saves)
        if sealing and not settled:
            settled_s = min(SETTLE_S, world.swarm.seal_s)
            world.clock.after(settled_s, self._gather, now + CALL_S, self._take_inventory, (incident, ask, True))
            return
        reached = self._reached()
        held: list[Held] = []
        for version in sorted(world.versions(), key=lambda version: version.id, reverse=True):
            parts = list(version.held(reached, now))
            held += parts
            if choose_version(parts, None, self._host.state.rollbacks) is not None:
                break  # no older one will be chosen
        rollbacks = self._host.state.rollbacks
        committed = next((version for version in reversed(self._host.stored) if usable(version, rollbacks)), None)
        self.promised = committed, world.armed if world.armed is not None and usable(world.armed.id, rollbacks) else None
        newest = choose_version(held, committed, rollbacks)
        self._host.post(InventoryTaken(now, incident, newest, ask))

    def _form(self, group: Group, until: float) -> None:
        """As `actors.forming`: agents begin, the version is looked for, then each member is sent its place."""
        if not self._later() or group_of(self._host.state) != group:
            return
        world, now = self._world, self._world.clock.now
        world.advance()
        if group.restore is not None and not self._readable(group.restore):
            if now > until:
                self._failed(FormGroup, f"nobody holds all of step {group.restore.step}", group.attempt)
            else:
                world.clock.after(0.5, self._form, group, until)
            return
        keep = self._world.version(group.restore) if group.restore else None
        behind = self._behind(keep) if keep is not None else None
        for agent in self._reached():
            agent.begin(now, keep, behind)
        if keep is not None and behind is not None:
            world.clock.after(world.swarm.seal_s + world.swarm.copy_s, self._let_go, keep, behind)
        members = [self.workers[name] for name in group.members if name in self.workers]
        if len(members) != len(group.members) or any(worker.node.id not in self.agents for worker in members):
            self._failed(FormGroup, "a member of the group is gone", group.attempt)
            return
        self._send_out(group, members)

    def _behind(self, keep: Version) -> Version | None:
        """What stays beside a version that has not got its copies yet."""
        reached, now = self._reached(), self._world.clock.now
        held = [part for version in self._world.versions() for part in version.held(reached, now)]
        wanted = min(self._world.swarm.job.memory.copies, len(self.agents))
        return None if keep.id in self._host.stored else self._world.version(stays_behind(held, keep.id, wanted))

    def _let_go(self, keep: Version, behind: Version) -> None:
        """Once it has them."""
        if self._later() and keep.armed(self._world.clock.now):
            for agent in self._reached():
                agent.kept = tuple(version for version in agent.kept if version != behind.id)

    def _rescue(self, action: Rescue) -> None:
        """As `actors.rescuing`: whoever was asked stages its parts, if all of them can."""
        if not self._later():
            return
        world, now = self._world, self._world.clock.now
        world.advance()
        writers = [self.workers.get(name) for name in action.writers]
        there = [w for w in writers if w is not None and w.alive and w.node.answers and w.node.id in self.agents]
        run = there[0].run if there else None
        if len(there) < len(writers) or run is None or run.attempt != action.attempt or world.call_lost():
            self._host.post(Rescued(now, action.attempt, action.step, "a survivor is gone"))
            return
        must(all(w.run is run and not w.inside for w in there), "I8: who writes what is left has left the attempt")
        by_node = {agent.node.id: agent for agent in self.agents.values()}
        named = replicas({node: world.domain(agent.node) for node, agent in by_node.items()}, world.swarm.job.memory.copies)
        keepers = {by_node[node]: tuple(by_node[keeper] for keeper in on) for node, on in named.items()}
        run.rescued(action.step, now, [self.agents[w.node.id] for w in there], keepers)
        self._host.post(Rescued(now, action.attempt, action.step))

    def _send_out(self, group: Group, members: Sequence[Worker]) -> None:
        world = self._world
        by_node = {agent.node.id: agent for agent in self.agents.values()}
        working = {worker.node.id for worker in members}
        domains = {node: world.domain(agent.node) for node, agent in by_node.items()
                   if agent.node.leaves_at is None or node in working}  # fmt: skip
        named = replicas(domains, world.swarm.job.memory.copies)
        if self._host.policy.standby_nodes:
            named = standbys.keepers(domains, world.swarm.job.memory.copies, [node for node in domains if node not in working])
        keepers = {by_node[node]: tuple(by_node[keeper] for keeper in on) for node, on in named.items()}
        run = Run(group, members, keepers, world.swarm)
        began = 0
        for rank, worker in enumerate(members):
            if worker.alive and worker.node.answers and not worker.hung and not world.call_lost():
                began += world.enter(worker, run, rank)
        if began:
            world.take_up(run)
        if began < len(members):
            world.clock.after(CALL_S, self._not_all_began, group)
        else:
            world.clock.after(world.restore_s(run), world.get_going, run)

    def _not_all_began(self, group: Group) -> None:
        if self._later():
            self._failed(FormGroup, "a member did not begin", group.attempt)

    def _readable(self, version: VersionId) -> bool:
        if version in self._host.stored:
            return True
        found = self._world.version(version)
        return found is not None and found.available(self._reached(), self._world.clock.now)

    def _abort(self, attempt: int, members: Sequence[str]) -> None:
        world = self._world
        nodes: dict[Node, list[Worker]] = {}
        for name in members:
            worker = self.workers.get(name)
            if worker is not None:
                nodes.setdefault(worker.node, []).append(worker)
        for node, workers in nodes.items():
            if not world.call_lost():
                world.clock.after(world.delay(), world.abort, node, workers, attempt)

    def _stop(self, attempt: int) -> None:
        if not self._later():
            return
        world, run = self._world, self._world.run
        members = [self.workers[name] for name in self._host.state.order if name in self.workers]
        away = any(not (w.alive and w.node.answers and not w.hung and w.attempt == attempt) for w in members)
        if run is None or run.attempt != attempt or away or world.call_lost():
            self._failed(StopGroup, "a member could not be asked to stop", attempt)
            return
        if run.stop_at is None or run.stop_at <= run.steps(world.clock.now):
            run.stop_at = run.steps(world.clock.now) + max(1, round(STOP_AHEAD_S / world.swarm.step_s))
        world.plan(run)

    def _save_final(self, version: VersionId, since: float) -> None:
        """Put again and again what the store does not have, until it has it."""
        if not self._later() or self._host.final != version:
            return
        world, host, now = self._world, self._host, self._world.clock.now
        world.advance()
        run = world.run
        idle = run is not None and run.attempt == version.attempt and run.steps(now) == run.began
        wanted = run.group.restore if idle and run is not None and run.group.restore is not None else version
        found = self._world.version(wanted)
        if wanted not in host.stored and found is not None and found.available(self._reached(), now) and not world.bucket.down:
            world.commit(found.id, since + world.swarm.write_s * world.bucket.slow <= now)
        if wanted in host.stored:
            host.post(Saved(now, version.attempt, version.step))
        elif now - since > world.swarm.job.recovery.start_s:
            self._failed(SaveFinal, f"step {version.step} could not be committed in time", version.attempt)
        else:
            world.clock.after(RETRY_S, self._save_final, version, since)

    def _close(self, outcome: str) -> None:
        world = self._world
        for node in world.nodes.values():
            for agent in [agent for agent in node.agents if outcome != "fenced" or agent.watcher is self._host]:
                world.kill(node, agent)
        must(outcome != "fenced" or world.supervisor is not self._host, "I3: the only supervisor is not fenced off")
