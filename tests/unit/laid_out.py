"""A checkpoint of one part, or of a small network, laid where a test wants its copies: stores, agents' memory, slots."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.reader import StoreSource
from ray_dr.checkpoint.save_plan import plan_save, replicated
from ray_dr.model.checkpoint import Chunk, Part, VersionId
from ray_dr.repository.chunks import chunk_id
from ray_dr.repository.layout import chunk_key
from ray_dr.stores.open import open_store
from ray_dr.train.staging import stage
from ray_dr.train.state import flatten

TOKEN = b"secret"
WAIT_S = 60.0
CHUNK = 1000
VERSION = VersionId(1, 5)
FOLDER = "000001-000000000005-000001"
JOB = "j"


def saved(size: int = 20 * CHUNK) -> tuple[Part, bytearray]:
    """One part of two tensors; every chunk is different."""
    leaves = [replicated(name, "int8", (size // 2,), rank=0, world=1) for name in ("a", "b")]
    plan = plan_save(leaves, rank=0, world=1)
    stream = bytearray(os.urandom(plan.size))
    runs = [(at, stream[at : at + CHUNK]) for at in range(0, plan.size, CHUNK)]
    chunks = tuple(Chunk(chunk_id(run), at, len(run), FOLDER) for at, run in runs)
    return Part(VERSION, 0, 1, plan.size, plan.shards, chunks), stream


def put(url: str, part: Part, stream: bytearray) -> StoreSource:
    store = open_store(url)
    for chunk in part.chunks:
        store.put(chunk_key(JOB, chunk), stream[chunk.at : chunk.at + chunk.size])
    return StoreSource(store, JOB, part)


def hold(agent: Agent, part: Part, stream: bytearray) -> None:
    pool = agent.vault.buffer(part.size)
    pool.view[: part.size] = bytes(stream)
    agent.vault.keep_copy(part, pool)


def stage_own(agent: Agent, part: Part, stream: bytearray) -> memoryview:
    """The part as a worker of this node left it: in a slot that others of the node map."""
    agent.vault.open_pool("w", part.size)
    holding = agent.vault.stage("w", 0, version=VERSION, rank=part.rank, world=part.world, size=part.size)
    holding.view[:] = stream
    holding.part = part
    agent.vault.done(holding)
    return holding.view


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(30, 30) for _ in range(4)))


def saved_network(world: int) -> list[tuple[Part, bytearray]]:
    """The parts of a data-parallel job of so many ranks."""
    parts = []
    for rank in range(world):
        flat = flatten({"model": network(1)}, rank=rank, world=world)
        plan = plan_save((local.leaf for local in flat.tensors.values()), rank=rank, world=world)
        stream = bytearray(plan.size)
        stage(plan, flat, memoryview(stream))
        runs = [(at, stream[at : at + CHUNK]) for at in range(0, plan.size, CHUNK)]
        chunks = tuple(Chunk(chunk_id(run), at, len(run), FOLDER) for at, run in runs)
        parts.append((Part(VERSION, rank, world, plan.size, plan.shards, chunks, dict(flat.scalars)), stream))
    return parts


def wait_until(condition: Callable[[], bool]) -> None:
    """For what a closed connection brings about in the agent's own thread."""
    changed = threading.Event()
    for _ in range(int(WAIT_S * 100)):
        if condition():
            return
        changed.wait(0.01)
    assert condition()
