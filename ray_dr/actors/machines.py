"""Which machines the job leaves alone: those that jobs of its store had trouble with, and those it has just lost itself.

A *machine* is known by its host name and, where a node label has one, the cloud's instance id: both outlive Ray. Where
several Ray nodes live on one machine at once (a cluster for tests) each is a machine of its own, by its Ray id and so for
this cluster's life only.

A thread of its own talks to the store; the loop and those who look for nodes only read. A store that is away leaves a
machine's past unknown, and what is unknown is usable: that is said once each time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ray_dr.actors.cluster import RayNode
from ray_dr.errors import StoreError
from ray_dr.model.nodes import Charge, Entry
from ray_dr.model.recovery import FailureKind, Incident, Recovering, State
from ray_dr.model.signal import FaultKind
from ray_dr.recovery.lemons import Quarantine, Score, fault_of, quarantine, score
from ray_dr.telemetry.nodes import NodeBook, machine_name

if TYPE_CHECKING:
    from ray_dr.actors.host import Host

INSTANCE_LABELS = ("instance-id", "ray.io/instance-id", "node.kubernetes.io/instance-id")
REFRESH_S, RETRY_S = 60.0, 10.0
JUDGE_S = 5.0
FIRST_S = 2.0
"""The first choice of nodes waits so long for what the store knows."""
LOST_S = 600.0
"""So long a machine that was lost is taken again only when no other fits."""
AVOIDED_S, AVOIDED_MOST_S = 60.0, 1800.0
"""So long a machine that lives but is of no use is not taken at all; twice as long each time, and at most."""
CHARGES_MOST, NAMES_MOST = 64, 4096
DETAIL_CHARS = 200


class Machines:
    """`decided` is for the loop, `usable` for the thread that looks for nodes, `lost`, `avoid` and `condemn` for any."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._book = NodeBook(host.store, time.time)
        self._told: queue.Queue[Charge | None] = queue.Queue(CHARGES_MOST)
        self._mine: deque[Charge] = deque(maxlen=CHARGES_MOST)
        self._stored: tuple[Entry, ...] = ()
        self._asked = threading.Event()
        self._open: tuple[Incident, str] | None = None
        self._names: dict[str, str] = {}
        self._crowded: set[str] = set()
        self._lost_at: dict[str, float] = {}
        self._avoided: dict[str, tuple[float, float]] = {}
        """name -> (until when, for how long)"""
        self._condemned: deque[str] = deque(maxlen=CHARGES_MOST)
        self._slow: set[str] = set()
        self._verdict = Quarantine()
        self._judged: tuple[tuple[Entry, ...], tuple[Charge, ...], set[str]] = (), (), set()
        self._judged_at = -JUDGE_S
        self._thread = threading.Thread(target=self._run, name="machines", daemon=True)
        self._thread.start()

    @property
    def left_out(self) -> int:
        """Living machines that are large enough and not used."""
        now = time.monotonic()
        return len({*_names(self._verdict.out), *(name for name, (until, _) in tuple(self._avoided.items()) if now < until)})

    def decided(self, state: State) -> None:
        """An incident counts against the machine it began with once nothing can change its cause any more."""
        incident = state.phase.incident if isinstance(state.phase, Recovering) else None
        if self._open is not None and (incident is None or incident.number != self._open[0].number):
            self._charge(*self._open)
            self._open = None
        if incident is not None and (self._open is None or self._open[0] != incident):
            self._open = incident, node_of(incident, state)

    def suspect(self, node: str, kind: FaultKind, detail: str, share: float) -> None:
        """Something is held against a Ray node's machine that is no incident of its own: a share of the blame."""
        at = time.time()
        charge = Charge(self._names.get(node, machine_name(node)), kind, at, self._host.job.name,
                        f"{self._host.term}.{kind}.{int(at * 1000)}", detail[:DETAIL_CHARS], share)  # fmt: skip
        self._mine.append(charge)
        self._tell(charge)

    def lost(self, node: str) -> None:
        """A Ray node was lost or given back: while another fits, its machine is not taken again."""
        self._lost_at[self._names.get(node, node)] = time.monotonic()

    def avoid(self, node: str) -> None:
        """A Ray node that lives, and that Ray would give, is of no use: cut off from the others, or found bad before it began."""
        name = self._names.get(node, node)
        for_s = min(2 * self._avoided.get(name, (0.0, AVOIDED_S / 2))[1], AVOIDED_MOST_S)
        self._avoided[name] = time.monotonic() + for_s, for_s

    def condemn(self, node: str, kind: FaultKind, detail: str) -> None:
        """A Ray node is given up for what was found of it: that is held against its machine, and not its loss once more."""
        at = time.time()
        self._condemned.append(node)
        self.avoid(node)
        self._hold_against(node, kind, at, f"{kind}.{at:.3f}", detail)

    def hold_slow(self, node: str, detail: str) -> None:
        """A Ray node's rank was found to keep the others waiting: that is held against its machine, once."""
        if node and node not in self._slow:
            self._slow.add(node)
            self._hold_against(node, FaultKind.STRAGGLER, time.time(), f"{FaultKind.STRAGGLER}.{node[:16]}", detail)

    def usable(self, alive: Sequence[RayNode], fitting: Sequence[RayNode]) -> list[str]:
        """Ids of those fitting that may be used, machines just lost last; says who is left out when that changes."""
        self._asked.wait(FIRST_S)
        self._name(alive)
        present = {self._names[node.id] for node in fitting}
        now = time.monotonic()
        self._judge(present, now)
        out = _names(self._verdict.out) | {name for name, (until, _) in tuple(self._avoided.items()) if now < until}
        for name in [name for name, at in tuple(self._lost_at.items()) if now - at >= LOST_S]:
            del self._lost_at[name]
        good = [node.id for node in fitting if self._names[node.id] not in out]
        return sorted(good, key=lambda node: self._names[node] in self._lost_at or node in self._lost_at)

    def close(self, timeout_s: float) -> None:
        """Store what is still to be stored, for at most `timeout_s`."""
        if self._open is not None:
            self._charge(*self._open)
        self._tell(None)
        self._thread.join(timeout_s)

    def _judge(self, present: set[str], now: float) -> None:
        """The verdict anew when there is something new, and every JUDGE_S, as time goes on."""
        stored, mine = self._stored, tuple(self._mine)
        known = stored, mine, present
        if known == self._judged and now - self._judged_at < JUDGE_S:
            return
        self._judged, self._judged_at = known, now
        scores = score((*stored, *mine), present, time.time())
        verdict = quarantine(scores, present, self._host.policy.min_nodes_to_run)
        self._say(self._verdict, verdict)
        self._verdict = verdict

    # -- names and charges

    def _name(self, alive: Sequence[RayNode]) -> None:
        bare = {node.id: machine_name(node.host, _instance(node)) for node in alive}
        self._crowded |= {name for name, count in Counter(bare.values()).items() if count > 1}
        for node, name in bare.items():
            self._names[node] = machine_name(name, node) if name in self._crowded else name
        for node in [node for node in self._names if node not in bare][: max(0, len(self._names) - NAMES_MOST)]:
            del self._names[node]

    def _charge(self, incident: Incident, node: str) -> None:
        kind = fault_of(incident.kind)
        if kind is None or not node or (node in self._condemned and incident.kind is FailureKind.NODE_LOST):
            return
        self._hold_against(node, kind, incident.at, f"{incident.number}", incident.detail)

    def _hold_against(self, node: str, kind: FaultKind, at: float, number: str, detail: str) -> None:
        charge = Charge(self._names.get(node, machine_name(node)), kind, at, self._host.job.name,
                        f"{self._host.term}.{number}", detail[:DETAIL_CHARS])  # fmt: skip
        self._mine.append(charge)
        self._tell(charge)

    def _tell(self, item: Charge | None) -> None:
        try:
            self._told.put_nowait(item)
        except queue.Full:
            self._host.note("nodes.unknown", error="too much waits for the store", store=self._host.store.url)

    def _say(self, before: Quarantine, after: Quarantine) -> None:
        for name, told, new in (("quarantined", before.out, after.out), ("spared", before.spared, after.spared)):
            for one in new:
                if one.machine not in _names(told):
                    self._host.note(f"node.{name}", machine=one.machine, until=one.until, reason=one.reason)
        for one in before.out:
            if one.machine not in _names(after.out):
                self._host.note("node.released", machine=one.machine)

    # -- the store, in the thread

    def _run(self) -> None:
        waiting: deque[Charge] = deque(maxlen=CHARGES_MOST)
        away = closing = False
        while not closing:
            try:
                while waiting:
                    self._book.add(waiting[0])
                    waiting.popleft()
                self._stored = self._book.entries()
                away = False
            except StoreError as error:
                if not away:
                    self._host.note("nodes.unknown", error=str(error), store=self._host.store.url)
                away = True
            self._asked.set()
            closing = self._take(waiting, RETRY_S if away else REFRESH_S)

    def _take(self, waiting: deque[Charge], timeout_s: float) -> bool:
        """Wait for something to store; whether it is the end, and nothing is left."""
        try:
            item = self._told.get(timeout=timeout_s)
        except queue.Empty:
            return False
        if item is not None:
            waiting.append(item)
            return False
        for charge in waiting:
            try:
                self._book.add(charge)
            except StoreError:
                break
        return True


def node_of(incident: Incident, state: State) -> str:
    """The Ray node an incident began with; empty when it is about no node."""
    if incident.kind in (FailureKind.NODE_LOST, FailureKind.PREEMPTED):
        return incident.subject
    return next((node.id for node in state.nodes if incident.subject in (*node.lost, *node.ready)), "")


def _instance(node: RayNode) -> str:
    return next((node.labels[label] for label in INSTANCE_LABELS if node.labels.get(label)), "")


def _names(scores: Collection[Score]) -> set[str]:
    return {one.machine for one in scores}
