"""One node of a local cluster: Ray's own fake node, with a directory for runtime environments to itself.

Ray means one node per machine. Where several share one, they share the session's `runtime_resources` too, and each one
that unpacks a job's `working_dir` there first removes the copy which the workers of the others stand in. So every node
but the head, whose directory the drivers use too, starts through this module: those launched by the autoscaler through
the provider below, the others as

    python -m ray_dr.actors.local_node start --address ...     # otherwise as `ray start`
"""

from __future__ import annotations

import secrets
from typing import Any

# Private: neither `ray start` nor the provider lets a caller choose the directory.
from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.scripts.scripts import main

_SHARED = ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME


class LocalNodeProvider(FakeMultiNodeProvider):  # type: ignore[misc]  # Ray's class has no types
    """Ray's fake multi-node provider; the nodes it launches do not share a directory for runtime environments."""

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        with self.lock:  # reentrant, and held for as long as the setting must hold
            _use_own_directory()
            super()._create_node_with_resources_and_labels(*args)


def _use_own_directory() -> None:
    ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"{_SHARED}-{secrets.token_hex(4)}"


if __name__ == "__main__":
    _use_own_directory()
    main()
