"""What several of these files need: a store in memory, an agent that keeps its parts there, and a worker's line to it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from ray_dr.actors.node_agent import Agent
from ray_dr.stores import memory
from ray_dr.train.link import Link
from tests.unit.laid_out import TOKEN


@pytest.fixture
def url() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    memory.forget(name)


@pytest.fixture
def agent(url: str) -> Iterator[Agent]:
    made = Agent("node-a", "127.0.0.1", url, TOKEN)
    yield made
    made.close()


@pytest.fixture
def link(agent: Agent) -> Iterator[Link]:
    made = Link(agent.address, TOKEN, "w0", 1)
    yield made
    made.close()
