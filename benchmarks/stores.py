"""How fast do chunks go into a store and come back, beside the raw client, the raw disk and a copy in memory?

`python -m benchmarks.stores [--quick] [--json] [--server small|ceph]`. All contestants move the same bytes in the same
pieces with the same number of threads, in turns, and the S3 ones to and from the same server, which is a process of its
own on the same cores. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import environment, median, p95, say, table
from ray_dr.model.checkpoint import CHUNK_BYTES
from ray_dr.stores.base import Store
from ray_dr.stores.disk import FileStore
from ray_dr.stores.s3 import Bucket, S3Store
from tests.s3_server import S3Server
from tests.servers.ceph import RadosGateway

THREADS = (1, 4)
OURS, PLAIN, TUNED, RAW, MEMCPY = "ray_dr", "boto3 as it comes", "boto3 tuned", "raw", "memcpy"
BUCKET = "bench"

Move = Callable[[int], None]


@dataclass(slots=True)
class Pieces:
    """The bytes that are moved, cut into chunks, and pre-faulted room to read them into."""

    data: memoryview
    room: memoryview

    def __len__(self) -> int:
        return self.data.nbytes // CHUNK_BYTES

    def source(self, index: int) -> memoryview:
        return self.data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]

    def target(self, index: int) -> memoryview:
        return self.room[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


@dataclass(slots=True)
class Turns:
    """What one contestant took in each round, for all bytes."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def make_pieces(size: int) -> Pieces:
    """`size` bytes, rounded to whole chunks, that differ from chunk to chunk."""
    count = max(1, size // CHUNK_BYTES) * CHUNK_BYTES
    data = np.random.default_rng(0).integers(0, 256, count, np.uint8)
    return Pieces(memoryview(data).toreadonly(), memoryview(np.zeros(count, np.uint8)))


def of_store(store: Store, pieces: Pieces) -> dict[str, Move]:
    """Put and get as checkpoints do: under names that are free."""
    return {
        "clear": lambda index: store.delete(f"{index:04d}"),
        "put": lambda index: store.put(f"{index:04d}", pieces.source(index)),
        "get": lambda index: store.readinto(f"{index:04d}", pieces.target(index)),
    }


def of_plain_boto3(endpoint: str, pieces: Pieces) -> dict[str, Move]:
    """put_object of bytes, get_object and read, with the client's defaults."""
    client = make_client(endpoint)

    def put(index: int) -> None:
        client.put_object(Bucket=BUCKET, Key=f"plain/{index:04d}", Body=bytes(pieces.source(index)))

    def get(index: int) -> None:
        pieces.target(index)[:] = client.get_object(Bucket=BUCKET, Key=f"plain/{index:04d}")["Body"].read()

    return {"put": put, "get": get}


def of_tuned_boto3(endpoint: str, pieces: Pieces) -> dict[str, Move]:
    """The same client without checksums and payload signature; bodies and answers as streams."""
    client = tuned_client(endpoint)

    def put(index: int) -> None:
        client.put_object(Bucket=BUCKET, Key=f"tuned/{index:04d}", Body=io.BytesIO(pieces.source(index)))

    def get(index: int) -> None:
        body = client.get_object(Bucket=BUCKET, Key=f"tuned/{index:04d}")["Body"]
        view = pieces.target(index)
        while view.nbytes and (count := body.readinto(view)):
            view = view[count:]

    return {"put": put, "get": get}


def tuned_client(endpoint: str) -> Any:
    """boto3's client with no checksums and no payload signature."""
    from botocore.config import Config

    config = Config(
        max_pool_connections=64, signature_version="s3v4", request_checksum_calculation="when_required",
        response_checksum_validation="when_required", s3={"payload_signing_enabled": False, "addressing_style": "path"},
    )  # fmt: skip
    return make_client(endpoint, config)


def of_disk(folder: Path, pieces: Pieces) -> dict[str, Move]:
    """A file per chunk: write and fsync; read into memory, out of the page cache as the store's are."""

    def put(index: int) -> None:
        fd = os.open(folder / f"{index:04d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        view = pieces.source(index)
        while view.nbytes:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.close(fd)

    def get(index: int) -> None:
        fd = os.open(folder / f"{index:04d}", os.O_RDONLY)
        view = pieces.target(index)
        while view.nbytes and (count := os.readv(fd, [view])):
            view = view[count:]
        os.close(fd)

    return {"clear": lambda index: (folder / f"{index:04d}").unlink(missing_ok=True), "put": put, "get": get}


def of_memory(pieces: Pieces) -> dict[str, Move]:
    """One copy into memory that is there already, either way."""

    def copy(index: int) -> None:
        np.copyto(np.frombuffer(pieces.target(index), np.uint8), np.frombuffer(pieces.source(index), np.uint8))

    return {"put": copy, "get": copy}


def make_client(endpoint: str, config: Any = None) -> Any:
    import boto3

    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config)


def compete(contestants: dict[str, dict[str, Move]], pieces: Pieces, rounds: int, threads: int) -> dict[str, dict[str, Turns]]:
    """{put, get} -> contestant -> what it took; in turns, in an order that changes; the first round is not counted.

    Every contestant's bytes are compared after its first get.
    """
    taken = {operation: {name: Turns() for name in contestants} for operation in ("put", "get")}
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds + 1):
            names = list(contestants)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                list(pool.map(contestants[name].get("clear", nothing), range(len(pieces))))
                for operation, turns in taken.items():
                    wall_s, cpu_s = timed(contestants[name][operation], len(pieces), pool)
                    if number:
                        turns[name].wall_s.append(wall_s)
                        turns[name].cpu_s.append(cpu_s)
                if not number:
                    assert pieces.room == pieces.data, f"{name} gave other bytes back"
                    np.frombuffer(pieces.room, np.uint8)[:] = 0
    return taken


