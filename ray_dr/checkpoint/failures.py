"""How often a job loses what, measured from its own journal: a fold over records, and rates with a prior.

A loss is counted at the cheapest place that survived it: a process that dies on a living node leaves that node's memory,
a node that is lost leaves the copies in its peers' memory, and what takes all copies (the whole cluster, or as many
nodes as there are copies) leaves the store. Where the next group really read from outweighs what was seen to die.

Exposure is counted in node-seconds for the first two, as each node may fail, and in seconds of the job for the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

from ray_dr.model.actions import FormGroup
from ray_dr.model.events import Adopted, FirstStep, NodeLost
from ray_dr.model.journal import Decided, JobOpened, Noted, Record, Restored, Where
from ray_dr.model.recovery import FailureKind, Finished, Incident, Queued, Recovering, State, Suspended

DAY_S = 86_400.0
COUNTED = "losses.counted"
"""The note that holds a Tally, so that a later life need not read the whole journal."""


@dataclass(frozen=True, slots=True)
class Gamma:
    """A belief about a rate: `weight` of all beliefs, as if `seen` losses had been seen in `exposed_s` seconds."""

    weight: float
    seen: float
    exposed_s: float


NODE_PRIOR = (Gamma(0.99, 0.1, 20 * DAY_S), Gamma(0.01, 0.5, 0.5 * DAY_S))
"""Per node: 5 losses in 1000 node-days (Llama 3, arXiv 2407.21783: 3.8; Meta's RSC, arXiv 2410.21680: 2.3 and 6.5), held with
the strength of 20 node-days; and one chance in a hundred that these nodes are preempted or broken about every day. The
second is what lets a job on bad nodes learn that from a handful of losses instead of from weeks."""
ALL_PRIOR = (Gamma(0.95, 0.1, 3 * DAY_S), Gamma(0.05, 0.5, 0.5 * DAY_S))
"""Per job, for the loss of all copies in memory at once: about one a month (cancelled, moved, cluster gone), and one chance in
twenty that it is about one a day. Both are guesses, held with the strength of few days."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Losses per second; `seen` of them in `exposed_s` seconds of the job, or of its nodes (`per_node`) together."""

    per_s: float
    seen: int = 0
    exposed_s: float = 0.0
    per_node: bool = False

    def plus(self, other: Rate) -> Rate:
        """Losses of either sort; the exposure told is that of the one seen more often."""
        more = self if (self.seen, self.per_s) >= (other.seen, other.per_s) else other
        return Rate(self.per_s + other.per_s, self.seen + other.seen, more.exposed_s, more.per_node)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of losses that leave a node's own memory, that leave its peers' memory, and that leave only the store."""

    own: Rate
    peer: Rate
    store: Rate


@dataclass(frozen=True, slots=True)
class Tally:
    """Losses by what survived them, and the exposure, in seconds of nodes and of the job.

    running   at the end of what was folded a group was at work, or was about to be: had there been an end like that of a
              whole cluster, it would have been a loss
    """

    own: int = 0
    peer: int = 0
    store: int = 0
    node_s: float = 0.0
    job_s: float = 0.0
    running: bool = False


def measured_rate(prior: Iterable[Gamma], seen: int, exposed_s: float) -> float:
    """Losses per second to be expected after `seen` in `exposed_s` seconds: the posterior mean of a mixture of Gammas.

    Source: Gelman et al., Bayesian Data Analysis, 2.6 (Poisson with a Gamma prior); the weights follow the marginal
    (negative binomial) likelihood of what was seen.
    """
    beliefs = tuple(prior)
    logs = [
        math.log(g.weight) + math.lgamma(g.seen + seen) - math.lgamma(g.seen)
        + g.seen * math.log(g.exposed_s) - (g.seen + seen) * math.log(g.exposed_s + exposed_s)
        for g in beliefs
    ]  # fmt: skip
    weights = [math.exp(log - max(logs)) for log in logs]
    means = [(g.seen + seen) / (g.exposed_s + exposed_s) for g in beliefs]
    return sum(w * mean for w, mean in zip(weights, means, strict=True)) / sum(weights)


def rates(tally: Tally, nodes: int) -> Rates:
    """What a job on `nodes` nodes has to expect."""
    count = max(1, nodes)
    own, peer = (
        Rate(count * measured_rate(NODE_PRIOR, seen, tally.node_s), seen, tally.node_s, per_node=True)
        for seen in (tally.own, tally.peer)
    )
    return Rates(own, peer, Rate(measured_rate(ALL_PRIOR, tally.store, tally.job_s), tally.store, tally.job_s))


@dataclass(slots=True)
class Losses:
    """A fold over the records of one supervisor's life; `past` is the tally of the lives before, once it is known.

    Exposure runs from record to record while a group exists. A life that forms its first group from a checkpoint,
    instead of adopting a living one, shows that the life before ended with a loss.
    """

    past: Tally = Tally()
    nodes: int = 0
    _closed: Tally = Tally()
    _incident: int = 0
    _open: Where | None = None
    """What survived the loss that is being got over."""
    _reborn: Where | None = None
    """What survived the end of the life before, if it had one to lose."""
    _begun: bool = False
    _over: bool = False
    _read: set[str] = field(default_factory=set)
    _at: float | None = None
    _exposed: bool = False

    def add(self, record: Record) -> None:
        """Count what a record tells; most tell nothing."""
        match record:
            case Decided():
                self.until(record.at)
                self._decided(record)
            case Restored():
                self._read |= {kind for kind, size in record.sources.items() if size}
            case _:
                pass

    def until(self, now: float) -> None:
        """Nothing else happened up to `now` (UTC seconds)."""
        if self._at is not None and self._exposed and now > self._at:
            passed_s = now - self._at
            self._closed = _sum(self._closed, Tally(node_s=self.nodes * passed_s, job_s=passed_s))
        self._at = now if self._at is None else max(now, self._at)

    def tally(self) -> Tally:
        """All that was counted, with the lives before."""
        total = _sum(self.past, self._closed)
        if self._open is not None:
            total = _one_more(total, self._survived(self._open))
        if self._reborn is not None and self.past.running:
            total = _one_more(total, self._reborn)
        return replace(total, running=not self._over and (self._begun or self.past.running))

    def note(self) -> dict[str, object] | None:
        """The fields of a COUNTED note: a later fold may begin at it. None while a loss is being got over."""
        if self._open is not None or not self._exposed:
            return None
        return {**asdict(self.tally()), "nodes": self.nodes}

    @staticmethod
    def noted(note: Noted) -> Losses:
        """The fold that goes on from such a note; what it does not say in this form is nothing."""
        said = {name: value for name, value in note.fields.items() if isinstance(value, int | float)}
        own, peer, store, nodes = (max(0, int(said.get(name, 0))) for name in ("own", "peer", "store", "nodes"))
        node_s, job_s = (max(0.0, float(said.get(name, 0.0))) for name in ("node_s", "job_s"))
        tally = Tally(own, peer, store, node_s, job_s, bool(said.get("running", False)))
        return Losses(tally, nodes, _begun=tally.running, _at=note.at, _exposed=tally.running)

    def _decided(self, record: Decided) -> None:
        state, event = record.state, record.event
        self.nodes = len(state.nodes)
        self._exposed = self.nodes > 0 and not isinstance(state.phase, Queued | Suspended)
        self._over = isinstance(state.phase, Finished)
        incident = _incident_of(state)
        if incident is not None and incident.number != self._incident:
            self._settle()
            self._incident, self._open, self._read = incident.number, Where.MEMORY, set()
        if self._open is not None and (isinstance(event, NodeLost) or _took_a_node(incident)):
            self._open = Where.PEER
        for action in record.actions:
            if isinstance(action, FormGroup):
                if not self._begun and self._open is None and action.group.restore is not None:
                    self._reborn = Where.STORE
                self._begun, self._read = True, set()
        self._begun |= isinstance(event, Adopted)
        if isinstance(event, FirstStep):
            self._settle()

    def _settle(self) -> None:
        """A group is at work again: what survived is known."""
        if self._open is not None:
            self._closed, self._open = _one_more(self._closed, self._survived(self._open)), None
        elif self._reborn is Where.STORE and self._read and "store" not in self._read:
            self._reborn = Where.PEER
        self._read = set()

    def _survived(self, seemed: Where) -> Where:
        return Where.STORE if self._read & {"store", "second", "disk"} else seemed


def count_losses(records: Iterable[Record]) -> Tally:
    """The tally of a journal, or of its end from a COUNTED note on."""
    losses = Losses()
    for record in records:
        if isinstance(record, JobOpened):
            losses = Losses(losses.tally())
        elif isinstance(record, Noted) and record.name == COUNTED:
            losses = Losses.noted(record)
        losses.until(record.at)
        losses.add(record)
    return losses.tally()


def _incident_of(state: State) -> Incident | None:
    if isinstance(state.phase, Recovering | Suspended) and state.phase.incident is not None:
        return state.phase.incident if state.phase.incident.number > 0 else None
    return None


def _took_a_node(incident: Incident | None) -> bool:
    return incident is not None and incident.kind in (FailureKind.NODE_LOST, FailureKind.PREEMPTED)


def _one_more(tally: Tally, survived: Where) -> Tally:
    one = {Where.MEMORY: Tally(own=1), Where.PEER: Tally(peer=1)}.get(survived, Tally(store=1))
    return _sum(tally, one)


def _sum(a: Tally, b: Tally) -> Tally:
    return Tally(
        a.own + b.own, a.peer + b.peer, a.store + b.store, a.node_s + b.node_s, a.job_s + b.job_s, a.running or b.running
    )
