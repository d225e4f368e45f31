"""What is kept beside a row of nodes says the same as a walk along it, of the newest row and of any older one."""

from __future__ import annotations

import random

from ray_dr.model.recovery import Node, Policy, Queued, State
from ray_dr.recovery.fleet import add, are_full, drop, end_worker, find, put, ready_workers, usable_nodes
from ray_dr.recovery.row import place_of

POLICY = Policy(1, 100, 1, 2, unwind_s=1.0, start_s=1.0, settle_s=1.0, attempts_without_progress=3)


def agrees(state: State) -> None:
    nodes = state.nodes
    assert usable_nodes(state) == len([node for node in nodes if node.ready])
    assert ready_workers(state) == tuple(worker for node in nodes for worker in node.ready)
    full = len([node for node in nodes if len(node.ready) >= POLICY.workers_per_node])
    assert [are_full(state, count, POLICY) for count in range(len(nodes) + 2)] == [
        full >= count for count in range(len(nodes) + 2)
    ]
    assert all(find(state, node.id) is node for node in nodes)
    assert find(state, "nobody") is None


def changed(state: State, dice: random.Random, number: int) -> State:
    if not state.nodes or dice.random() < 0.3:
        return add(state, Node(f"n{number}", starting=dice.randint(0, 2)))
    node = dice.choice(state.nodes)
    match dice.choice(("up", "up", "up", "down", "gone", "new")):
        case "up":
            return put(state, Node(node.id, 0, (*node.ready, f"{node.id}/0.{number}"), node.lost))
        case "down" if node.ready:
            return put(state, end_worker(node, dice.choice(node.ready)))
        case "gone":
            return drop(state, node.id)
        case _:
            return put(state, Node(f"m{number}"))


def test_a_row_is_known_as_if_it_had_been_walked_along() -> None:
    for seed in range(30):
        dice, states = random.Random(seed), [State(Queued())]
        for number in range(60):
            before = dice.choice(states) if dice.random() < 0.1 else states[-1]
            states.append(changed(before, dice, number))
            agrees(states[-1])
            agrees(dice.choice(states))


def test_two_jobs_of_one_process_do_not_share_what_is_known_of_their_empty_rows() -> None:
    one, other = State(Queued()), State(Queued())
    one, other = add(one, Node("a", ready=("a/0.1",))), add(other, Node("b"))
    for state in (one, other):
        agrees(state)
    assert find(one, "b") is None


def test_a_worker_is_found_in_a_row_that_is_in_another_order_too() -> None:
    order = tuple("abcdefgh")
    for row in (order, ("b", "e", "g"), ("g", "a", "e"), ()):
        assert [place_of(worker, row, order) for worker in "abcdefghz"] == [
            row.index(worker) if worker in row else None for worker in "abcdefghz"
        ]
