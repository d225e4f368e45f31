"""job.yaml: what it means, and the exact complaint about each thing that cannot hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ray_dr import config
from ray_dr.errors import ConfigError
from ray_dr.model.job import DiskTier, Every, Job, MemoryTier, Recovery, StoreTier, Workers

WHOLE = """
job: nightly
workers: {nodes: 2..4, min_nodes_to_run: 1, per_node: 2, cpus_per_worker: 0.5}
checkpoint:
  tiers:
    - {kind: memory, copies: 2, every: 10 steps}
    - {kind: disk, path: /mnt/nvme, every: 20s, keep: {last: 4}}
    - {kind: s3, url: "s3://bucket/prefix?endpoint=http://127.0.0.1:9000", every: 1h, keep: {last: 5}, share_with: base}
    - {kind: s3, url: "s3://elsewhere/prefix", keep: {daily: 2}}
recovery: {unwind: 500 ms, start: 2m, settle: 0s, silent: 3s, attempts_without_progress: 7}
deterministic: true
seed: 17
overhead: 2.5%
backend: gloo
settings: {lr: 3e-4, layers: 4, name: tiny, tied: true, version: "1.0", batch: -2}
"""

# Each bad file, and its message after `job.yaml:`.
BAD = [
    (
        "",
        "1: the file is empty (begin with `job: my-run`)",
    ),
    (
        "job: [",
        "1: not YAML: expected the node content, but found '<stream end>' (check colons, quotes and indentation)",
    ),
    (
        "- a",
        "1: expected keys and values, found a list (write `key: value` lines below it)",
    ),
    (
        "workers: {nodes: 2}",
        "1: job: missing (give the job a name to resume by: `job: my-run`)",
    ),
    (
        "job: a b",
        "1: job: 'a b' is no job name (use at most 64 of a-z A-Z 0-9 . _ -, beginning with a letter or digit)",
    ),
    (
        "job: 7",
        "1: job: expected text, found 7 (put it in quotes)",
    ),
    (
        "job: on",
        "1: job: expected text, found on (put it in quotes)",
    ),
    (
        "job:",
        "1: job: expected a value, found nothing (write a value, or remove the key)",
    ),
    (
        "jbo: x",
        "1: jbo: unknown key (did you mean job?)",
    ),
    (
        "job: x\njob: y",
        "2: job: given twice, first in line 1 (remove one of them)",
    ),
    (
        "job: x\nworker: {nodes: 2}",
        "2: worker: unknown key (did you mean workers?)",
    ),
    (
        "job: x\nworkers: {nodes: 4..2}",
        "2: workers.nodes: the range 4..2 is empty (write the smaller number first: 2..4)",
    ),
    (
        "job: x\nworkers: {nodes: 0}",
        "2: workers.nodes: 0 is out of range (write a whole number from 1 to 10000)",
    ),
    (
        "job: x\nworkers: {nodes: many}",
        "2: workers.nodes: expected a number of nodes, found 'many' (write 3, or a range: 2..4)",
    ),
    (
        "job: x\nworkers: {nodes: 2.5}",
        "2: workers.nodes: expected a number of nodes, found 2.5 (write 3, or a range: 2..4)",
    ),
    (
        "job: x\nworkers:\n  nodes: 2..4\n  min_nodes_to_run: 3",
        "4: workers.min_nodes_to_run: 3 is more than the 2 it may start with (write at most 2, or raise workers.nodes)",
    ),
    (
        "job: x\nworkers: 3",
        "2: workers: expected keys and values, found 3 (write `key: value` lines below it)",
    ),
    (
        "job: x\nworkers: {gpus: 8}",
        "2: workers.gpus: unknown key (known: nodes, min_nodes_to_run, per_node, gpus_per_node, cpus_per_worker, "
        "standby_nodes, standby_processes)",
    ),
    (
        "job: x\nworkers: {gpus_per_node: 8, per_node: 3}",
        "2: workers.per_node: 8 GPUs cannot be shared evenly by 3 workers (write a divisor of 8, or leave it out)",
    ),
    (
        "job: x\nworkers: {cpus_per_worker: 0}",
        "2: workers.cpus_per_worker: 0 is out of range (write a number above 0)",
    ),
    (
        "job: x\nworkers: {cpus_per_worker: two}",
        "2: workers.cpus_per_worker: expected a number, found 'two' (write a number above 0)",
    ),
    (
        "job: x\nrecovery:\n  unwind: 5",
        "3: recovery.unwind: 5 is no duration (write a unit: 30s, 5m)",
    ),
    (
        "job: x\nrecovery: {start: 5 parsecs}",
        "2: recovery.start: '5 parsecs' is no duration (write a unit: 30s, 5m)",
    ),
    (
        "job: x\nrecovery: {silent: 0s}",
        "2: recovery.silent: 0s is out of range (write a duration from 0.1s to 366d)",
    ),
    (
        "job: x\nrecovery: {slow: restart}",
        "2: recovery.slow: unknown key (known: unwind, start, settle, silent, hang, attempts_without_progress, notices)",
    ),
    (
        "job: x\nrecovery: {attempts_without_progress: 0}",
        "2: recovery.attempts_without_progress: 0 is out of range (write a whole number from 1 to 1000)",
    ),
    (
        "job: x\nrecovery: {settle: -1s}",
        "2: recovery.settle: '-1s' is no duration (write a unit: 30s, 5m)",
    ),
    (
        "job: x\ncheckpoint: {every: 30}",
        "2: checkpoint.every: 30 is no interval (write auto, never, 500 steps, 30s or 5m)",
    ),
    (
        "job: x\ncheckpoint: {every: 0 steps}",
        "2: checkpoint.every: 0 steps is out of range (write 1 step or more, or never)",
    ),
    (
        "job: x\ncheckpoint: {evry: 30s}",
        "2: checkpoint.evry: unknown key (did you mean every?)",
    ),
    (
        "job: x\ncheckpoint: {every: 400d}",
        "2: checkpoint.every: 400d is out of range (write a duration from 0.001s to 366d)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers: {kind: memory}",
        "3: checkpoint.tiers: expected a list, found keys and values (write `- ` lines, or [..., ...])",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {copies: 2}",
        "4: checkpoint.tiers[0]: a tier needs a kind (write kind: memory, file, disk, s3, store)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: tape}",
        "4: checkpoint.tiers[0].kind: 'tape' is not known here (known: memory, file, disk, s3, store)",
    ),
    (
        "job: x\nworkers: {nodes: 1}\ncheckpoint:\n  tiers:\n    - {kind: memory, copies: 2}",
        "5: checkpoint.tiers[0].copies: 2 copies need as many nodes, not 1 (write 1 or raise workers.nodes)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: memory, keep: {last: 2}}",
        "4: checkpoint.tiers[0].keep: a memory tier has no such key (known keys: kind, copies, every)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: memory}\n    - {kind: memory}",
        "5: checkpoint.tiers[1]: one more tier of this sort than can be (keep one memory, one disk and at most two store tiers)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: disk}",
        "4: checkpoint.tiers[0].kind: a disk tier needs to know where (add path: /a/dir)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: disk, url: s3://a/b}",
        "4: checkpoint.tiers[0].url: s3://a/b is no disk of a node (write path: /a/dir; a bucket is a tier of kind s3)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: disk, path: /a, keep: {daily: 3}}",
        "4: checkpoint.tiers[0].keep.daily: unknown key (known: last)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: s3, url: s3://a/b}\n    - {kind: s3, url: s3://a/b}",
        "5: checkpoint.tiers[1].url: s3://a/b is the first store once more (write another bucket or directory)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: s3, url: s3://a/b, share_with: x}",
        "1: job: x can't share with itself (write the job it was tuned from as share_with)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: s3}",
        "4: checkpoint.tiers[0].kind: a store tier needs to know where (add url: s3://bucket/prefix or path: /a/dir)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: s3, url: /tmp/x}",
        "4: checkpoint.tiers[0].url: file:///tmp/x does not fit kind: s3 (write kind: store)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: file, path: /a, url: s3://b/c}",
        "4: checkpoint.tiers[0].path: the tier has a url as well (remove one of them)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: file, path: /a, keep: {last: 0}}",
        "4: checkpoint.tiers[0].keep.last: 0 is out of range (write a whole number from 1 to 1000000)",
    ),
    (
        "job: x\ncheckpoint:\n  tiers:\n    - {kind: file, path: /a, keep: {yearly: 7}}",
        "4: checkpoint.tiers[0].keep.yearly: unknown key (known: last, hourly, daily, weekly, within)",
    ),
    (
        "job: x\nstore: /a\ncheckpoint:\n  tiers:\n    - {kind: file, path: /b}",
        "2: store: the store is said twice: here and in checkpoint.tiers (remove one of them)",
    ),
    (
        "job: x\nstore: gs://bucket",
        "2: store: no store speaks gs:// (use one of file://, s3://, memory://)",
    ),
    (
        "job: x\nstore: s3:///prefix",
        "2: store: s3:///prefix names no bucket (write s3://name)",
    ),
    (
        "job: x\nstore: file://host/a",
        "2: store: file://host/a has no absolute path (write file:///a/directory, with three slashes)",
    ),
    (
        "job: x\nstore: 's3://me:secret@bucket'",
        "2: store: credentials do not belong in a store's URL (use the AWS environment variables or a profile)",
    ),
    (
        "job: x\nstore: ''",
        "2: store: '' is no place for a store (write s3://bucket/prefix or a directory)",
    ),
    (
        "job: x\nstore: {url: /a}",
        "2: store: expected a value, found keys and values (write a value, or remove the key)",
    ),
    (
        "job: x\ndeterministic: 1",
        "2: deterministic: expected true or false, found 1 (write true or false)",
    ),
    (
        "job: x\nseed: -1",
        "2: seed: -1 is out of range (write a whole number from 0 to 9007199254740992)",
    ),
    (
        "job: x\nseed: 1.5",
        "2: seed: expected a whole number, found 1.5 (write one from 0 to 9007199254740992)",
    ),
    (
        "job: x\noverhead: 0.01",
        "2: overhead: 0.01 is no percentage (write a percentage: 1%)",
    ),
    (
        "job: x\noverhead: 0%",
        "2: overhead: 0% is out of range (write more than 0% and at most 100%)",
    ),
    (
        "job: x\nbackend: mpi",
        "2: backend: 'mpi' is not known here (known: auto, gloo, nccl)",
    ),
    (
        "job: x\nbackend: nccl",
        "2: backend: nccl needs GPUs and the workers have none (set workers.gpus_per_node, or write gloo)",
    ),
    (
        "job: x\nsettings: {layers: [1, 2]}",
        "2: settings.layers: expected a value, found a list (write a value, or remove the key)",
    ),
    (
        "job: x\nsettings:\n  lr:",
        "3: settings.lr: expected a value, found nothing (write a value, or remove the key)",
    ),
    (
        "job: x\nsettings: {lr: .inf}",
        "2: settings.lr: found .inf (write text, a number, true or false; put text in quotes)",
    ),
    (
        "job: x\n? [a]\n: b",
        "2: a list is no key (keys are words)",
    ),
    (
        "job: x\nseed: !!python/object:os.system 1",
        "2: seed: has the tag 'tag:yaml.org,2002:python/object:os.system' (write plain values, without !tags)",
    ),
]


def test_reads_every_key_into_base_units() -> None:
    assert config.parse(WHOLE) == Job(
        name="nightly",
        store=StoreTier(
            "s3://bucket/prefix?endpoint=http://127.0.0.1:9000", Every(seconds=3600.0), keep_last=5, share_with="base"
        ),
        workers=Workers(2, 4, 1, per_node=2, cpus_per_worker=0.5, gpus_per_worker=0.0),
        memory=MemoryTier(Every(steps=10), copies=2),
        recovery=Recovery(0.5, 120.0, 0.0, 7, 3.0),
        deterministic=True,
        seed=17,
        overhead=0.025,
        settings={"lr": 3e-4, "layers": 4, "name": "tiny", "tied": True, "version": "1.0", "batch": -2},
        backend="gloo",
        disk=DiskTier("file:///mnt/nvme", Every(seconds=20.0), 4),
        second=StoreTier("s3://elsewhere/prefix", Every(seconds=600.0), keep_daily=2),
    )


@pytest.mark.parametrize(("text", "message"), BAD)
def test_names_the_place_and_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    assert str(caught.value) == f"job.yaml:{message}"


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 3000, 'job: "\\UFFFFFFFF"', "&a {job: *a}", "job: x\n\x00", "%YAML 9\n---"]
)
def test_refuses_text_the_yaml_library_stumbles_over(text: str) -> None:
    with pytest.raises(ConfigError):
        config.parse(text)


def test_a_job_without_a_store_uses_the_local_directory_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_DR_STORE", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    job = config.parse("job: x")
    assert job.store.url == "file:///home/me/.ray_dr/store" == config.default_store()
    assert config.store_is_default(job)
    assert not config.store_is_default(config.parse("job: x\nstore: /somewhere"))


def test_the_environment_gives_a_store_only_where_the_file_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DR_STORE", "s3://ours/all")
    assert config.parse("job: x").store.url == "s3://ours/all"
    assert not config.store_is_default(config.parse("job: x"))
    assert config.parse("job: x\nstore: s3://mine").store.url == "s3://mine"
    monkeypatch.setenv("RAY_DR_STORE", "gs://ours")
    with pytest.raises(ConfigError, match=r"\$RAY_DR_STORE: no store speaks gs://"):
        config.parse("job: x")


def test_a_relative_directory_is_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("job: x\nstore: check points")
    assert config.load(path).store.url == f"file://{tmp_path}/check%20points"


def test_a_file_url_keeps_its_options() -> None:
    assert config.parse("job: x\nstore: file:///a/../b?shared=true").store.url == "file:///b?shared=true"


def test_gpus_give_one_worker_each() -> None:
    workers = config.parse("job: x\nworkers: {nodes: 2, gpus_per_node: 8}").workers
    assert (workers.per_node, workers.gpus_per_worker) == (8, 1.0)
    workers = config.parse("job: x\nworkers: {nodes: 2, gpus_per_node: 8, per_node: 2}\nbackend: nccl").workers
    assert (workers.per_node, workers.gpus_per_worker) == (2, 4.0)


def test_one_interval_holds_for_all_tiers_that_say_none() -> None:
    job = config.parse("job: x\nworkers: {nodes: 2}\nstore: /a\ncheckpoint: {every: 500 steps}")
    assert job.memory == MemoryTier(Every(steps=500), 2)
    assert job.store == StoreTier("file:///a", Every(steps=500))
    job = config.parse("job: x\nstore: /a\ncheckpoint: {every: auto}")
    assert job.memory == MemoryTier(Every(), 1)
    assert job.store == StoreTier("file:///a")


def test_never_is_an_interval() -> None:
    never = Every(seconds=math.inf)
    job = config.parse("job: x\ncheckpoint:\n  tiers:\n    - {kind: file, path: /a, every: never}")
    assert (job.store.every, job.memory.every) == (never, never)


def test_a_missing_file_and_a_binary_file_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file or directory \(check the path\)"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text"):
        config.load(tmp_path / "binary.yaml")


def test_a_store_that_works_passes_the_check(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("job: x\nstore: store")
    config.check_store(config.load(tmp_path / "job.yaml"))


def test_an_unreachable_store_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "plain-file").write_text("in the way")
    path = tmp_path / "job.yaml"
    path.write_text("job: x\nseed: 1\nstore: plain-file/store\n")
    with pytest.raises(ConfigError, match=r"job.yaml:3: store: the store file://.*/plain-file/store cannot be used: "):
        config.check_store(config.load(path), path)


def test_an_unknown_option_of_a_store_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"^store: the store s3://b\?pace=1 cannot be used: unknown option 'pace'"):
        config.check_store(config.parse("job: x\nstore: s3://b?pace=1"))
