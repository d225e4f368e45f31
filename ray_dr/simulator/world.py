"""The simulated world: a cluster, a store, a job in training, and the supervisor of the time. All chance comes from one seed.

Theory of operation. Things happen at times on a `Clock`; nothing happens in between. Faults (`faults`) change things;
what they mean to the attempt in training is worked out here; the supervisor learns of it as `detection` says, decides
with the real machine, and acts on the world through `perform`. The world knows the truth, and holds the supervisor to it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ray_dr.model.actions import Decision
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Event, FencedOff, WorkerRaised, WorkerReturned, WorkerStopped
from ray_dr.model.recovery import Failed, Finished
from ray_dr.recovery.groups import group_of
from ray_dr.simulator.breach import must
from ray_dr.simulator.bucket import Bucket
from ray_dr.simulator.clock import Clock
from ray_dr.simulator.detection import Detection
from ray_dr.simulator.host import ACK_S, Supervisor
from ray_dr.simulator.standing import LastWords
from ray_dr.simulator.swarm import Swarm
from ray_dr.simulator.tally import Tally
from ray_dr.simulator.things import OUTBOX_MAX, Agent, Lost, Message, Node, Worker
from ray_dr.simulator.training import Doing, Run, Version

START = 1_000_000.0
KEPT_EVENTS = 40
RUNS_KEPT = 3
RESTORE_S = (0.2, 3.0)
FROM_STORE_S = 20.0
LEAVE_S = 0.5
RESUBMIT_S = 30.0
LATE_S = 0.5


class World:
    """`run` is the newest attempt. `faulty`: things go wrong; it ends with the first phase of a life. `changes`: how often
    something of what is well here was changed for the worse."""

    def __init__(self, swarm: Swarm, dice: random.Random, *, trace: int | None = KEPT_EVENTS) -> None:
        self.swarm, self.dice = swarm, dice
        self.clock = Clock(START)
        self._says = LastWords(self.clock, swarm, dice)
        self.bucket = Bucket()
        self.detection = Detection(self)
        self.tally = Tally(swarm)
        self.nodes: dict[str, Node] = {}
        self.faulty, self.over, self.changes = True, False, 0
        self.run: Run | None = None
        self.runs: deque[Run] = deque(maxlen=RUNS_KEPT)
        self.supervisor: Supervisor | None = None
        self.trace: deque[tuple[float, Event | str, str]] = deque(maxlen=trace)
        self.armed: Version | None = None
        self.disturbed = 0
        """How often anything has gone wrong so far."""
        self.leaving: set[str] = set()
        self.absent, self.up = set[int](), set[int]()
        self._lives = self._coming = 0
        for machine in range(swarm.machines):
            self.boot(machine)
        self.submit()

    # -- the control plane

    def submit(self) -> None:
        """A supervisor begins, if none lives; one that does not reach the store ends, and is started again."""
        if self.over or self.supervisor is not None:
            return
        if self.bucket.down:
            self.clock.after(max(1.0, self.swarm.restart_s), self.submit)
            return
        self.advance()
        self.supervisor = Supervisor(self)
        self.say(f"supervisor of term {self.supervisor.term} begins")
        self.supervisor.open()

    def supervisor_dies(self, *, back_after_s: float) -> None:
        """Its process ends."""
        if self.supervisor is None:
            return
        self.advance()
        self.changes += 1
        self.supervisor.alive = False
        for agent in self.agents():
            if agent.watcher is self.supervisor:
                agent.watcher = None
                self._forget_acked(agent)
        self.supervisor = None
        self.clock.after(back_after_s, self.submit)

    def ended(self, supervisor: Supervisor) -> None:
        """The job was closed."""
        outcome = supervisor.outcome
        assert outcome is not None, "it was closed"
        if supervisor is not self.supervisor:  # it was not its own any more
            supervisor.alive = False
            return
        self.advance()
        supervisor.alive, self.supervisor = False, None
        if isinstance(outcome, Finished) and not outcome.drained:
            must(self.bucket.newest is not None or not self.swarm.total_steps, "I6: what a finished job ended at is kept")
            self.over = True
        elif isinstance(outcome, Failed) and not outcome.resubmit:
            must(bool(self.swarm.poison or supervisor.state.rollbacks), f"only its own error ends it for good: {outcome.reason}")
            self.over = True
        else:
            self.tally.closed += 1
            self.clock.after(RESUBMIT_S, self.submit)

    def write_down(self, host: Supervisor, attempt: int) -> None:
        """The journal tells of an attempt; its copy in the store lags as long as the store is away."""
        if host.alive and self.bucket.down:
            self.clock.after(1.0, self.write_down, host, attempt)
        elif host.alive and host.term == self.bucket.term:
            self.bucket.attempt = max(self.bucket.attempt, attempt)
            self.bucket.rollbacks = host.state.rollbacks

    def note(self, event: Event, decision: Decision) -> None:
        """An event and what was decided."""
        self.tally.decided(decision, self.clock.now)
        self.trace.append((self.clock.now, event, decision.reason))

    def say(self, words: str) -> None:
        """Something that happened to the world."""
        self.trace.append((self.clock.now, words, ""))

    # -- network

    def delay(self) -> float:
        """Seconds that a message takes."""
        return 0.0005 + self.dice.expovariate(1.0) * self.swarm.delay_s

    def call_lost(self) -> bool:
        """Whether a call does not arrive."""
        lost = self.faulty and self.swarm.call_lost > 0 and self.dice.random() < self.swarm.call_lost
        self.tally.met["lost call"] += lost
        return lost

    def send(self, agent: Agent, message: Message) -> None:
        """From an agent to its supervisor, now or when there is one again."""
        if not agent.alive:
            return
        self._forget_acked(agent)
        agent.outbox.append((self.clock.now, message))
        del agent.outbox[:-OUTBOX_MAX]
        if agent.watcher is None:
            return
        at = self.clock.now + self.delay()
        self.tally.met["late message"] += at - self.clock.now > LATE_S
        if self.swarm.unruly and self.faulty:
            self.tally.met["overtaken message"] += at < agent.sent_at
            if self.dice.random() < 0.2:
                self.tally.met["doubled message"] += 1
                self.clock.at(at + 3 * self.delay(), self._arrives, agent, agent.watcher, message)
        else:
            at = max(at, agent.sent_at)
        agent.sent_at = at
        self.clock.at(at, self._arrives, agent, agent.watcher, message)

    def _arrives(self, agent: Agent, watcher: Supervisor, message: Message) -> None:
        if agent.watcher is not watcher:
            return
        if agent.alive and not agent.node.answers:
            agent.node.later.append((self._arrives, (agent, watcher, message)))
            return
        watcher.hear(agent, message)

    def _forget_acked(self, agent: Agent) -> None:
        if self.supervisor is not None and not self.bucket.down and agent.outbox:
            fresh = self.clock.now - ACK_S * self.dice.uniform(0.5, 1.5)
            agent.outbox = [item for item in agent.outbox if item[0] > fresh]

    # -- nodes

    def agents(self) -> Iterator[Agent]:
        """All of them, on all nodes."""
        return (agent for node in self.nodes.values() for agent in node.agents)

    def domain(self, node: Node) -> tuple[str, ...]:
        """Where a node stands."""
        return ("", "", f"k{node.rack}")

    def boot(self, machine: int) -> None:
        """A machine is up, as a new node."""
        if machine in self.up:
            return
        self.up.add(machine)
        self._lives += 1
        node = Node(f"n{machine}.{self._lives}", machine, machine % self.swarm.racks)
        self.nodes[node.id] = node
        self.absent.discard(machine)
        self.look_around()

    def look_around(self) -> None:
        """There may be something new for the supervisor to find."""
        if self.supervisor is not None and self.supervisor.opened:
            self.clock.after(self.dice.uniform(0.0, 0.25), self.supervisor.perform.discover)

    def capacity_wanted(self) -> None:
        """The autoscaler is asked for what is missing; it brings machines that are away, one after the other."""
        if self.swarm.autoscale_s == float("inf") and self.faulty:
            return
        for _ in range(len(self.absent) - self._coming):
            self._coming += 1
            self.clock.after(self.dice.expovariate(1 / min(self.swarm.autoscale_s, 900.0)), self._delivered)

    def _delivered(self) -> None:
        self._coming -= 1
        if self.absent:
            self.boot(min(self.absent))

    def node_dies(self, node: Node) -> None:
        """A machine is gone, with all on it."""
        if not node.alive:
            return
        self.advance()
        self.changes += 1
        node.alive = False
        del self.nodes[node.id]
        self.leaving.discard(node.id)
        self.absent.add(node.machine)
        self.up.discard(node.machine)
        for agent in list(node.agents):
            self._agent_dies(agent)
        if self.swarm.reboot_s < float("inf"):
            self.clock.after(self.dice.expovariate(1 / self.swarm.reboot_s), self.boot, node.machine)
        elif self.supervisor is not None and self.supervisor.perform.target:
            self.capacity_wanted()

    def noticed(self, node: Node, left_s: float, *, said: bool = True) -> None:
        """A node will be taken away in so many seconds, and it is `said`."""
        if said and node.alive:
            self.leaving.add(node.id)
            node.leaves_at = min(node.leaves_at or float("inf"), self.clock.now + left_s)
            self.detection.node_leaves(node)

    def _agent_dies(self, agent: Agent) -> None:
        if not agent.alive:
            return
        self.advance()
        agent.alive = False
        agent.gone_at = min(agent.gone_at, self.clock.now)
        if agent in agent.node.agents:
            agent.node.agents.remove(agent)
        for worker in [worker for worker in agent.node.workers.values() if worker.agent is agent]:
            self.worker_dies(worker)
        if agent.watcher is not None:
            self.detection.node_died(agent)

    def kill(self, node: Node, what: Agent | Worker) -> None:
        """The supervisor ends a process: at once, or as soon as its node is there again."""
        if not node.works:
            node.later.append((self._killed, (what,)))
        else:
            self.clock.after(self.delay(), self._killed, what)

    def _killed(self, what: Agent | Worker) -> None:
        if isinstance(what, Agent):
            self._agent_dies(what)
        else:
            self.worker_dies(what)

    def troubled(self, node: Node, trouble: str, more: int) -> None:
        """A node becomes (`more` 1), or ceases to be (-1), `frozen`, `cut` or `unheard`."""
        self.advance()
        self.changes += more > 0
        worked, answered = node.works, node.answers
        setattr(node, trouble, max(0, getattr(node, trouble) + more))
        if answered and not node.answers:
            node.troubled_at = self.clock.now
            for agent in node.agents:
                self.detection.node_troubled(agent)
        if worked and not node.works:
            for agent in node.agents:
                agent.gone_at = min(agent.gone_at, self.clock.now)
            self._pause(node)
        if node.answers and not answered:
            self._well_again(node)

    def _well_again(self, node: Node) -> None:
        later, node.later = node.later, []
        for agent in node.agents:
            agent.gone_at = float("inf")
        for do, args in later:
            self.clock.after(self.delay(), do, *args)
        run = self.run
        if run is not None and run.doing is Doing.GOING and node in run.nodes and all(other.works for other in run.nodes):
            run.pace(self.clock.now, self._rate(run))
            self.plan(run)

    # -- workers and attempts

    def worker_dies(self, worker: Worker) -> None:
        """A process ends."""
        if not worker.alive:
            return
        self.changes += 1
        worker.alive = False
        worker.node.workers.pop(worker.id, None)
        if worker.ready:
            self.send(worker.agent, Lost(worker.id))
        elif self.supervisor is not None and worker.node.alive and worker.agent.alive:
            self.clock.after(self.delay(), self.supervisor.perform.start_failed, worker)
        if worker.inside and worker.run is not None:
            worker.inside = False
            self.broken(worker.run, loud=True)

    def enter(self, worker: Worker, run: Run, rank: int) -> bool:
        """A worker is sent into an attempt; False when it was in this or a newer one."""
        if run.attempt <= max(worker.attempt, worker.refused):
            return False
        must(not worker.inside, f"I8: {worker.id} is sent into attempt {run.attempt}, and is in {worker.attempt} still")
        worker.attempt, worker.inside, worker.run, worker.rank = run.attempt, True, run, rank
        return True

    def take_up(self, run: Run) -> None:
        """A new attempt is the one at work."""
        self.advance()
        if self.run is not None and self.run.doing is not Doing.BROKEN:
            self.run.doing = Doing.OVER
        self.run = run
        self.runs.append(run)

    def restore_s(self, run: Run) -> float:
        """Seconds until an attempt's first step begins."""
        stored = run.group.restore is not None and all(version.id != run.group.restore for version in self.versions())
        return self.dice.uniform(*RESTORE_S) + (FROM_STORE_S * self.bucket.slow * self.dice.random() if stored else 0.0)

    def get_going(self, run: Run) -> None:
        """Everybody has joined and restored."""
        if run.doing is not Doing.JOINING or not all(worker.inside and worker.run is run for worker in run.members):
            return
        run.doing = Doing.GOING
        run.base_at = self.clock.now
        run.pace(self.clock.now, self._rate(run) if all(node.works for node in run.nodes) else 0.0)
        self.plan(run)
        self.clock.at(run.time_of(run.began + 1) if run.rate else self.clock.now + 1.0, self._first_step, run)

    def _first_step(self, run: Run) -> None:
        if run is not self.run or run.doing is not Doing.GOING:
            return
        heard = self.supervisor is not None and all(node.answers for node in run.nodes)
        if run.steps(self.clock.now) <= run.began or not heard:
            self.clock.after(1.0, self._first_step, run)
        elif self.supervisor is not None:
            self.clock.after(self.delay(), self.supervisor.first_step, run.attempt, run.began + 1)

    def plan(self, run: Run) -> None:
        """When the attempt comes to where something happens by itself."""
        if run.doing is not Doing.GOING or not run.rate:
            return
        ends = [self.swarm.total_steps, *([run.stop_at] if run.stop_at is not None else [])]
        poison = self.swarm.poison if run.steps(self.clock.now) < self.swarm.poison else 0
        step = min([*ends, *([poison] if poison else [])])
        self.clock.at(run.time_of(step), self._arrived, run, run.epoch, step)

    def _arrived(self, run: Run, epoch: int, step: int) -> None:
        if run.epoch != epoch or run.doing is not Doing.GOING:
            return
        if step == self.swarm.poison:
            self.raises(run.members[step % len(run.members)], "ValueError: poison", step - 1)
            return
        self._stops(run, step)

    def _stops(self, run: Run, step: int) -> None:
        """Everybody stops at the same step: on request, or because there is nothing left to do."""
        self.advance()
        run.base, run.base_at, run.rate = float(step), self.clock.now, 0.0
        run.doing = Doing.OVER
        if step > run.began:
            run.final(step, self.clock.now)
        kind: type[WorkerStopped | WorkerReturned] = WorkerReturned if step >= self.swarm.total_steps else WorkerStopped
        for node, workers in run.by_node.items():
            self.clock.after(LEAVE_S * self.dice.random(), self._leave, node, workers, run,
                             lambda worker, kind=kind: kind(self.clock.now, worker.id, run.attempt, step))  # fmt: skip

    def broken(self, run: Run, *, loud: bool) -> None:
        """An attempt cannot go on. `loud`: a connection closed, which the others' collectives may notice."""
        if run.doing in (Doing.BROKEN, Doing.OVER):
            return
        self.advance()
        joining = run.doing is Doing.JOINING
        run.doing = Doing.BROKEN
        run.pace(self.clock.now, 0.0)
        self.tally.breaks(run, self.clock.now)
        if loud and self.swarm.raises and not joining:
            for node, workers in run.by_node.items():
                self.clock.after(LEAVE_S * self.dice.random(), self._leave, node, workers, run, self._says.collateral)

    def raises(self, worker: Worker, error: str, step: int) -> None:
        """The program raises in one worker."""
        run = worker.run
        if run is not None and run.doing is Doing.GOING and worker.inside and not worker.hung:
            self.changes += 1
            self.broken(run, loud=True)
            self._leave(worker.node, [worker], run,
                        lambda who: WorkerRaised(self.clock.now, who.id, run.attempt, error, False, step))  # fmt: skip

    def hangs(self, worker: Worker) -> None:
        """A worker does nothing any more; the others wait for it."""
        run = worker.run
        if run is not None and run.doing is Doing.GOING and worker.inside and not worker.hung:
            worker.hung = True
            self.changes += 1
            self.broken(run, loud=False)
            self.detection.worker_hangs(run)

    def abort(self, node: Node, workers: Sequence[Worker], attempt: int) -> None:
        """The supervisor's word that an attempt is over reaches a node."""
        if not node.answers:
            node.later.append((self.abort, (node, workers, attempt)))
            return
        for worker in workers:
            run = worker.run
            if worker.attempt < attempt and worker.alive:  # it was never sent there, and now will not go
                worker.refused = attempt
                if self.supervisor is not None:
                    self.clock.after(self.delay(), self.supervisor.post, WorkerStopped(self.clock.now, worker.id, attempt, 0))
            if run is None or worker.attempt != attempt or not worker.inside:
                continue
            self.broken(run, loud=False)
            if self.faulty and self.dice.random() < self.swarm.stuck:
                worker.hung = True
            self.clock.after(LEAVE_S * self.dice.random(), self._leave, node, [worker], run, self._says.aborted)

    def _leave(self, node: Node, workers: Sequence[Worker], run: Run, word: Callable[[Worker], Event]) -> None:
        """Workers leave `train`, and their agent tells."""
        if node.frozen:
            node.later.append((self._leave, (node, workers, run, word)))
            return
        for worker in workers:
            if worker.alive and worker.inside and worker.run is run and not worker.hung:
                worker.inside = False
                self.send(worker.agent, word(worker))

    def _pause(self, node: Node) -> None:
        run = self.run
        if run is not None and run.doing is Doing.GOING and node in run.nodes:
            run.pace(self.clock.now, 0.0)

    def slowed(self, node: Node, factor: float) -> None:
        """A node works at another speed, and everybody with it."""
        self.advance()
        self.changes += factor > node.slow
        node.slow = factor
        run = self.run
        if run is not None and run.doing is Doing.GOING and node in run.nodes and run.rate:
            run.pace(self.clock.now, self._rate(run))
            self.plan(run)

    def _rate(self, run: Run) -> float:
        return 1.0 / (self.swarm.step_s * max(node.slow for node in run.nodes))

    # -- versions

    def versions(self) -> list[Version]:
        """All that somebody may hold in memory."""
        return [version for run in self.runs for version in run.saves]

    def version(self, version: VersionId | None) -> Version | None:
        """The newest of that name: where the journal did not learn of an attempt of which nothing is left, there may be two."""
        return next((known for known in reversed(self.versions()) if known.id == version), None)

    def advance(self) -> None:
        """Note what was saved until now: to be called before anything changes that saving depends on."""
        run, now = self.run, self.clock.now
        if run is None:
            return
        run.advance(now)
        for version in run.due(now):
            whole = run.doing is not Doing.BROKEN or all(owner.gone_at >= version.uploaded_at for owner in version.owners)
            if whole and not self.bucket.down and self.supervisor is not None:
                self.commit(version.id, True)
        armed = next((v for v in reversed(run.saves) if v.armed(now)), None)
        if armed is None:
            return
        if self.armed is None or armed.id > self.armed.id:
            self.armed = armed
        group = group_of(self.supervisor.state) if self.supervisor is not None else None
        if group is not None and group.attempt == run.attempt:  # else nobody may let go of what was found
            run.saves = [v for v in run.saves if v.id >= armed.id or v.uploaded_at > now]

    def commit(self, version: VersionId, ready: bool, *, by: Supervisor | None = None) -> None:
        """The supervisor (`by`: another one) commits a version that is whole in the store."""
        supervisor = by or self.supervisor
        if not ready or supervisor is None:
            return
        if not self.bucket.commit(version, supervisor.term):
            if supervisor.term < self.bucket.term:
                supervisor.post(FencedOff(self.clock.now, self.bucket.term))
            return
        must(supervisor.term == self.bucket.term, f"I3: term {supervisor.term} commits {version} in term {self.bucket.term}")
        if self.faulty and self.dice.random() < self.swarm.applied_yet_failed:
            self.tally.met["lost answer of a commit"] += 1
            return
        supervisor.committed(version)
