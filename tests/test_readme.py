"""The README's examples, run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ray_dr import config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def files() -> dict[str, str]:
    """Blocks that are marked as files, by name."""
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", TEXT, re.S))


def console() -> list[str]:
    """Every command shown, without its comment."""
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.S)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]


def test_every_yaml_of_the_readme_is_a_valid_job() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        assert config.parse(block).name


def test_the_error_shown_is_the_error_given() -> None:
    shown = re.findall(r"^job\.yaml:\d+: .*$", TEXT, re.M)[0]
    with pytest.raises(config.ConfigError) as caught:
        config.parse("job: x\n\n\n\n\n\nrecovery: {unwind: 15}\n", "job.yaml")
    assert str(caught.value) == shown


def test_every_file_and_target_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in console():
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.M), command
    for path in re.findall(r"\]\((\S+?)\)|(cluster_configs/\S+\.yaml)", TEXT):
        assert (ROOT / (path[0] or path[1])).exists(), path


@pytest.mark.ray
def test_the_readmes_program_runs_and_its_commands_answer(tmp_path: Path) -> None:
    from ray_dr.actors.local_cluster import LocalCluster

    for name, text in files().items():
        (tmp_path / name).write_text(text)
    ours = [command.split() for command in console() if command.startswith("ray-dr ")]
    assert len(ours) >= 7
    with LocalCluster(nodes_max=2, dashboard=False) as cluster:
        environment = os.environ | cluster.env | {"RAY_DR_STORE": str(tmp_path / "store")}
        program = str(Path(sys.executable).with_name("ray-dr"))
        for _, *words in ours:
            done = subprocess.run([program, *words, "--json"], cwd=tmp_path, env=environment, capture_output=True,
                                  text=True, timeout=180, check=False)  # fmt: skip
            assert done.returncode == 0, (words, done.stdout, done.stderr)
            assert isinstance(json.loads(done.stdout.strip().splitlines()[-1]), dict)
    assert (tmp_path / "weights.safetensors").stat().st_size > 0
