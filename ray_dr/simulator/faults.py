"""The faults of a seed: each kind strikes at random times, at its own rate, as long as the world is faulty."""

from __future__ import annotations

from collections.abc import Callable

from ray_dr.model.events import Corrupted, Diverged, StopRequested
from ray_dr.simulator import promises, zombie
from ray_dr.simulator.swarm import Fault
from ray_dr.simulator.things import Node, Worker
from ray_dr.simulator.training import Doing, Run
from ray_dr.simulator.world import World

SHORT_S, LONG_S = 1.5, 90.0
HEAD_BACK_S = 120.0
NOTICED = 0.8
"""Of preemptions, the share that anybody hears of beforehand."""
FLAPS = 4
NOTICED_STEPS = 20
TWINS, TWIN_S = 0.2, 5.0
"""Of faults, the share that comes soon after another one, and how soon: recoveries are where it hurts."""


class Faults:
    """Strikes a world. `heal` ends it all."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._raised = 0
        self._strikes: dict[Fault, Callable[[], None]] = {
            Fault.WORKER_CRASH: self._on_worker(world.worker_dies),
            Fault.WORKER_RAISE: self._on_worker(self._raise),
            Fault.WORKER_HANG: self._on_worker(world.hangs),
            Fault.NODE_DEATH: self._on_node(world.node_dies),
            Fault.NODE_FREEZE: self._on_node(lambda node: self._trouble((node,), "frozen")),
            Fault.NODE_CUT: self._on_node(lambda node: self._trouble((node,), "cut")),
            Fault.NODE_UNHEARD: self._on_node(lambda node: self._trouble((node,), "unheard")),
            Fault.NODE_SLOW: self._on_node(self._slow),
            Fault.NODE_FLAP: self._on_node(lambda node: self._flap(node.machine, world.dice.randint(2, FLAPS))),
            Fault.PREEMPTION: self._on_node(self._preempt),
            Fault.RACK_LOSS: self._on_node(self._lose_rack),
            Fault.RACK_CUT: self._on_node(lambda node: self._trouble(self._rack(node), "cut")),
            Fault.STORE_DOWN: self._store_down,
            Fault.STORE_SLOW: self._store_slow,
            Fault.SUPERVISOR_KILL: lambda: world.supervisor_dies(back_after_s=self._about(world.swarm.restart_s)),
            Fault.SUPERVISOR_CUT: self._cut_supervisor_off,
            Fault.HEAD_LOSS: self._head_loss,
            Fault.STOP_REQUEST: self._stop,
            Fault.DIVERGENCE: self._diverge,
            Fault.CORRUPTION: self._corrupt,
        }
        for fault in world.swarm.rates:
            self._next(fault)

    def heal(self, core: int) -> None:
        """No more faults: what is in trouble is well, and at least `core` machines are up."""
        world = self._world
        world.faulty = False
        for node in [node for node in world.nodes.values() if node.leaves_at is not None]:
            world.node_dies(node)
        world.bucket.down, world.bucket.slow = 0, 1.0
        for node in list(world.nodes.values()):
            for trouble in ("frozen", "cut", "unheard"):
                if getattr(node, trouble):
                    world.troubled(node, trouble, -getattr(node, trouble))
            if node.slow != 1.0:
                world.slowed(node, 1.0)
        for machine in sorted(world.absent)[: max(0, core - len(world.nodes))]:
            world.boot(machine)
        for node in list(world.nodes.values())[core:] if world.swarm.core_only else ():
            world.node_dies(node)

    def _next(self, fault: Fault) -> None:
        self._world.clock.after(self._world.dice.expovariate(self._world.swarm.rates[fault]), self._strike, fault)

    def _strike(self, fault: Fault) -> None:
        if self._world.faulty:
            self._world.disturbed += 1
            self._world.say(f"fault: {fault}")
            self._do(fault)
            self._next(fault)
            if self._world.dice.random() < TWINS:
                other = self._world.dice.choice(list(self._world.swarm.rates))
                self._world.clock.after(self._world.dice.expovariate(1 / TWIN_S), self._strike_once, other)

    def _strike_once(self, fault: Fault) -> None:
        if self._world.faulty:
            self._world.disturbed += 1
            self._world.say(f"fault, soon after another: {fault}")
            self._do(fault)

    def _do(self, fault: Fault) -> None:
        """Strike, and note whether it changed anything."""
        before = self._world.changes
        self._strikes[fault]()
        self._world.tally.met[fault] += self._world.changes > before

    def _on_node(self, do: Callable[[Node], object]) -> Callable[[], None]:
        def strike() -> None:
            if nodes := list(self._world.nodes.values()):
                node = self._world.dice.choice(nodes)
                self._world.say(f"  on node {node.id}")
                do(node)

        return strike

    def _on_worker(self, do: Callable[[Worker], None]) -> Callable[[], None]:
        def strike() -> None:
            nodes = [node for node in self._world.nodes.values() if node.workers]
            if nodes:
                worker = self._world.dice.choice(list(self._world.dice.choice(nodes).workers.values()))
                self._world.say(f"  on worker {worker.id}")
                do(worker)

        return strike

    def _about(self, mean_s: float) -> float:
        return mean_s * self._world.dice.uniform(0.3, 2.0)

    def _lasts(self) -> float:
        """Some troubles pass before anybody notices."""
        return self._about(self._world.dice.choice((SHORT_S, LONG_S)))

    def _rack(self, node: Node) -> list[Node]:
        return [other for other in self._world.nodes.values() if other.rack == node.rack]

    def _lose_rack(self, node: Node) -> None:
        for other in self._rack(node):
            self._world.node_dies(other)

    def _trouble(self, nodes: tuple[Node, ...] | list[Node], kind: str) -> None:
        lasts_s = self._lasts()
        for node in nodes:
            self._world.troubled(node, kind, 1)
            self._world.clock.after(lasts_s, self._ends, node, kind)

    def _ends(self, node: Node, kind: str) -> None:
        if node.alive and self._world.faulty:
            self._world.troubled(node, kind, -1)

    def _slow(self, node: Node) -> None:
        self._world.slowed(node, self._world.dice.uniform(1.2, 10.0))
        self._world.clock.after(self._lasts(), self._quick_again, node)

    def _quick_again(self, node: Node) -> None:
        if node.alive:
            self._world.slowed(node, 1.0)

    def _flap(self, machine: int, times: int) -> None:
        """A machine that goes and comes back, again and again."""
        world = self._world
        node = next((node for node in world.nodes.values() if node.machine == machine), None)
        if not world.faulty or not times:
            return
        world.disturbed += 1
        if node is not None:
            world.node_dies(node)
        world.clock.after(self._about(5.0), world.boot, machine)
        world.clock.after(self._about(20.0), self._flap, machine, times - 1)

    def _preempt(self, node: Node) -> None:
        """Taken back by the provider: with notice or without."""
        notice_s = self._world.dice.choice((0.0, 2.0, 10.0, 30.0, 120.0))
        self._world.changes += 1
        self._world.noticed(node, notice_s, said=self._world.dice.random() < NOTICED)
        promised = promises.notice_given(self._world, node)
        self._world.clock.after(notice_s, self._preempted, node, promised)

    def _preempted(self, node: Node, promised: promises.InTime | None) -> None:
        if self._world.faulty:
            promises.left_in_time(self._world, node, promised)
            self._world.disturbed += 1
            self._world.node_dies(node)

    def _raise(self, worker: Worker) -> None:
        self._raised += 1
        run = worker.run
        self._world.raises(worker, f"OSError: fault {self._raised}", run.steps(self._world.clock.now) if run else 0)

    def _store_down(self) -> None:
        world = self._world
        world.advance()
        world.bucket.down, world.changes = world.bucket.down + 1, world.changes + 1
        world.clock.after(self._lasts(), self._store_up)

    def _store_up(self) -> None:
        world = self._world
        if world.bucket.down:
            world.advance()
            world.bucket.down -= 1

    def _store_slow(self) -> None:
        world = self._world
        world.bucket.slow, world.changes = world.dice.uniform(2.0, 10.0), world.changes + 1
        world.clock.after(self._lasts(), lambda: setattr(world.bucket, "slow", 1.0))

    def _cut_supervisor_off(self) -> None:
        lasts_s = self._lasts()
        zombie.cut_off(self._world, lasts_s, back_after_s=self._about(self._world.swarm.restart_s))

    def _head_loss(self) -> None:
        """The head is gone, and every node with it; the machines are up again later, as a new cluster."""
        world = self._world
        back_s = self._about(HEAD_BACK_S)
        world.supervisor_dies(back_after_s=back_s)
        for node in list(world.nodes.values()):
            world.node_dies(node)
            world.clock.after(back_s, world.boot, node.machine)

    def _stop(self) -> None:
        world = self._world
        if world.supervisor is not None:
            world.changes += 1
            world.supervisor.post(StopRequested(world.clock.now, self._about(30.0), "somebody"))

    def _diverge(self) -> None:
        """Noticed some steps after it began."""
        world = self._world
        if (run := self._in_training()) is not None and world.supervisor is not None:
            done = run.steps(world.clock.now)
            world.changes += 1
            onset = max(run.began + 1, done - world.dice.randint(0, NOTICED_STEPS))
            world.supervisor.post(Diverged(world.clock.now, run.attempt, onset, "loss not finite", done, batch=8))

    def _corrupt(self) -> None:
        """Noticed some steps after the last time that all was well."""
        world = self._world
        if (run := self._in_training()) is not None and world.supervisor is not None:
            done = run.steps(world.clock.now)
            world.changes += 1
            good = max(run.began, done - world.dice.randint(1, NOTICED_STEPS))
            named = (world.dice.choice(run.members).id,) if len(run.members) > 2 else ()
            world.supervisor.post(Corrupted(world.clock.now, run.attempt, good, named, "replicas differ", done))

    def _in_training(self) -> Run | None:
        run = self._world.run
        return run if run is not None and run.doing is Doing.GOING and run.steps(self._world.clock.now) > run.began else None
