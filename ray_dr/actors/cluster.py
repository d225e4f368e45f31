"""Everything ray_dr asks of Ray: nodes, actors by name, the autoscaler. Every reach into a private Ray API would be here too."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_dr.actors.node_agent import NodeAgent
from ray_dr.actors.worker import Worker
from ray_dr.model.job import Job, Workers

NAMESPACE = "ray_dr"
CALLS_AT_ONCE = 8
SEE_ALL_GPUS = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
"""Ray else shows an actor the GPUs of its share only, and one without a share none: here each takes that of its local rank."""


@dataclass(frozen=True, slots=True)
class RayNode:
    """A living node as Ray sees it; resources in Ray's units, `host` its machine's name."""

    id: str
    address: str
    cpus: float
    gpus: float
    host: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def connect_again(address: str | None, runtime_env: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Join a cluster as the driver of a job that was another driver's: with its runtime environment and its Python path.

    Private: there is no public way to say which directories a driver's workers look for modules in but to be started there.
    """
    config = JobConfig()
    config._py_driver_sys_path.extend(paths)
    ray.init(address=address, namespace=NAMESPACE, runtime_env=dict(runtime_env), job_config=config,
             log_to_driver=False, logging_level=logging.WARNING)  # fmt: skip


def supervisor_name(job: str) -> str:
    """The name of a job's supervisor in the namespace."""
    return f"supervisor:{job}"


def nodes() -> tuple[RayNode, ...]:
    """Every node Ray holds alive."""
    return tuple(
        RayNode(
            n["NodeID"], n["NodeManagerAddress"], n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0),
            n["NodeManagerHostname"], n["Labels"],
        )
        for n in ray.nodes()
        if n["Alive"]
    )  # fmt: skip


def draining() -> dict[str, float]:
    """Nodes that Ray was asked to drain, and until when they are there (UTC seconds; inf: nobody said). Private: Ray's own
    Train and Serve ask it so, and there is no public way."""
    return {node: at_ms / 1000 if at_ms else math.inf for node, at_ms in ray._private.state.state.get_draining_nodes().items()}


def fits(node: RayNode, workers: Workers) -> bool:
    """Whether a node is large enough for one node's share of the job's workers. With standby processes these share its GPUs,
    all of them: it must have no other."""
    if workers.standby_processes and workers.gpus_per_worker and node.gpus != workers.per_node:
        return False
    return (
        node.cpus >= workers.cpus_per_worker * workers.per_node
        and node.gpus >= workers.gpus_per_worker * workers.per_node
        and node.cpus + node.gpus > 0
    )


def start_agent(
    job: str, name: str, node: str, store_url: str, token: bytes, disk: Sequence[str], second_url: str,
    notices: Sequence[str] = (),
) -> Any:
    """The agent of a node, started or found."""
    return ray.remote(NodeAgent).options(
        name=f"agent:{job}:{name}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0,
        max_concurrency=CALLS_AT_ONCE, scheduling_strategy=_on(node),
    ).remote(store_url, token, disk, second_url, notices)  # fmt: skip


def start_worker(job: Job, worker: str, node: str, agent: str, token: bytes, train: bytes, *, reserves: bool = True) -> Any:
    """A worker process on a node, started or found.

    reserves   it holds a worker's share of the node for the job. One beyond `per_node` holds nothing: it computes only when
               it has taken another's place, and the next process to start takes the share that this one has set free
    """
    workers = job.workers
    share_gpus = workers.standby_processes and workers.gpus_per_worker
    return ray.remote(Worker).options(
        name=f"worker:{job.name}:{worker}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True,
        num_cpus=workers.cpus_per_worker if reserves else 0, num_gpus=workers.gpus_per_worker if reserves else 0,
        max_concurrency=CALLS_AT_ONCE, scheduling_strategy=_on(node),
        runtime_env={"env_vars": {SEE_ALL_GPUS: "1"}} if share_gpus else None,
    ).remote(worker, agent, token, train, job.store.url)  # fmt: skip


def actors_of(job: str) -> tuple[str, ...]:
    """Names of the job's living agents and workers."""
    found = ray.util.list_named_actors(all_namespaces=True)
    kinds = (f"agent:{job}:", f"worker:{job}:")
    return tuple(sorted(a["name"] for a in found if a["namespace"] == NAMESPACE and a["name"].startswith(kinds)))


def actor(name: str) -> Any | None:
    """A living actor by name, or None."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(name, namespace=NAMESPACE)
    return None


def kill(handle: Any) -> None:
    """End an actor's process for good; nothing happens when it is already gone."""
    with contextlib.suppress(Exception):
        ray.kill(handle, no_restart=True)


def request_nodes(count: int, workers: Workers) -> None:
    """Ask the autoscaler to hold `count` nodes for a job (0 withdraws); replaces the previous request."""
    from ray.autoscaler.sdk import request_resources

    bundle = {"CPU": workers.cpus_per_worker * workers.per_node}
    if workers.gpus_per_worker:
        bundle["GPU"] = workers.gpus_per_worker * workers.per_node
    request_resources(bundles=[bundle] * count)


def gather(refs: Sequence[Any], timeout_s: float) -> list[Any | Exception]:
    """Results in order; an exception stands where a call failed or did not answer in time."""
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s) if refs else ([], [])
    done = set(ready)
    out: list[Any | Exception] = []
    for ref in refs:
        try:
            out.append(ray.get(ref) if ref in done else TimeoutError("no answer"))
        except Exception as error:
            out.append(error)
    return out


def when_done(ref: Any, then: Callable[[Future[Any]], None], pool: Executor) -> None:
    """Call `then` with the result in a thread of `pool`: Ray's own thread, which tells of it, must never call Ray itself (a
    `ray.kill` there waits for that very thread, for ever)."""
    ref.future().add_done_callback(lambda future: pool.submit(then, future))


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)
