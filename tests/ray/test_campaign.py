"""The quick part of the fault campaign: real faults, each seen to take effect, and each got over to the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
MOST_S = 600.0


def test_every_fault_of_the_quick_campaign_takes_effect_and_changes_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.campaign", "--quick", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=MOST_S)
    assert done.stdout, done.stderr[-20_000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["failed"] == 0, f"{said['not_passed']}\n{done.stderr[-20_000:]}"
    assert said["kinds"] >= 8
    assert done.returncode == 0