def nothing(_: int) -> None:
    """What there is to clear where a put replaces."""


def timed(move: Move, count: int, pool: ThreadPoolExecutor) -> tuple[float, float]:
    """(seconds, processor seconds of this process) for all pieces."""
    wall, cpu = time.perf_counter(), time.process_time()
    list(pool.map(move, range(count)))
    return time.perf_counter() - wall, time.process_time() - cpu


@contextlib.contextmanager
def s3_endpoint(server: str, folder: Path) -> Iterator[str]:
    """A server with the bucket in a process of its own; the environment holds its credentials."""
    if server == "ceph":
        with RadosGateway(folder) as gateway:
            os.environ.update(gateway.environment)
            make_client(gateway.endpoint).create_bucket(Bucket=BUCKET)
            yield gateway.endpoint
        return
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        port, given = ours.recv()
        os.environ.update(given)
        yield f"http://127.0.0.1:{port}"
    finally:
        ours.send("stop")
        process.join(10)


def _serve(pipe: Any) -> None:
    with S3Server() as server:
        pipe.send((server.port, server.environment))
        pipe.recv()


def ratio(turns: dict[str, Turns], floor: str) -> float:
    """Our speed as a share of the floor's: 1 is as fast as it."""
    return median(turns[floor].wall_s) / median(turns[OURS].wall_s)


Key = tuple[str, int, str]
Taken = dict[Key, dict[str, Turns]]


def rows(taken: Taken, size: int) -> Iterator[tuple[object, ...]]:
    """Table rows, ours with its share of each floor's speed."""
    for (place, threads, operation), turns in taken.items():
        for name, each in turns.items():
            shares = ", ".join(f"{ratio(turns, floor):.2f} of {floor}" for floor in turns if floor != OURS)
            yield (
                place, operation, threads, name, f"{median(each.wall_s):.3f} / {p95(each.wall_s):.3f}",
                f"{size / median(each.wall_s) / 1e6:.0f}", f"{median(each.cpu_s) / size * 1e9:.2f}",
                shares if name == OURS else "",
            )  # fmt: skip


def result(taken: Taken, size: int) -> dict[str, Any]:
    """The last line. `s3_put_ratio` and the like: our speed over the fastest raw one, with the most threads."""
    most = max(threads for _, threads, _ in taken)
    found: dict[str, Any] = {"bytes": size, "threads": most}
    for (place, threads, operation), turns in taken.items():
        if threads == most:
            raw = min((name for name in turns if name not in (OURS, MEMCPY)), key=lambda name: median(turns[name].wall_s))
            found[f"{place}_{operation}_ratio"] = ratio(turns, raw)
            found[f"{place}_{operation}_s"] = median(turns[OURS].wall_s)
            found[f"{place}_raw_{operation}_s"] = median(turns[raw].wall_s)
            found["memcpy_s"] = median(turns[MEMCPY].wall_s)
    found["all"] = {
        f"{place} {operation}, {threads} threads": {
            name: {"wall_s": each.wall_s, "cpu_s": each.cpu_s} for name, each in turns.items()
        }
        for (place, threads, operation), turns in taken.items()
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer bytes")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--server", choices=["small", "ceph"], default="small", help="the S3 server (default: small)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    asked = parser.parse_args()
    seen = environment()
    say(json.dumps(seen))
    pieces = make_pieces(64 * 2**20 if asked.quick else 256 * 2**20)
    taken: Taken = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("server", "ours", "raw"):
            folder.joinpath(name).mkdir()
        with s3_endpoint(asked.server, folder / "server") as endpoint:
            ours = S3Store(Bucket(BUCKET, "ours", endpoint, "us-east-1"))
            s3 = {
                OURS: of_store(ours, pieces), PLAIN: of_plain_boto3(endpoint, pieces),
                TUNED: of_tuned_boto3(endpoint, pieces), MEMCPY: of_memory(pieces),
            }  # fmt: skip
            disk = {
                OURS: of_store(FileStore(folder / "ours"), pieces), RAW: of_disk(folder / "raw", pieces),
                MEMCPY: of_memory(pieces),
            }  # fmt: skip
            for where, contestants in (("s3", s3), ("disk", disk)):
                for threads in THREADS:
                    say(f"{where}: {len(pieces)} chunks, {asked.rounds} rounds, {threads} threads")
                    for operation, turns in compete(contestants, pieces, asked.rounds, threads).items():
                        taken[where, threads, operation] = turns
    size = pieces.data.nbytes
    head = ["store", "operation", "threads", "by", "s (median / p95)", "MB/s", "cpu-s/GB", "our speed"]
    print(table(head, list(rows(taken, size))))
    if asked.json:
        print(json.dumps({**result(taken, size), "server": asked.server, "environment": seen}))


if __name__ == "__main__":
    main()
