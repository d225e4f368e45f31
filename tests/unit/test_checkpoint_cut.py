"""Chunks follow the tensors: what changes in one is all that is cut anew, hashed and sent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from ray_dr.checkpoint import sealing
from ray_dr.checkpoint.cut import OWN_BYTES, PAGE_BYTES, blocks, clear_gaps, cut, joined, place
from ray_dr.checkpoint.save_plan import plan_save, replicated
from ray_dr.checkpoint.sealing import PARTS_KEPT, Same, Sealer
from ray_dr.model.checkpoint import ALIGNMENT, CHUNK_BYTES, Box, Part, Shard, VersionId
from ray_dr.train.staging import Planner, stage
from ray_dr.train.state import flatten

SIZES = st.integers(0, 300) | st.integers(0, OWN_BYTES + 10) | st.integers(OWN_BYTES - 1, 3 * CHUNK_BYTES)


def shard(at: int, size: int) -> Shard:
    return Shard(Box("t", "uint8", (size,), (0,), (size,)), at)


def laid_out(sizes: list[int]) -> tuple[tuple[Shard, ...], int]:
    plan = plan_save([replicated(f"t{i:04d}", "uint8", (n,), rank=0, world=1) for i, n in enumerate(sizes)], rank=0, world=1)
    return plan.shards, plan.size


@given(st.lists(SIZES, max_size=30))
def test_a_large_tensor_shares_no_chunk_and_small_ones_share_those_of_half_a_megabyte(sizes: list[int]) -> None:
    shards, size = laid_out(sizes)
    runs = cut(shards, size)
    assert sum(length for _, length in runs) == size
    assert all(at + length == following for (at, length), (following, _) in pairwise(runs))
    for at, length in runs:
        inside = _inside(shards, at, at + length)
        assert at % PAGE_BYTES == 0
        assert 0 < length <= CHUNK_BYTES
        assert len(inside) == 1 or length < OWN_BYTES + PAGE_BYTES
    padding = size - sum(sizes)
    assert padding <= sum(n >= OWN_BYTES for n in sizes) * PAGE_BYTES + len(sizes) * ALIGNMENT + len(runs) * PAGE_BYTES


@given(st.lists(st.tuples(st.integers(0, 2 * OWN_BYTES), SIZES), max_size=12), st.integers(0, CHUNK_BYTES))
def test_chunks_tile_a_stream_wherever_its_boxes_lie(boxes: list[tuple[int, int]], behind: int) -> None:
    shards, end = [], 0
    for gap, size in boxes:
        shards.append(shard(end + gap, size))
        end += gap + size
    runs = cut(reversed(shards), end + behind)
    assert [at for at, _ in runs] == [sum(length for _, length in runs[:i]) for i in range(len(runs))]
    assert sum(length for _, length in runs) == end + behind
    assert all(0 < length <= CHUNK_BYTES for _, length in runs)


@given(st.lists(SIZES, max_size=60) | st.lists(st.sampled_from((1, 300_000, OWN_BYTES - 1)), min_size=20, max_size=60))
def test_blocks_are_the_chunks_that_small_tensors_share_side_by_side(sizes: list[int]) -> None:
    shards, size = laid_out(sizes)
    found = blocks(shards, size)
    assert tuple(span for block in found for span in block) == cut(shards, size)
    for block in found:
        at, length = joined(block)
        assert (at, at + length) == (block[0][0], sum(block[-1]))
        assert length <= CHUNK_BYTES
        assert len(block) == 1 or not any(s.box.size >= OWN_BYTES for s in _inside(shards, at, at + length))
    for block, following in pairwise(found):
        together = (block[0][0], sum(following[0]))
        if not any(s.box.size >= OWN_BYTES for s in _inside(shards, *together)):
            assert together[1] - together[0] > CHUNK_BYTES  # it does not fit


def _inside(shards: tuple[Shard, ...], first: int, end: int) -> list[Shard]:
    return [s for s in shards if s.box.size and s.at < end and first < s.at + s.box.size]


def test_boxes_that_lie_anyhow_are_in_blocks_that_tile_the_stream() -> None:
    """An empty box at the place of a large one, a gap before the first, bytes behind the last."""
    big = 2 * CHUNK_BYTES
    for shards in ([shard(0, big), shard(0, 0)], [shard(0, 0), shard(0, big)], [shard(big, 5)], [shard(0, 5)], []):
        found = blocks(shards, 2 * big)
        assert [block[0][0] for block in found] == list(range(0, 2 * big, CHUNK_BYTES))
        assert all(block[0][1] == CHUNK_BYTES for block in found)


def test_a_tensor_has_the_same_chunks_wherever_it_lies() -> None:
    """As after a change of the world size, when other tensors lie before it."""
    big = 2 * CHUNK_BYTES + 4096
    for before in ([], [OWN_BYTES + 1], [17, CHUNK_BYTES, OWN_BYTES]):
        shards, size = laid_out([*before, big, OWN_BYTES])
        (mine,) = (s for s in shards if s.box.size == big)
        found = [(at - mine.at, n) for at, n in cut(shards, size) if mine.at <= at < mine.at + big]
        assert found == [(0, CHUNK_BYTES), (CHUNK_BYTES, CHUNK_BYTES), (2 * CHUNK_BYTES, 4096)]


def test_tied_tensors_are_cut_once() -> None:
    assert cut([shard(0, OWN_BYTES), shard(0, OWN_BYTES)], OWN_BYTES) == ((0, OWN_BYTES),)
    assert cut([], 0) == ()
    assert place(100, None, 5) == (4096, 4096)
    assert place(4106, 4096, OWN_BYTES) == (8192, None)


def test_what_lay_in_a_slot_before_does_not_change_a_chunk() -> None:
    state = {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate((OWN_BYTES + 5, 3, 70))}
    flat = flatten({"o": _Held(state)}, rank=0, world=1)
    plan = Planner(0, 1).plan(flat)
    clean, used = bytearray(plan.size), bytearray(b"\xff" * plan.size)
    for slot in (clean, used):
        stage(plan, flat, memoryview(slot))
    assert clean == used


def test_gaps_are_cleared_and_nothing_else() -> None:
    stream = bytearray(b"x" * 20)
    clear_gaps([shard(2, 3), shard(2, 3), shard(8, 4)], memoryview(stream))
    assert stream == b"\0\0xxx\0\0\0" + b"x" * 12


# -------------------------------------------------------------------------------------------------------------- sealing


class Counted:
    """Counts the bytes that are hashed, and those of which a fingerprint is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashed = self.printed = 0
        self._blake3, self._print = sealing.blake3, sealing.xxhash.xxh3_128_digest
        monkeypatch.setattr(sealing, "blake3", self._hash)
        monkeypatch.setattr(sealing.xxhash, "xxh3_128_digest", self._fingerprint)

    def _hash(self, data: memoryview, **options: Any) -> Any:
        self.hashed += len(data)
        return self._blake3(data, **options)

    def _fingerprint(self, data: memoryview) -> bytes:
        self.printed += len(data)
        return bytes(self._print(data))

    def seal(self, sealer: Sealer, part: Part, stream: bytearray, same: Same = None) -> tuple[int, int]:
        """(bytes hashed, bytes fingerprinted); the names must be right."""
        self.hashed = self.printed = 0
        for chunk, piece in sealer.seal(part, memoryview(stream), same=same):
            assert chunk.id == blake3(stream[chunk.at : chunk.at + chunk.size]).hexdigest()
            assert bytes(piece) == stream[chunk.at : chunk.at + chunk.size]
        return self.hashed, self.printed


