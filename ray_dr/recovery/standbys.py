"""Warm standbys: workers that are up beside the group, and take the places of those that are lost.

A job may have `standby_nodes` more nodes than its group, and `standby_processes` more processes than workers on each node of
the group. Nothing marks a worker as a standby: the group is formed of as many as it may have (`chosen`), and who is up and not
in it stands by. So a standby that took a place is a worker like any other, and what comes up in its stead stands by from then
on, wherever that is. The group never stops for it: only a larger group is worth that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_dr.model.recovery import Node, Policy, Running, State
from ray_dr.recovery.replicas import Domain, replicas

NAMED = 3
"""Standbys named in a reason; of more, only their number."""


def chosen(state: State, policy: Policy) -> tuple[str, ...]:
    """The workers of a next group, of those that are up and stay, in the order their nodes joined: as many as the job may have.

    Nodes with more workers come first, then those with more members of the newest group, then those that joined earlier; on a
    node, members of the newest group come first.
    """
    gone = frozenset([departure.node for departure in state.departures])
    if not policy.has_standbys:
        return tuple(worker for node in state.nodes if node.id not in gone for worker in node.ready)
    per_node, most = policy.workers_per_node, policy.nodes_max
    before = frozenset(state.order)
    taken = [
        (place, node.ready if len(node.ready) <= per_node else _first(node.ready, before, per_node))
        for place, node in enumerate(state.nodes) if node.ready and node.id not in gone
    ]  # fmt: skip
    if len(taken) > most:
        best = sorted(taken, key=lambda one: (-len(one[1]), -len(before.intersection(one[1])), one[0]))
        taken = sorted(best[:most])
    return tuple(worker for _, workers in taken for worker in workers)


def wanted_on(node: Node, state: State, policy: Policy, members: frozenset[str]) -> int:
    """Processes that a node should have. Those that stand by start only while a group runs, beside its members: a recovery
    needs the processor more."""
    beside = isinstance(state.phase, Running) and not members.isdisjoint(node.ready)
    return policy.workers_per_node + (policy.standby_processes if beside else 0)


def takers(before: Sequence[str], ranks: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(who takes a place, whose it was), for a next group in rank order that is no smaller than the one before."""
    if len(ranks) < len(before):
        return ()
    known = frozenset(before)
    return tuple((new, old) for old, new in zip(before, ranks, strict=False) if new not in known)


def in_words(taken: Sequence[tuple[str, str]]) -> str:
    """`a takes the place of b, c that of d`."""
    told = [f"{new} {'that' if at else 'takes the place'} of {old}" for at, (new, old) in enumerate(taken[:NAMED])]
    rest = [f"{len(taken) - NAMED} more take others'"] if len(taken) > NAMED else []
    return ", ".join([*told, *rest])


def keepers(domains: Mapping[str, Domain], copies: int, standing_by: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """As `replicas`, for nodes of which some only stand by: these make no copies, and keep those of the others first, so that
    what a lost node's ranks restore is there already.

    Each keeps at most as many as a node of the group has in all. It takes the place of the keeper that shares as much with the
    node as it does itself, or more: a copy in another failure domain is worth more than a warm one.
    """
    spare = [node for node in sorted(standing_by) if node in domains]
    ring = {node: domain for node, domain in domains.items() if node not in spare}
    found = dict(replicas(ring, copies))
    room = dict.fromkeys(spare, copies if copies > 1 else 0)
    for node in sorted(ring, key=lambda node: (domains[node], node)):
        for keeper in sorted((k for k in spare if room[k]), key=lambda k: (_shared(domains[k], domains[node]), -room[k], k)):
            warm = any(kept in room for kept in found[node])
            better = None if warm and len(found[node]) >= copies - 1 else _with(found[node], keeper, node, domains, copies)
            if better is not None:
                found[node] = better
                room[keeper] -= 1
    return {**found, **dict.fromkeys(spare, ())}


def _with(kept: tuple[str, ...], keeper: str, node: str, domains: Mapping[str, Domain],
          copies: int) -> tuple[str, ...] | None:  # fmt: skip
    """A node's keepers with a standby as the first, or None when that would bring a copy nearer to others."""
    if len(kept) < copies - 1:
        return (keeper, *kept)

    def near(one: str, others: Sequence[str]) -> int:
        return sum(_shared(domains[one], domains[other]) for other in (node, *others))

    for at in reversed(range(len(kept))):
        others = (*kept[:at], *kept[at + 1 :])
        if near(keeper, others) <= near(kept[at], others):
            return (keeper, *others)
    return None


def _first(ready: tuple[str, ...], before: frozenset[str], most: int) -> tuple[str, ...]:
    return tuple(sorted(ready, key=lambda worker: worker not in before)[:most])


def _shared(one: Domain, other: Domain) -> int:
    """Levels of domain that two nodes share; a level without a name is shared with nobody."""
    levels = 0
    for mine, its in zip(one, other, strict=False):
        if mine != its:
            break
        levels += mine != ""
    return levels
