"""Restores by several ranks of one node at once, from a store, on any world size: a part of benchmarks.restore.

Each rank is a process of its own beside its node's agent, and reads as `ctx.restore` does.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from benchmarks.figures import median
from benchmarks.restore_plans import WORLDS, World, Written, held_boxes, refuse, write
from ray_dr.actors.node_agent import Agent
from ray_dr.checkpoint.reader import StoreSource, read_state
from ray_dr.checkpoint.shared_source import Sharing
from ray_dr.model.checkpoint import Box, Part
from ray_dr.repository.layout import chunk_key
from ray_dr.stores.base import Store
from ray_dr.stores.open import open_store

TOKEN = b"bench"
JOB = "j"
MOST_RANKS = 4


@dataclass(frozen=True)
class Order:
    """What a rank is to read."""

    agent: str
    url: str
    parts: list[Part]
    wanted: list[Box]
    restore: str
    local: int
    of: int
    compare: bool


class Node:
    """An agent and processes to be its ranks."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._spawn = multiprocessing.get_context("spawn")
        self._agent, self.address = self._start(_serve_agent, url)
        self._ranks = [self._start(_serve_rank)[0] for _ in range(MOST_RANKS)]
        self._count = 0

    def _start(self, target: Any, *args: object) -> tuple[Any, Any]:
        here, there = self._spawn.Pipe()
        process = self._spawn.Process(target=target, args=(*args, there), daemon=True)
        process.start()
        return (here, process), here.recv()

    def read(self, written: Written, size: int, world: int, *, compare: bool) -> float:
        """Seconds from the word until the last of `world` ranks has read what it holds."""
        self._count += 1
        pipes = [pipe for pipe, _ in self._ranks[:world]]
        held = [held_boxes(size, rank, world) for rank in range(world)]
        for local, (pipe, wanted) in enumerate(zip(pipes, held, strict=True)):
            pipe.send(Order(self.address, self.url, written.parts, wanted, str(self._count), local, world, compare))
        for pipe in pipes:
            pipe.recv()
        begun = time.perf_counter()
        for pipe in pipes:
            pipe.send("go")
        ended = [pipe.recv() for pipe in pipes]
        if compare:
            assert [digest for _, digest in ended] == [_digest(written, wanted) for wanted in held], "other bytes"
        return max(at for at, _ in ended) - begun  # monotonic clocks of one machine are one

    def close(self) -> None:
        for pipe, process in (*self._ranks, self._agent):
            pipe.send(None)
            process.join()


def _serve_agent(url: str, pipe: Any) -> None:
    agent = Agent("node", "127.0.0.1", url, TOKEN)
    pipe.send(agent.address)
    pipe.recv()
    agent.close()


def _serve_rank(pipe: Any) -> None:
    stores: dict[str, Store] = {}
    room = np.ones(0, np.uint8)
    pipe.send(os.getpid())
    while (order := pipe.recv()) is not None:
        if (size := sum(box.size for box in order.wanted)) > room.nbytes:
            room = np.ones(size, np.uint8)
        wanted, at = {}, 0
        for box in order.wanted:
            wanted[box] = memoryview(room)[at : at + box.size]
            at += box.size
        store = stores.setdefault(order.url, open_store(order.url))
        pipe.send("ready")
        pipe.recv()
        sources = {part.rank: [StoreSource(store, JOB, part)] for part in order.parts}
        with Sharing(order.agent, TOKEN, restore=order.restore, local=order.local, of=order.of) as sharing:
            read_state(order.parts, wanted, sharing.join(order.parts, wanted, sources), on_corrupt=refuse)
        ended = time.perf_counter()
        pipe.send((ended, blake3(room[:size]).hexdigest() if order.compare else ""))


def _digest(written: Written, wanted: list[Box]) -> str:
    """Of what the boxes hold, one behind the other."""
    digest = blake3()
    for box in wanted:
        view = memoryview(bytearray(box.size))
        read_state(written.parts, {box: view}, written.sources("memory"), on_corrupt=refuse)
        digest.update(view)
    return digest.hexdigest()


@contextmanager
def _nodes(urls: dict[str, str]) -> Iterator[dict[str, Node]]:
    with ExitStack() as stack:
        nodes = {}
        for kind, url in urls.items():
            nodes[kind] = Node(url)
            stack.callback(nodes[kind].close)
        yield nodes


def node_rows(size: int, rounds: int, folder: Path, endpoint: str, bucket: str) -> list[World]:
    """As `restore_plans.world_rows`, from a directory ("store") and from S3 ("S3"), by ranks of one node at once."""
    urls = {"store": f"file://{folder}/worlds", "S3": f"s3://{bucket}/worlds?endpoint={endpoint}&region=us-east-1"}
    found = []
    with _nodes(urls) as nodes:
        for wrote, readers in WORLDS:
            written = write(size, wrote)
            for kind, node in nodes.items():
                store = open_store(node.url)
                for part, stream in zip(written.parts, written.streams, strict=True):
                    for chunk in part.chunks:
                        store.put(chunk_key(JOB, chunk), stream[chunk.at : chunk.at + chunk.size])
                turns: dict[int, list[float]] = {world: [] for world in readers}
                for number in range(rounds + 1):
                    for world in readers:
                        took = node.read(written, size, world, compare=not number)
                        if number:
                            turns[world].append(took)
                for part in written.parts:
                    for chunk in part.chunks:
                        store.delete(chunk_key(JOB, chunk))
                same = median(turns[wrote])
                found += [World(wrote, world, kind, took, median(took) / same) for world, took in turns.items()]
    return found