SHARDS = tuple(shard(number * OWN_BYTES, OWN_BYTES) for number in range(4))
ALL = 4 * OWN_BYTES
PART = Part(VersionId(1, 1), 0, 1, ALL, SHARDS, ())


def test_what_did_not_change_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, sealer, stream = Counted(monkeypatch), Sealer(), bytearray(ALL)
    assert counted.seal(sealer, PART, stream) == (ALL, ALL)
    assert counted.seal(sealer, PART, stream) == (0, ALL)
    stream[OWN_BYTES] ^= 1
    assert counted.seal(sealer, PART, stream) == (OWN_BYTES, ALL)
    assert counted.seal(sealer, PART, stream) == (OWN_BYTES, ALL)  # it stands still again: known by its name
    assert counted.seal(sealer, PART, stream) == (0, ALL)


def test_what_always_changes_is_only_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, sealer, stream = Counted(monkeypatch), Sealer(), bytearray(ALL)
    counted.seal(sealer, PART, stream)
    for number in range(1, 5):
        for at in range(0, ALL, OWN_BYTES):
            stream[at] = number
        assert counted.seal(sealer, PART, stream) == (ALL, ALL if number == 1 else 0)


def test_what_the_worker_says_is_the_same_is_not_looked_at_if_the_part_before_is_the_one_it_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted, sealer, stream = Counted(monkeypatch), Sealer(), bytearray(ALL)
    step = [replace(PART, version=VersionId(1, number)) for number in range(5)]
    counted.seal(sealer, step[1], stream)
    middle = ((OWN_BYTES, 3 * OWN_BYTES),)
    assert counted.seal(sealer, step[2], stream, same=(step[1].version, middle)) == (0, 2 * OWN_BYTES)
    assert counted.seal(sealer, step[3], stream, same=(step[1].version, middle)) == (0, ALL), "step 2 was between"
    crooked = ((0, OWN_BYTES - 1), (OWN_BYTES + 1, 3 * OWN_BYTES), (3 * OWN_BYTES, ALL))
    assert counted.seal(sealer, step[4], stream, same=(step[3].version, crooked)) == (0, 2 * OWN_BYTES)
    ids = [chunk.id for chunk, _ in sealer.seal(step[0], memoryview(stream), same=(step[4].version, ((0, ALL),)))]
    assert ids == [blake3(stream[:OWN_BYTES]).hexdigest()] * 4


