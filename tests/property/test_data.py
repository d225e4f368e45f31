"""The order of samples, over random lengths, seeds and worlds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr.model.data import Order, micro_shares, permute, share


@pytest.mark.parametrize("length", range(1, 301))
def test_permute_is_a_bijection_for_every_small_length(length: int) -> None:
    assert sorted(Order(length, 7).indices(0, length)) == list(range(length))


@settings(max_examples=5, deadline=None)
@given(length=st.integers(301, 60_000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 100))
def test_permute_is_a_bijection_for_any_length(length: int, seed: int, epoch: int) -> None:
    found = Order(length, seed).indices(epoch * length, (epoch + 1) * length)
    assert len(found) == length == len(set(found))
    assert 0 <= min(found) <= max(found) < length


@settings(deadline=None)
@given(
    length=st.integers(2, 10**6),
    offsets=st.sets(st.integers(0, 10**6), min_size=2, max_size=200),
    seed=st.integers(-(2**64), 2**64),
)
def test_different_offsets_have_different_images(length: int, offsets: set[int], seed: int) -> None:
    inside = {offset % length for offset in offsets}
    assert len({permute(offset, length, seed, 3) for offset in inside}) == len(inside)


@settings(deadline=None)
@given(
    length=st.integers(1, 10**6) | st.integers(2**24, 2**40),
    seed=st.integers(-(2**70), 2**70),
    first=st.integers(0, 10**7),
    count=st.integers(0, 100),
    shuffle=st.booleans(),
)
def test_a_batch_of_indices_is_the_single_ones(length: int, seed: int, first: int, count: int, shuffle: bool) -> None:
    order = Order(length, seed, shuffle)
    assert order.indices(first, first + count) == [order.index(position) for position in range(first, first + count)]


@given(step=st.integers(0, 10**6), batch=st.integers(1, 500), world=st.integers(1, 40))
def test_shares_tile_the_batch_at_every_world_size(step: int, batch: int, world: int) -> None:
    slices = [share(step, global_batch=batch, rank=rank, world=world) for rank in range(world)]
    positions = [position for piece in slices for position in range(piece.first, piece.last)]
    assert positions == list(range(step * batch, (step + 1) * batch))
    assert sum(piece.weight for piece in slices) == pytest.approx(1)
    sizes = [piece.last - piece.first for piece in slices]
    assert max(sizes) - min(sizes) <= 1


@given(step=st.integers(0, 10**6), size=st.integers(1, 9), micro=st.integers(1, 40), world=st.integers(1, 20))
def test_micro_batches_in_the_order_round_rank_tile_the_batch(step: int, size: int, micro: int, world: int) -> None:
    batch = size * micro
    by_rank = [
        micro_shares(step, global_batch=batch, micro_batches=micro, rank=rank, world=world) for rank in range(world)
    ]
    rounds = list(zip(*by_rank, strict=True))
    used = [piece for round_ in rounds for piece in round_ if piece.weight]
    positions = [position for piece in used for position in range(piece.first, piece.last)]
    assert positions == list(range(step * batch, (step + 1) * batch))
    assert sum(piece.weight for piece in used) == pytest.approx(1)
