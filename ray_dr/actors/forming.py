"""From a decision to a running group: what is held where, who restores from what, and who keeps whose copies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_dr.actors import cluster
from ray_dr.actors.watch import Watch
from ray_dr.checkpoint.local_disk import life_name
from ray_dr.checkpoint.pace import first_cadence
from ray_dr.errors import ClusterError
from ray_dr.model import codec
from ray_dr.model.attempt import Assignment, Origin
from ray_dr.model.checkpoint import Held, VersionId
from ray_dr.model.events import InventoryTaken
from ray_dr.model.journal import Marked, Where
from ray_dr.model.recovery import Group
from ray_dr.recovery import standbys
from ray_dr.recovery.groups import group_of
from ray_dr.recovery.plan import choose_version, copies, stays_behind
from ray_dr.recovery.quarantine import usable, windows
from ray_dr.recovery.replicas import Domain
from ray_dr.telemetry.tiers import COPIES_KEPT

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

CALL_S = 10.0
SETTLE_S = 2.0
"""An inventory waits this long for parts that are being hashed right now."""
SEAL_S = 30.0
JOURNAL_S = 2.0
"""An attempt writes to the nodes' disks only when the store's journal knows of it: this long is waited for that."""


@dataclass(slots=True)
class AgentRef:
    """A living agent; `watch` is the open connection to it, `domain` where its node stands."""

    node: str
    handle: Any
    address: str
    watch: Watch
    domain: Domain = ()


@dataclass(slots=True)
class WorkerRef:
    """A worker process; `rendezvous` is known once it is ready."""

    worker: str
    node: str
    handle: Any
    rendezvous: str = ""
    attempt: int = 0
    step: int = 0
    running: bool = False
    rank: int = -1
    restore: VersionId | None = None
    world: int = 0
    reserves: bool = True
    """Whether it holds a share of the node for the job."""


class Forming:
    """Works on the performer's agents and workers. `began` is the version the newest group began from, `peers` how many
    copies of each part the newest group keeps on other nodes."""

    def __init__(self, host: Host, agents: dict[str, AgentRef], workers: dict[str, WorkerRef]) -> None:
        self._host, self._job = host, host.job
        self._agents, self._workers = agents, workers
        self.cadence = first_cadence(host.job)
        self.began: VersionId | None = None
        self.peers = 0
        self._on_disk: tuple[str, ...] = ()
        self._kept_in = 0
        self._kept: Mapping[str, tuple[str, ...]] = {}
        self._last_held: list[Held] = []
        self.unreadable: frozenset[VersionId] = frozenset()

    def refs(self, members: Iterable[str]) -> list[WorkerRef]:
        """Those that are there."""
        return [self._workers[worker] for worker in members if worker in self._workers]

    def take_inventory(self, incident: int, ask: int) -> None:
        """Tell the machine the newest version that can be restored."""
        held = self._held()
        stored = [manifest.version for manifest in self._host.saves.stored]
        rollbacks = self._host.state.rollbacks
        stored = [version for version in stored if usable(version, rollbacks)]
        good = [version for version in stored if version not in self.unreadable]
        fit = [item for item in held if item.version not in self.unreadable]
        newest = choose_version(fit, good[-1] if good else None, rollbacks)
        if newest is None:  # never from scratch while there is a version: trying an unreadable one again says what is wrong
            newest = choose_version(held, stored[-1] if stored else None, rollbacks)
        self._host.post(InventoryTaken(time.time(), incident, newest, ask))

    def form(self, group: Group) -> None:
        """Send every member its assignment. Raises ClusterError when one does not begin."""
        began = time.monotonic()
        self.began = group.restore
        origin = self._origin(group.restore) if group.restore else None
        if group_of(self._host.state) != group:
            return  # it broke meanwhile: agents must not let go of what the next one may begin from
        keep, behind = (codec.to_json(version) if version else None for version in (group.restore, self._behind(origin)))
        answers = cluster.gather([a.handle.begin.remote(keep, behind) for a in tuple(self._agents.values())], CALL_S)
        self.cadence = replace(self.cadence, from_step=0)
        refs = self.refs(group.members)
        if len(refs) != len(group.members):
            raise ClusterError("a member of the group is gone")
        assignments = self._assignments(group, refs, origin)
        calls = [ref.handle.start.remote(codec.to_json(a)) for ref, a in zip(refs, assignments, strict=True)]
        answers = cluster.gather(calls, CALL_S)
        if refused := [answer for answer in answers if answer is not True]:
            raise ClusterError(f"a member did not begin: {refused[0]!r}")
        self._host.journal.append(Marked(time.time(), group.attempt, "group_formed", time.monotonic() - began))

    def _behind(self, origin: Origin | None) -> VersionId | None:
        """The version to keep beside the one that a group begins from, for as long as that lacks copies; None: it has them, or
        there is none. One that survivors have just staged is nowhere else."""
        if origin is None or origin.parts or origin.second:
            return None
        return stays_behind(self._last_held, origin.version, self.expected_peers() + 1)

    def holds(self, version: VersionId) -> bool:
        """Whether every part of a version is in the agents' memory, hashed."""
        return choose_version([item for item in self._held() if item.version == version], None) == version

    def expected_peers(self) -> int:
        """Copies on other nodes that a group formed with the living agents keeps of each part."""
        return max(0, min(self._job.memory.copies, len(self._agents)) - 1)

    def _held(self) -> list[Held]:
        refs = [agent.handle.held.remote(SETTLE_S) for agent in tuple(self._agents.values())]
        held: list[Held] = []
        for answer in cluster.gather(refs, CALL_S):
            if not isinstance(answer, Exception):
                held += [codec.from_json(Held, item) for item in answer]
        return held

    def _origin(self, version: VersionId) -> Origin:
        """Where a version can be read. Waits until every part that was just staged is sealed."""
        stored = {where: depot.refs(version) for where, depot in self._host.saves.depots.items()}
        first, second = (stored.get(where, ()) for where in (Where.STORE, Where.SECOND))
        deadline = time.monotonic() + SEAL_S
        while True:
            self._last_held = self._held()
            held = [item for item in self._last_held if item.version == version]
            if first or second or choose_version(held, None) == version:
                break
            if time.monotonic() > deadline:
                raise ClusterError(f"nobody holds all of step {version.step} of attempt {version.attempt}")
            time.sleep(0.02)
        world = held[0].world if held else len(first or second)
        addresses = {node: agent.address for node, agent in tuple(self._agents.items())}
        in_memory, on_disk = (
            {
                str(rank): tuple(addresses[node] for node in nodes if node in addresses)
                for rank, nodes in copies(held, version, disk=disk).items()
            }
            for disk in (False, True)
        )
        return Origin(version, world, in_memory, first, on_disk, second)

    def _assignments(self, group: Group, refs: list[WorkerRef], origin: Origin | None) -> list[Assignment]:
        w = self._job.workers
        seen: dict[str, int] = {}
        agents = dict(self._agents)  # nodes come and go meanwhile
        self._on_disk = self._disk()
        keepers = self._keepers(group, refs, agents)
        left_out = windows(self._host.state.rollbacks)
        if left_out and not self._host.journal.flush(JOURNAL_S):
            what = "a supervisor that followed now would not know which samples are left out"
            self._host.note("journal.lagging", what=what)
        out = []
        for rank, ref in enumerate(refs):
            local = seen[ref.node] = seen.get(ref.node, -1) + 1
            out.append(
                Assignment(
                    self._job.name, group.attempt, ref.worker, rank, len(refs), local,
                    refs[0].rendezvous, agents[ref.node].address,
                    tuple(agents[node].address for node in keepers[ref.node]), origin, self.cadence,
                    self._job.backend, self._job.deterministic, self._job.seed, w.nodes_max * w.per_node,
                    self._job.store.url, dict(self._job.settings), self.terms(), self._on_disk,
                    self._job.second.url if self._job.second else "", sum(other.node == ref.node for other in refs),
                    left_out, self._job.health,
                )
            )  # fmt: skip
        return out

    def keep_anew(self, group: Group) -> None:
        """Nodes that stand by have come or gone while a group runs: its members are told who keeps their copies from now on."""
        refs, agents, before = self.refs(group.members), dict(self._agents), self._kept
        if len(refs) != len(group.members) or not agents.keys() >= {ref.node for ref in refs}:
            return  # it is about to break
        keepers = self._keepers(group, refs, agents)
        for ref in refs:
            if before.get(ref.node) != keepers[ref.node]:
                ref.handle.set_keepers.remote(group.attempt, [agents[node].address for node in keepers[ref.node]])

    def _keepers(self, group: Group, refs: list[WorkerRef], agents: dict[str, AgentRef]) -> Mapping[str, tuple[str, ...]]:
        """By node, those that keep copies of what a group's members save there."""
        working, leaving = {ref.node for ref in refs}, self._host.notices.leaving
        domains = {node: agent.domain for node, agent in agents.items() if node not in leaving or node in working}
        spare = [node for node in domains if node not in working] if self._job.workers.standby_nodes else []
        keepers = standbys.keepers(domains, self._job.memory.copies, spare)
        if (group.attempt, keepers) != (self._kept_in, self._kept):
            self.peers = max(map(len, keepers.values()), default=0)
            named = {node: list(on) for node, on in keepers.items()}
            self._host.note(COPIES_KEPT, attempt=group.attempt, peers=self.peers, keepers=named)
        self._kept_in, self._kept = group.attempt, keepers
        return keepers

    def terms(self) -> dict[str, int]:
        """The term in each place that the newest group may save to."""
        disk = {str(Where.DISK): self._host.term} if self._on_disk else {}
        return {**{str(where): depot.term for where, depot in self._host.saves.depots.items()}, **disk}

    def _disk(self) -> tuple[str, ...]:
        """The job's place on the nodes' disks; none in this attempt when the store's journal does not know of it yet: its
        number could be given out again after the loss of everything but the disks, and parts of two attempts be mixed."""
        place = self._host.disk
        if place and not self._host.journal.flush(JOURNAL_S):
            self._host.note("disk.unavailable", error="the journal does not reach the store", attempt=self._host.state.attempt)
            return ()
        return place


def disk_place(job: str, url: str, life: str) -> tuple[str, ...]:
    """(URL, the job's name there) of the local disks; empty without such a tier, or when the life can't be told."""
    return (url, life_name(job, life)) if url and life else ()


def domain_of(labels: dict[str, str]) -> Domain:
    """Region, zone and rack of a node by Ray's node labels."""
    return tuple(labels.get(label, "") for label in ("ray.io/availability-region", "ray.io/availability-zone", "rack"))