def test_another_cut_and_another_rank_take_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, sealer, stream = Counted(monkeypatch), Sealer(), bytearray(ALL)
    counted.seal(sealer, PART, stream)
    assert counted.seal(sealer, Part(VersionId(1, 2), 1, 2, ALL, SHARDS, ()), stream)[0] == ALL
    wider = (shard(0, ALL),)
    assert counted.seal(sealer, Part(VersionId(1, 3), 0, 1, ALL, wider, ()), stream)[0] == ALL


def test_a_seal_that_was_given_up_takes_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, sealer, stream = Counted(monkeypatch), Sealer(), bytearray(ALL)
    counted.seal(sealer, PART, stream)
    next(sealer.seal(PART, memoryview(stream)))
    assert counted.seal(sealer, PART, stream) == (0, ALL)


def test_threads_give_the_same_chunks_in_order() -> None:
    stream = memoryview(bytearray(range(256)) * (SMALL.size // 256))
    with ThreadPoolExecutor(3) as pool:
        for part in (PART, SMALL):
            assert [c for c, _ in Sealer().seal(part, stream, pool)] == [c for c, _ in Sealer().seal(part, stream)]


EACH = OWN_BYTES // 2
"""Two such boxes share a chunk, sixteen such chunks are a block."""
PER_BLOCK = CHUNK_BYTES // OWN_BYTES
SMALL = Part(VersionId(1, 1), 0, 1, 2 * CHUNK_BYTES, tuple(shard(n * EACH, EACH) for n in range(4 * PER_BLOCK)), ())
FINE = [(at, OWN_BYTES) for at in range(0, SMALL.size, OWN_BYTES)]
BLOCKS = [(0, CHUNK_BYTES), (CHUNK_BYTES, CHUNK_BYTES)]


class Small:
    """A state all of which is small tensors, sealed by one process again and again."""

    def __init__(self) -> None:
        self.stream, self._sealer = bytearray(SMALL.size), Sealer()
        self._names: set[str] = set()
        self.spans: list[tuple[int, int]] = []
        self.new = 0

    def change(self, *boxes: int, within: int = 0) -> None:
        """Change one byte in each of the first page of boxes."""
        for box in boxes:
            self.stream[box * EACH + within] = (self.stream[box * EACH + within] + 1) % 256

    def seal(self) -> Small:
        """Then `spans` are the chunks, and `new` the bytes of those that the save before had not named."""
        found = [chunk for chunk, _ in self._sealer.seal(SMALL, memoryview(self.stream))]
        for chunk in found:
            assert chunk.id == blake3(self.stream[chunk.at : chunk.at + chunk.size]).hexdigest()
        self.spans = [(chunk.at, chunk.size) for chunk in found]
        self.new = sum(chunk.size for chunk in found if chunk.id not in self._names)
        self._names = {chunk.id for chunk in found}
        return self


ALL_BOXES = range(4 * PER_BLOCK)


def test_small_tensors_that_all_change_are_sent_in_large_chunks() -> None:
    state = Small().seal()
    assert state.spans == FINE
    for _ in range(3):
        state.change(*ALL_BOXES)
        assert state.seal().spans == BLOCKS
    state.seal()
    assert (state.spans, state.new) == (BLOCKS, 0)


@pytest.mark.parametrize("within", [0, 3, 7])
def test_a_change_of_any_byte_at_the_start_of_a_page_tells_of_it(within: int) -> None:
    """Adding 1.0 to a float32 may change its third and fourth byte only."""
    state = Small().seal()
    state.change(*ALL_BOXES, within=within)
    assert state.seal().spans == BLOCKS


def test_a_block_is_cut_finely_where_not_all_of_it_changes() -> None:
    state = Small()
    state.change(*ALL_BOXES)
    state.seal()
    state.change(*ALL_BOXES[2 * PER_BLOCK :], 3)
    assert state.seal().spans == FINE[:PER_BLOCK] + BLOCKS[1:]
    assert state.new == OWN_BYTES + CHUNK_BYTES
    state.change(3)
    assert (state.seal().spans, state.new) == (FINE[:PER_BLOCK] + BLOCKS[1:], OWN_BYTES)  # nothing else is sent again
    state.change(2 * PER_BLOCK)
    assert state.seal().spans == FINE
    state.change(2 * PER_BLOCK)
    assert (state.seal().spans, state.new) == (FINE, OWN_BYTES)


def test_a_change_that_leaves_no_trace_is_sent_all_the_same() -> None:
    state = Small()
    for _ in range(2):
        state.seal()
        state.change(*ALL_BOXES)
    assert state.seal().spans == BLOCKS
    state.change(5, within=PAGE_BYTES // 2)
    assert state.seal().spans == FINE[:PER_BLOCK] + BLOCKS[1:]
    state.change(5, within=PAGE_BYTES // 2)
    assert (state.seal().spans, state.new) == (FINE[:PER_BLOCK] + BLOCKS[1:], OWN_BYTES)


def test_what_the_worker_says_is_the_same_is_not_looked_at_in_large_chunks_and_fine_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, sealer, stream = Counted(monkeypatch), Sealer(), bytearray(SMALL.size)
    step = [replace(SMALL, version=VersionId(1, number)) for number in range(6)]
    counted.seal(sealer, step[0], stream)
    for at in range(0, SMALL.size, OWN_BYTES):
        stream[at] = 1
    assert counted.seal(sealer, step[1], stream) == (SMALL.size, 0)
    everything = ((0, SMALL.size),)
    assert counted.seal(sealer, step[2], stream, (step[1].version, everything)) == (0, 0)
    stream[OWN_BYTES] = 2
    but_one = ((0, OWN_BYTES), (2 * OWN_BYTES, SMALL.size))
    assert counted.seal(sealer, step[3], stream, (step[2].version, but_one)) == (CHUNK_BYTES, CHUNK_BYTES)  # cut finely now
    stream[OWN_BYTES] = 3
    assert counted.seal(sealer, step[4], stream, (step[3].version, but_one)) == (OWN_BYTES, OWN_BYTES)
    assert counted.seal(sealer, step[5], stream, (step[3].version, everything))[1] == SMALL.size  # step 4 was between


def test_what_changes_in_large_chunks_is_only_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, sealer, stream = Counted(monkeypatch), Sealer(), bytearray(SMALL.size)
    counted.seal(sealer, SMALL, stream)
    for number in range(1, 4):
        for at in range(0, SMALL.size, OWN_BYTES):
            stream[at] = number
        assert counted.seal(sealer, SMALL, stream) == (SMALL.size, 0)
    assert counted.seal(sealer, SMALL, stream) == (SMALL.size, SMALL.size)
    assert counted.seal(sealer, SMALL, stream) == (0, SMALL.size)


def test_the_ranks_remembered_have_a_limit() -> None:
    sealer = Sealer()
    for rank in range(PARTS_KEPT + 3):
        list(sealer.seal(Part(VersionId(1, 1), rank, 99, 8, (), ()), memoryview(bytes(8))))
    assert sorted(sealer._seen) == list(range(3, PARTS_KEPT + 3))


class _Held:
    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state
