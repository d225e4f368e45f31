"""Who gets which rank when a next group forms, over any losses and arrivals."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.recovery import Node, Policy, Queued, State
from ray_dr.model.signal import node_of
from ray_dr.recovery.fleet import ranked

NODES = "abcd"
ALL = Policy(1, 4, 1, 4, 15.0, 300.0, 1.0, 5)
"""Takes everybody who is up."""
workers = st.tuples(st.sampled_from(NODES), st.integers(0, 3), st.integers(1, 2)).map(lambda w: f"{w[0]}/{w[1]}.{w[2]}")


@st.composite
def states(draw: st.DrawFn) -> State:
    """Any last group, and any workers that are up now, some of them of that group."""
    order = draw(st.lists(workers, unique=True, max_size=8))
    ready = draw(st.lists(workers, unique=True, max_size=8))
    ready = list(dict.fromkeys([*ready, *draw(st.lists(st.sampled_from(order), max_size=8))])) if order else ready
    joined = draw(st.permutations(NODES))
    nodes = tuple(Node(node, ready=tuple(worker for worker in ready if node_of(worker) == node)) for node in joined)
    return State(Queued(), nodes=nodes, order=tuple(order))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(states())
def test_everybody_who_is_up_has_one_rank_and_survivors_keep_theirs_or_at_least_their_order(state: State) -> None:
    ready = [worker for node in state.nodes for worker in node.ready]
    ranks = ranked(state, ALL)
    assert sorted(ranks) == sorted(ready)
    assert ranked(state, ALL) == ranks
    survivors = [worker for worker in state.order if worker in ready]
    if len(ready) >= len(state.order):
        assert all(ranks[state.order.index(worker)] == worker for worker in survivors)
    else:
        assert [worker for worker in ranks if worker in survivors] == survivors


@settings(max_examples=400, deadline=None, derandomize=True)
@given(states())
def test_no_newcomer_goes_elsewhere_while_a_place_of_its_own_node_goes_to_another_node(state: State) -> None:
    ranks = ranked(state, ALL)
    if len(ranks) < len(state.order):
        return
    taken = {place for place, worker in enumerate(state.order) if ranks[place] != worker}
    strange = {node_of(state.order[place]) for place in taken if node_of(ranks[place]) != node_of(state.order[place])}
    away = [
        ranks[place] for place in range(len(ranks))
        if ranks[place] not in state.order and (place >= len(state.order) or node_of(state.order[place]) != node_of(ranks[place]))
    ]  # fmt: skip
    assert not strange & {node_of(worker) for worker in away}


def test_a_new_node_takes_the_places_of_a_lost_one_together() -> None:
    nodes = (Node("a", ready=("a/0.1",)), Node("b", ready=("b/0.1", "b/1.1")), Node("d", ready=("d/0.1", "d/1.1")))
    state = State(Queued(), nodes=nodes, order=("a/0.1", "c/0.1", "c/1.1", "b/0.1", "b/1.1"))
    assert ranked(state, ALL) == ("a/0.1", "d/0.1", "d/1.1", "b/0.1", "b/1.1")
