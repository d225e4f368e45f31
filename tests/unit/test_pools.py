"""What a restore maps of the agent's memory: ahead, once, and no longer than the restore."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.memory import Pool
from ray_dr.model.attempt import Assignment, Cadence, Origin
from ray_dr.model.checkpoint import Part
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.peer import PeerReader, Place
from ray_dr.train import pools
from ray_dr.train.link import Link
from ray_dr.train.pools import Pools, nearest
from ray_dr.train.restore import restore
from tests.unit.laid_out import JOB, TOKEN, VERSION, hold, network, saved, saved_network, stage_own, wait_until

PAGES = 100
SIZE = PAGES * 4096


def mapped(pid: int | str = "self") -> Counter[tuple[str, int]]:
    """A process's mappings of pools: (inode, bytes met of it), each as often as there are."""
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    found = re.findall(r" (\d+) +/memfd:ray-dr .*?\nRss:\s+(\d+) kB", smaps, re.DOTALL)
    return Counter((inode, int(kb) * 1024) for inode, kb in found)


def since(before: Counter[tuple[str, int]]) -> list[int]:
    """Bytes met of each mapping that has come; what others had left behind may go meanwhile."""
    known, now = (Counter(inode for inode, _ in each.elements()) for each in (before, mapped()))
    more = now - known
    return [met for inode, met in mapped().elements() if inode in more][: more.total()]


def assignment(agent: str, origin: Origin | None, *, rank: int = 0, world: int = 1, second_url: str = "") -> Assignment:
    return Assignment(JOB, 7, "w0", rank, world, 0, "", agent, (), origin, Cadence(0, 1, 0), "gloo", False, 0, 1, "",
                      second_url=second_url)  # fmt: skip


def held_by(agent: Agent, parts: int = 1) -> Origin:
    return Origin(VERSION, parts, {str(rank): (agent.address,) for rank in range(parts)})


def large(rank: int, world: int) -> tuple[Part, bytearray]:
    part, stream = saved(SIZE)
    return Part(VERSION, rank, world, part.size, part.shards, part.chunks), stream


def test_a_part_is_mapped_with_all_its_pages_before_it_is_asked_for_and_let_go_afterwards(
    agent: Agent, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((part, stream),) = saved_network(1)
    stage_own(agent, part, stream)
    before = mapped()
    a = assignment(agent.address, held_by(agent))
    link.map_ahead(a, TOKEN).join()
    assert len(since(before)) == 1
    monkeypatch.setattr(pools, "attach", None)
    model = network(2)
    restore(a, {"model": model}, TOKEN, MemoryStore(), link)
    for name, tensor in network(1).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    wait_until(lambda: not since(before))


def test_every_page_is_met_ahead(agent: Agent, link: Link) -> None:
    hold(agent, *large(0, 1))
    before = mapped()
    link.map_ahead(assignment(agent.address, held_by(agent)), TOKEN).join()
    assert sum(since(before)) >= SIZE


def test_what_was_not_mapped_ahead_is_mapped_when_it_is_read_and_let_go(agent: Agent, link: Link) -> None:
    ((part, stream),) = saved_network(1)
    stage_own(agent, part, stream)
    before = mapped()
    restored = restore(assignment(agent.address, held_by(agent)), {"model": network(2)}, TOKEN, MemoryStore(), link)
    assert restored.sources == {"memory": part.size}
    wait_until(lambda: not since(before))


def test_a_new_attempt_lets_go_of_what_the_last_one_had_mapped(agent: Agent, link: Link) -> None:
    before = mapped()
    hold(agent, *large(0, 1))
    link.map_ahead(assignment(agent.address, held_by(agent)), TOKEN).join()
    agent.vault.begin(None)
    assert since(before), "the restore may yet come"
    link.reset()

    def through() -> bool:
        agent.vault._free.clear()  # once the agent sees that the copy is no longer read, it keeps the memory for another
        return not since(before)

    wait_until(through)


def test_what_is_mapped_after_the_attempt_was_given_up_is_not_kept(
    agent: Agent, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(agent, *large(0, 1))
    before = mapped()
    where = PeerReader.where

    def late(self: PeerReader, *asked: Any) -> Place | None:
        link.reset()
        return where(self, *asked)

    monkeypatch.setattr(PeerReader, "where", late)
    link.map_ahead(assignment(agent.address, held_by(agent)), TOKEN).join()
    assert not since(before)


def test_another_pool_under_the_same_path_is_not_taken_for_the_first() -> None:
    kept = Pools()
    first = Pool.create(4096)
    first.view[:5] = b"first"
    path = first.path
    assert bytes(kept.view(path, 5)) == b"first"
    first.close()
    second = Pool.create(4096)
    assert second.path == path
    second.view[:5] = b"other"
    assert bytes(kept.view(path, 5)) == b"other"
    kept.drop()
    second.close()


def test_a_pool_outlives_its_agent_only_until_it_is_let_go(agent: Agent, link: Link) -> None:
    part, stream = large(0, 1)
    before = mapped()
    hold(agent, part, stream)
    link.map_ahead(assignment(agent.address, held_by(agent)), TOKEN).join()
    agent.close()
    wait_until(lambda: len(since(before)) == 1)
    link.pools.drop()
    wait_until(lambda: not since(before))


def test_an_agent_that_is_gone_leaves_nothing_to_map(agent: Agent, link: Link) -> None:
    hold(agent, *large(0, 1))
    a = assignment(agent.address, held_by(agent))
    agent.close()
    before = mapped()
    link.map_ahead(a, TOKEN).join()
    assert not since(before)
    link.map_ahead(assignment(agent.address, None), TOKEN).join()


@pytest.mark.parametrize(("most", "count"), [(1, 1), (SIZE + 1, 2), (2**30, 3)])
def test_so_much_is_mapped_ahead_beginning_with_what_the_rank_is_most_likely_to_need(
    agent: Agent, link: Link, monkeypatch: pytest.MonkeyPatch, most: int, count: int
) -> None:
    for rank in range(3):
        hold(agent, *large(rank, 3))
    before = mapped()
    monkeypatch.setattr(pools, "AHEAD_BYTES", most)
    asked: list[int] = []
    where = PeerReader.where
    monkeypatch.setattr(PeerReader, "where", lambda self, version, rank: (asked.append(rank), where(self, version, rank))[1])
    link.map_ahead(assignment(agent.address, held_by(agent, 3), rank=2, world=3), TOKEN).join()
    assert asked == [2, 1, 0][:count]
    assert len(since(before)) == count


@pytest.mark.parametrize(
    ("rank", "world", "parts", "first"), [(0, 1, 3, [1, 0, 2]), (3, 4, 2, [1, 0]), (1, 2, 4, [2, 3]), (0, 4, 1, [0])]
)
def test_the_parts_at_a_ranks_place_come_first(rank: int, world: int, parts: int, first: Sequence[int]) -> None:
    found = list(nearest(rank, world, parts))
    assert found[: len(first)] == list(first)
    assert sorted(found) == list(range(parts))
