"""Whatever stands in a job.yaml, reading it gives a job or a ConfigError."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dr import config
from ray_dr.errors import ConfigError
from ray_dr.model.job import Job

WORDS = sorted(
    {*config.JOB_KEYS, *config.WORKER_KEYS, *config.RECOVERY_KEYS, *config.STORE_TIER_KEYS, "tiers", "copies"}
)
VALUES = (
    "x",
    "2..4",
    "4..2",
    "30s",
    "5",
    "1%",
    "auto",
    "never",
    "500 steps",
    "memory",
    "s3",
    "s3://b/c",
    "/a",
    "nccl",
    "~",
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(), st.sampled_from(VALUES)
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | scalars, inner, max_size=5),
    max_leaves=16,
)
fragments = st.lists(
    st.sampled_from(
        (*WORDS, *VALUES, ": ", ":", "\n", "\n  ", "- ", "{", "}", "[", "]", "&a ", "*a", "!!", "|", "'", '"', "<<")
    )
    | st.text(max_size=3),
    max_size=30,
).map("".join)


def parses_or_complains(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(config.parse(text), Job)


@settings(max_examples=300)
@given(st.text() | fragments)
def test_any_text_gives_a_job_or_a_config_error(text: str) -> None:
    parses_or_complains(text)
    parses_or_complains(f"job: x\n{text}")


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(config.JOB_KEYS), trees, max_size=6))
def test_any_tree_gives_a_job_or_a_config_error(tree: dict[str, object]) -> None:
    parses_or_complains(yaml.safe_dump({"job": "x", **tree}, allow_unicode=True))


@given(st.binary(max_size=64))
def test_any_bytes_in_a_file_give_a_job_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "job.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        config.load(path)
