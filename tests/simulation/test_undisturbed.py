"""An hour without a fault, and the same hour with one: no finding, or the right one in time."""

from __future__ import annotations

import pytest

from ray_dr.detection.detectors import Detection
from ray_dr.model.signal import Finding
from tests.simulation.training_world import World

HOUR_S = 3600.0


def findings_of(world: World, detection: Detection, seconds: float) -> list[Finding]:
    return [finding for sample in world.run(seconds) for finding in detection.observe(sample)]


@pytest.mark.parametrize(
    "world",
    [
        World(seed=1),
        World(seed=2, step_s=0.4),
        World(seed=3, step_s=0.3, common=0.15, own=0.95),
        World(seed=4, step_s=1.0, shards=2),
        World(seed=5, step_s=0.5, common=0.15, own=0.95),
        World(seed=6, step_s=2.0, nodes=8, per_node=1),
        World(seed=7, step_s=0.5, nodes=2, per_node=1),
        World(seed=8, step_s=0.3, common=0.02, own=0.02),
    ],
    ids=lambda world: f"seed{world.seed}",
)
def test_an_undisturbed_hour_has_no_finding(world: World) -> None:
    detection = Detection()
    detection.observe(world.formed())
    assert findings_of(world, detection, HOUR_S) == []
    ordered = sorted(world.steps_s)
    if world.common + world.own > 0.5:  # the jitter is what the promise is about
        assert 4 < ordered[int(0.99 * len(ordered))] / ordered[len(ordered) // 2] < 7
