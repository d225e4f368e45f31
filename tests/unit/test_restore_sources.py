"""A restore asks a store for nothing that memory has."""

from __future__ import annotations

import pytest

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.listed import ListedSource
from ray_dr.checkpoint.reader import StoreSource
from ray_dr.errors import CheckpointError, CopiesAway, NoCheckpoint, StoreUnavailable
from ray_dr.model.attempt import Origin
from ray_dr.model.checkpoint import Part, PartRef
from ray_dr.repository.parts import write_part
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.open import open_store
from ray_dr.train.link import Link
from ray_dr.train.restore import restore
from tests.unit.laid_out import JOB, TOKEN, VERSION, network, put, saved_network, stage_own
from tests.unit.test_pools import assignment


class Away(MemoryStore):
    """A store that can't be reached."""

    def get(self, key: str) -> bytes:
        raise StoreUnavailable("the store was asked")

    def readinto(self, key: str, into: memoryview, *, start: int = 0) -> None:
        raise StoreUnavailable("the store was asked")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Objects that were read of any store in memory."""
    found: list[str] = []
    get = MemoryStore.get
    monkeypatch.setattr(MemoryStore, "get", lambda self, key: (found.append(key), get(self, key))[1])
    return found


def listed(url: str, part: Part) -> tuple[PartRef, ...]:
    return (write_part(open_store(url), JOB, part, term=1),)


def damaged(agent: Agent, url: str) -> tuple[Part, Origin]:
    """A part with a bad chunk in memory, and whole in the store."""
    ((part, stream),) = saved_network(1)
    put(url, part, stream)
    refs = listed(url, part)
    stream[0] ^= 1
    stage_own(agent, part, stream)
    return part, Origin(VERSION, 1, {"0": (agent.address,)}, refs)


def test_a_restore_that_memory_can_serve_asks_no_store(agent: Agent, link: Link, url: str, asked: list[str]) -> None:
    ((part, stream),) = saved_network(1)
    put(url, part, stream)
    refs = listed(url, part)
    stage_own(agent, part, stream)
    origin = Origin(VERSION, 1, {"0": (agent.address,)}, refs, second=refs)
    model = network(2)
    restored = restore(assignment(agent.address, origin, second_url=url), {"model": model}, TOKEN, open_store(url), link)
    assert restored.sources == {"memory": part.size}
    assert asked == []


def test_the_second_store_is_asked_only_for_what_the_first_lacks(
    link: Link, url: str, asked: list[str]
) -> None:
    ((part, stream),) = saved_network(1)
    put(url, part, stream)
    refs = listed(url, part)
    origin = Origin(VERSION, 1, {}, refs, second=refs)
    a = assignment("", origin, second_url=f"{url}-second")  # which has nothing
    assert restore(a, {"model": network(2)}, TOKEN, open_store(url), link).sources == {"store": part.size}
    assert set(asked) == {refs[0].key}


@pytest.mark.parametrize("first", ["away", "emptied"])
def test_the_second_store_is_asked_where_the_first_cannot_even_give_the_part_list(link: Link, url: str, first: str) -> None:
    ((part, stream),) = saved_network(1)
    put(url, part, stream)
    refs = listed(url, part)
    a = assignment("", Origin(VERSION, 1, {}, refs, second=refs), second_url=url)
    store = Away() if first == "away" else open_store(f"{url}-empty")
    assert restore(a, {"model": network(2)}, TOKEN, store, link).sources == {"second": part.size}


def test_a_part_that_only_a_store_has_which_is_away_is_worth_another_try(link: Link, url: str) -> None:
    ((part, stream),) = saved_network(1)
    put(url, part, stream)
    a = assignment("", Origin(VERSION, 1, {}, listed(url, part)))
    with pytest.raises(CopiesAway, match=r"rank 0 of step .* can't be had now"):
        restore(a, {"model": network(2)}, TOKEN, Away(), link)
    with pytest.raises(NoCheckpoint, match="nobody holds rank 0"):
        restore(a, {"model": network(2)}, TOKEN, open_store(f"{url}-empty"), link)


def test_a_store_that_is_away_is_asked_once_however_many_chunks_are_bad(url: str) -> None:
    asked: list[str] = []

    def opened() -> StoreSource:
        asked.append(url)
        raise StoreUnavailable("no answer")

    source = ListedSource(url, "store", opened)
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            source.opened()
    assert asked == [url]


def test_a_bad_chunk_in_memory_comes_from_the_store_whose_part_list_is_read_then(
    agent: Agent, link: Link, url: str, asked: list[str]
) -> None:
    part, origin = damaged(agent, url)
    restored = restore(assignment(agent.address, origin), {"model": network(2)}, TOKEN, open_store(url), link)
    bad = part.chunks[0].size
    assert restored.sources == {"memory": part.size - bad, "store": bad}
    assert asked[0] == origin.parts[0].key


def test_a_bad_chunk_with_the_store_away_is_worth_another_try(agent: Agent, link: Link, url: str) -> None:
    _, origin = damaged(agent, url)
    with pytest.raises(CopiesAway, match="the store was asked"):
        restore(assignment(agent.address, origin), {"model": network(2)}, TOKEN, Away(), link)


def test_a_bad_chunk_whose_part_list_in_the_store_is_gone_has_no_good_copy(agent: Agent, link: Link, url: str) -> None:
    _, origin = damaged(agent, url)
    open_store(url).delete(origin.parts[0].key)
    with pytest.raises(CheckpointError, match="no good copy") as raised:
        restore(assignment(agent.address, origin), {"model": network(2)}, TOKEN, open_store(url), link)
    assert not isinstance(raised.value, CopiesAway)
