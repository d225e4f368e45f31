"""Action -> effect. Every action is idempotent, runs beside the loop, and its outcome comes back as an event."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, assert_never

from ray_dr.actors import cluster, deaths
from ray_dr.actors.adopting import Found, find_living
from ray_dr.actors.forming import AgentRef, Forming, WorkerRef, domain_of
from ray_dr.actors.peers import Ring
from ray_dr.actors.preflight import Preflight
from ray_dr.actors.rescuing import rescue
from ray_dr.actors.sensing import short
from ray_dr.actors.watch import Watch
from ray_dr.errors import CheckpointError, ClusterError, Fenced, StoreError
from ray_dr.model import codec
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
from ray_dr.model.attempt import Cadence
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import ActionFailed, NodeJoined, Saved, WorkerLost, WorkerReady, WorkerStopped
from ray_dr.model.journal import Where
from ray_dr.model.recovery import Group, Running, State

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

THREADS = 16
DISCOVER_S = 0.25
CALL_S = 10.0
STOP_AHEAD_S = 0.4
STOP_TRIES = 6
FINAL_RETRY_S = 1.0
SECOND_S = 60.0
"""The end waits so long for the second store, once the first has all."""
AGENT_START_S = 20.0
"""After so long an agent that has not come up no longer counts as a node to come."""


class Performer:
    """Holds the handles. Called by the loop; its threads only enqueue events."""

    def __init__(self, host: Host, train: bytes, token: bytes) -> None:
        self._host, self._train, self._token = host, train, token
        self._job = host.job
        self._state: State = host.state
        self._agents: dict[str, AgentRef] = {}
        self._workers: dict[str, WorkerRef] = {}
        self._coming: dict[str, float] = {}
        self._incarnation: dict[str, int] = {}
        self._ring, self._preflight = Ring(), Preflight(host)
        self._pool = ThreadPoolExecutor(THREADS, "perform")
        self._closing = threading.Event()
        self.forming = Forming(host, self._agents, self._workers)
        self.final: VersionId | None = None
        self._target = self._asked = 0
        self._kept_for: tuple[int, tuple[str, ...]] = 0, ()

    # -- what the loop asks

    def know(self, state: State) -> None:
        """The newest state, for threads that only read."""
        self._state = state
        if self._job.workers.standby_nodes and isinstance(state.phase, Running):
            seen = state.attempt, tuple(node.id for node in state.nodes)
            if seen != self._kept_for:
                self._kept_for = seen
                self._pool.submit(self.forming.keep_anew, state.phase.group)

    def node_of(self, worker: str) -> str | None:
        """The node of a worker, if it is known."""
        ref = self._workers.get(worker)
        return ref.node if ref else None

    def ended(self, worker: str) -> None:
        """A worker's connection closed. What Ray says of its end goes to the journal; then whatever is left of it goes, and its
        share of the node is free."""
        ref = self._workers.pop(worker, None)
        if ref is not None:
            deaths.ask(self._host, worker, ref.node, ref.handle, self._pool)

    def has(self, node: str) -> bool:
        """Whether a node's agent is one of the job's."""
        return node in self._agents

    def ack(self, node: str, last: int) -> None:
        """The journal is in the store up to here."""
        agent = self._agents.get(node)
        if agent is not None:
            agent.watch.ack(last)

    def tell_completed(self, version: VersionId) -> None:
        """Every agent may let go of what is older."""
        for agent in tuple(self._agents.values()):
            agent.handle.completed.remote(codec.to_json(version), self.forming.peers > 0)

    def tell_abandoned(self, version: VersionId, nodes: Iterable[str]) -> None:
        """A version will never be whole: these need not keep their parts of it."""
        for node in nodes:
            if (agent := self._agents.get(node)) is not None:
                agent.handle.abandoned.remote(codec.to_json(version))

    def tell_kept_on_disk(self, versions: Sequence[VersionId]) -> None:
        """Older ones may leave the nodes' disks."""
        for agent in tuple(self._agents.values()):
            agent.handle.keep_on_disk.remote([codec.to_json(version) for version in versions])

    @property
    def cadence(self) -> Cadence:
        """The one in force."""
        return self.forming.cadence

    def set_cadence(self, group: Group, cadence: Cadence) -> None:
        """Tell every member."""
        self.forming.cadence = cadence
        for ref in self.forming.refs(group.members):
            ref.handle.set_cadence.remote(group.attempt, codec.to_json(cadence))

    def tell_terms(self) -> None:
        """The workers of the group at work may save to one more place from now on."""
        for ref in self.forming.refs(self._state.order):
            ref.handle.set_terms.remote(self._state.attempt, self.forming.terms())

    def perform(self, action: Action) -> None:
        """Begin an action. What takes time runs in a thread; what fails comes back as ActionFailed."""
        match action:
            case StartWorkers(node, count):
                for _ in range(count):
                    self._start_worker(node)
            case RequestNodes(count):
                self._target = count
                self._later(action, self._ask_for_nodes)
            case ReleaseNode(node):
                self._drop_node(node)
            case AbortGroup(attempt, members):
                for ref in self.forming.refs(members):
                    aborted = ref.handle.abort.remote(attempt)
                    cluster.when_done(aborted, partial(self._aborted, ref.worker, attempt), self._pool)
            case KillWorker(worker):
                self._drop_worker(worker)
            case TakeInventory(incident, ask):
                self._later(action, lambda: self.forming.take_inventory(incident, ask))
            case FormGroup(group):
                self._host.begin(group)
                self._later(action, lambda: self.forming.form(group))
            case StopGroup(attempt, everywhere):
                self._later(action, lambda: self._stop(attempt, everywhere))
            case SaveFinal(attempt, step):
                self.final = VersionId(attempt, step)
                self._later(action, lambda: self._save_final(VersionId(attempt, step)))
            case Rescue():
                self._later(action, lambda: rescue(action, self._host, self.forming, self._agents))
            case CloseJob(outcome):
                if outcome == "fenced":
                    self._closing.set()
            case _:
                assert_never(action)

    def close(self) -> None:
        """End everything of this job. A fenced supervisor ends only what still listens to it: a newer one on the same cluster
        has taken the agents over (each listens to one supervisor), a newer one elsewhere wants none of them."""
        fenced = self._closing.is_set()
        self._closing.set()
        self._preflight.close()
        agents, workers = tuple(self._agents.values()), tuple(self._workers.values())
        for agent in agents:
            agent.watch.close()
        cluster.gather([agent.handle.close.remote() for agent in agents], CALL_S)
        if fenced:
            mine = {agent.node for agent in agents}
            doomed = [agent.handle for agent in agents] + [ref.handle for ref in workers if ref.node in mine]
        else:
            doomed = [cluster.actor(name) for name in cluster.actors_of(self._job.name)]
        for handle in doomed:
            cluster.kill(handle)
        cluster.request_nodes(0, self._job.workers)

    def give_up(self, version: VersionId) -> None:
        """A version of which no copy is whole is not restored again, and is struck from the commit logs."""
        self.forming.unreadable |= {version}
        for where, depot in self._host.saves.depots.items():
            self._pool.submit(self._guarded, where, partial(depot.strike, version))

    def prune(self, where: Where) -> None:
        """Apply a store's retention."""
        self._guarded(where, self._host.saves.depots[where].prune)

    def _guarded(self, where: Where, effect: Callable[[], None]) -> None:
        try:
            effect()
        except (StoreError, CheckpointError, Fenced) as error:
            self._host.note(f"{where}.unavailable", error=str(error), store=self._host.saves.depots[where].store.url)

    def find_living(self) -> Found:
        """Agents and workers that outlived a supervisor."""
        return find_living(self._host, self._agents, self._workers, self._join, self.forming)

    # -- nodes

    def discover(self) -> None:
        """Start looking for nodes, for as long as the job lives."""
        threading.Thread(target=self._discover, name="discover", daemon=True).start()

    def _discover(self) -> None:
        while not self._closing.wait(DISCOVER_S):
            try:
                self._host.notices.ask_ray()
                for node in self._wanted_nodes():
                    self._start_agent(node)
                self._ask_for_nodes()
                self._host.head_heard_at = time.monotonic()
            except Exception as error:
                self._host.note("cluster.unreachable", error=repr(error))

    def _ask_for_nodes(self) -> None:
        """Ask for the minimum first and then for one node more than there are: the autoscaler launches nothing at all for a
        request that is larger than its cluster may become."""
        fitting = [node.id for node in cluster.nodes() if cluster.fits(node, self._job.workers)]
        alive, left_out = len(fitting), self._host.machines.left_out + len(self._host.notices.leaving & set(fitting))
        count = min(self._target + left_out, max(self._job.workers.nodes_min, alive + 1))
        if self._target and count != self._asked:
            cluster.request_nodes(count, self._job.workers)
            self._asked = count

    def _wanted_nodes(self) -> Iterable[str]:
        """Living nodes without an agent, as many as the job still wants. An agent that does not come up (a node that Ray
        does not yet know to be dead) gives its place away after AGENT_START_S, at once when the node was lost before. Bad
        machines are left out; one that was just lost is taken only while no other fits."""
        now = time.monotonic()
        pending = sum(now - since < AGENT_START_S for since in self._coming.values())
        leaving = self._host.notices.leaving
        room = self._host.policy.nodes_wanted - len([node for node in tuple(self._agents) if node not in leaving]) - pending
        alive = cluster.nodes()
        fitting = [node for node in alive if cluster.fits(node, self._job.workers) and node.id not in leaving]
        usable = self._host.machines.usable(alive, fitting)
        free = [node for node in usable if node not in self._agents and node not in self._coming]
        return free[: max(0, room)]

    def _start_agent(self, node: str) -> None:
        number = self._incarnation[node] = self._incarnation.get(node, 0) + 1
        before = number > 1
        self._coming[node] = time.monotonic() - (AGENT_START_S if before else 0.0)
        second_url = self._job.second.url if self._job.second else ""
        name = f"{node}:{self._host.term}.{number}"
        handle = cluster.start_agent(self._job.name, name, node, self._job.store.url, self._token, self._host.disk, second_url,
                                     self._job.recovery.notices)  # fmt: skip
        cluster.when_done(handle.describe.remote(), lambda future: self._agent_up(node, handle, future), self._pool)

    def _agent_up(self, node: str, handle: Any, future: Future[Any]) -> None:
        try:
            self._join(node, handle, future.result())
        except Exception as error:
            self._host.note("agent.failed", node=node, error=repr(error))
            return
        finally:  # not before it is known: else the next look around would start another one
            self._coming.pop(node, None)
        self._host.post(NodeJoined(time.time(), node))

    def _join(self, node: str, handle: Any, said: dict[str, Any]) -> None:
        watch = Watch(node, said["address"], self._token, silent_s=self._job.recovery.silent_s, heard=self._host.heard,
                      overhead=self._job.overhead, rpo_s=self._job.rpo_s, lost=self._node_lost)  # fmt: skip
        self._agents[node] = AgentRef(node, handle, said["address"], watch, domain_of(said["labels"]))
        self._introduce()
        self._preflight.came(node, handle, said["address"])

    def _introduce(self) -> None:
        """Who asks whom for signs of life, now that a node came or went."""
        agents = {short(agent.node): agent for agent in tuple(self._agents.values())}
        addresses = {name: agent.address for name, agent in agents.items()}
        self._ring.close_up(addresses, lambda name, asks: agents[name].handle.ask_peers.remote(asks))

    def lose_node(self, node: str, how: str) -> None:
        """A node is taken for lost although its connection stands."""
        if (agent := self._agents.get(node)) is not None:
            agent.watch.close()
            self._node_lost(node, how)

    def _node_lost(self, node: str, how: str) -> None:
        agent = self._agents.pop(node, None)
        self._host.machines.lost(node)
        self._host.lost(node, how)
        if agent is not None:
            self._preflight.went(node)
            self._introduce()
            self._pool.submit(self._bury, agent, self._workers_on(node))

    def _workers_on(self, node: str) -> list[str]:
        return [ref.worker for ref in tuple(self._workers.values()) if ref.node == node]

    def _bury(self, agent: AgentRef, workers: Iterable[str]) -> None:
        """What is left of a lost node must not come back: end its agent and workers, should they still live."""
        cluster.kill(agent.handle)
        for worker in workers:
            self._drop_worker(worker)

    def _drop_node(self, node: str) -> None:
        self._host.machines.lost(node)
        agent = self._agents.pop(node, None)
        if agent is not None:
            agent.watch.close()
            self._preflight.went(node)
            self._introduce()
            self._bury(agent, self._workers_on(node))

    # -- workers

    def _start_worker(self, node: str) -> None:
        agent = self._agents.get(node)
        if agent is None:
            return  # the node was lost meanwhile, and its loss is in the mailbox
        number = self._incarnation[f"worker {node}"] = self._incarnation.get(f"worker {node}", 0) + 1
        worker = f"{node[:8]}{node[-5:]}/{self._host.term}.{number}"
        shares = sum(ref.reserves for ref in tuple(self._workers.values()) if ref.node == node)
        reserves = shares < self._job.workers.per_node
        handle = cluster.start_worker(
            self._job, worker, node, agent.address, self._token, self._train, reserves=reserves
        )
        self._workers[worker] = WorkerRef(worker, node, handle, reserves=reserves)
        cluster.when_done(handle.describe.remote(), lambda future: self._worker_up(worker, node, future), self._pool)

    def _worker_up(self, worker: str, node: str, future: Future[Any]) -> None:
        try:
            said = future.result()
        except Exception as error:
            self._drop_worker(worker)
            self._host.post(
                WorkerLost(time.time(), worker, node, f"it did not start: {error}"[:300], self._host.progress.step)
            )
            return
        if (ref := self._workers.get(worker)) is None:
            return  # it was told to end, or has ended, meanwhile
        ref.rendezvous = said["rendezvous"]
        self._host.post(WorkerReady(time.time(), worker, node))

    def _drop_worker(self, worker: str) -> None:
        ref = self._workers.pop(worker, None)
        if ref is not None:
            cluster.kill(ref.handle)

    # -- groups

    def _aborted(self, worker: str, attempt: int, answer: Future[Any]) -> None:
        """One that had not been sent into the attempt yet has nothing to leave, and says nothing of its own accord."""
        if answer.exception() is None and answer.result() is False:
            self._host.post(WorkerStopped(time.time(), worker, attempt, self._host.progress.began))

    def _stop(self, attempt: int, everywhere: bool) -> None:
        """Find a step that no member has done yet, and have all stop there."""
        state = self._state
        members = self.forming.refs(state.order)
        ahead = max(1, round(STOP_AHEAD_S / max(self._host.pace.step_s, 1e-3)))
        target = self._host.progress.newest + ahead
        for _ in range(STOP_TRIES):
            answers = cluster.gather([ref.handle.stop_at.remote(attempt, target, everywhere) for ref in members], CALL_S)
            steps = [answer for answer in answers if isinstance(answer, int)]
            if len(steps) < len(members) or min(steps) < 0:
                raise ClusterError("a member could not be asked to stop")
            if max(steps) < target:
                return
            target = max(steps) + ahead
        raise ClusterError("the members are too fast to agree on a step")

    def _save_final(self, version: VersionId) -> None:
        """The parts are on their way; whatever a store refused is put again until it is committed. The second store has
        SECOND_S more."""
        begun = alone = time.monotonic()
        while missing := self._missing(self._ended_at(version)):
            now = time.monotonic()
            alone = now if Where.STORE in missing else alone
            if now - begun > self._job.recovery.start_s and Where.STORE in missing:
                raise ClusterError(f"step {version.step} could not be committed in time")
            if now - alone > SECOND_S:
                self._host.note("second.unavailable", error=f"step {version.step} could not be committed in time")
                break
            if self._closing.wait(FINAL_RETRY_S):
                return
            wanted = self._ended_at(version)
            to = {str(where): (self._job.name, self._host.saves.depots[where].term) for where in self._missing(wanted)}
            orphans = self._host.saves.complete.orphans(wanted, set(self._agents))
            for agent in tuple(self._agents.values()):
                agent.handle.store_again.remote(codec.to_json(wanted), to, sorted(orphans))
        self._host.post(Saved(time.time(), version.attempt, version.step))

    def _missing(self, version: VersionId) -> list[Where]:
        return [where for where, depot in self._host.saves.depots.items() if not depot.refs(version)]

    def _ended_at(self, version: VersionId) -> VersionId:
        """What is to be in every store: `version`; or, when its group had no step left to do (a finished job, run again) and
        has staged nothing, as no store lacks what it began from, that."""
        idle = self._host.progress.newest == self._host.progress.began
        staged = self._host.saves.complete.nodes(version, Where.MEMORY)
        return self.forming.began if idle and not staged and self.forming.began is not None else version

    def _later(self, action: Action, effect: Callable[[], None]) -> None:
        def run() -> None:
            try:
                effect()
            except Exception as error:
                self._host.post(ActionFailed(time.time(), type(action).__name__, str(error)[:300], _subject(action)))

        self._pool.submit(run)


def _subject(action: Action) -> str:
    """The node, the worker or the attempt that an action is about; empty for others."""
    match action:
        case StartWorkers(node, _) | ReleaseNode(node):
            return node
        case KillWorker(worker):
            return worker
        case FormGroup(group):
            return str(group.attempt)
        case StopGroup(attempt) | SaveFinal(attempt) | Rescue(attempt):
            return str(attempt)
        case _:
            return ""
