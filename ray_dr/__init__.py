"""ray_dr: training jobs on Ray that stay alive and grow and shrink.

    import ray_dr

    def train(ctx: ray_dr.Context) -> None:
        model, optimizer = build(ctx.world)
        data = ctx.data(dataset, global_batch=256)
        state = ctx.restore(model=model, optimizer=optimizer, data=data)
        for batch in ctx.steps(state, until=100_000):
            loss = loss_fn(model, batch)
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            ctx.log(loss=loss)

    ray_dr.run(train, "job.yaml")

Importing this imports neither ray nor torch nor an object-store client; they come with first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_dr import errors
from ray_dr.errors import ConfigError, JobFailed, RayDrError

if TYPE_CHECKING:
    from ray_dr.actors.launch import Outcome, run
    from ray_dr.train.context import Context
    from ray_dr.train.standalone import load, save, save_async

__all__ = ["ConfigError", "Context", "JobFailed", "Outcome", "RayDrError", "errors", "load", "run", "save", "save_async"]

_HOMES = {
    "run": "ray_dr.actors.launch", "Outcome": "ray_dr.actors.launch", "Context": "ray_dr.train.context",
    "save": "ray_dr.train.standalone", "save_async": "ray_dr.train.standalone", "load": "ray_dr.train.standalone",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ray_dr' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
