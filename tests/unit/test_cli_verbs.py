"""The verbs that read from the store alone, called as a user calls them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ray_dr.cli.main import main
from ray_dr.model.journal import Decided, Stepped
from ray_dr.repository.layout import chunks_prefix
from ray_dr.stores.disk import FileStore
from tests.unit import stored_life
from tests.unit.stored_life import NAME, TENSORS


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    opened = FileStore(tmp_path / "store")
    stored_life.write_journal(opened, stored_life.disturbed())
    stored_life.save_checkpoint(opened, 4)
    stored_life.save_checkpoint(opened, 8, attempt=2)
    return opened


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ask(store: FileStore, *verb: str) -> dict:
    """What a verb's last line says as JSON."""
    result = call(*verb, NAME, "--store", store.url, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_status_tells_state_step_and_committed_checkpoint(store: FileStore) -> None:
    told = ask(store, "status")
    assert (told["job"], told["phase"], told["step"], told["attempt"], told["incidents"]) == (NAME, "finished", 8, 2, 1)
    assert told["committed"]["version"] == {"attempt": 2, "step": 8}
    text = call("status", NAME, "--store", store.url).stdout
    assert "finished" in text
    assert "8, loss 0.6250" in text


def test_a_job_is_also_found_by_its_job_yaml(store: FileStore, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"job: {NAME}\nstore: ./store\n")
    result = call("status", path, "--json")
    assert json.loads(result.stdout)["step"] == 8


def test_timeline_tells_phases_in_order_and_why(store: FileStore) -> None:
    told = ask(store, "timeline")
    (incident,) = told["incidents"]
    assert incident["steps_lost"] == 2
    assert incident["bytes"] == {"memory": 10, "peer": 7}
    assert list(incident["phases"])[:2] == ["detected", "decided"]
    text = call("timeline", NAME, "--store", store.url).stdout
    assert "node lost (connection closed)" in text
    assert "attempt 2: 2 steps lost, read 10 B from memory, 7 B from peer" in text
    assert text.index("detected") < text.index("first_step") < text.index("finished")


def test_checkpoints_lists_what_can_be_restored(store: FileStore) -> None:
    told = ask(store, "checkpoints")
    assert [(row["step"], row["attempt"], row["parts"]) for row in told["checkpoints"]] == [(4, 1, 1), (8, 2, 1)]
    assert told["checkpoints"][0]["bytes"] == len(stored_life.contents(4))
    assert told["newest"]["peer"] == {"attempt": 1, "step": 3}
    assert call("checkpoints", NAME, "--store", store.url).stdout.splitlines()[0].split()[0] == "step"


@pytest.mark.parametrize(("asked", "step"), [((), 8), (("--step", "4"), 4)])
def test_restore_writes_the_bytes_that_were_saved(
    store: FileStore, tmp_path: Path, asked: tuple[str, ...], step: int
) -> None:
    target = tmp_path / "out.safetensors"
    result = call("restore", NAME, "--store", store.url, "--to", target, *asked, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["step"] == step
    data = target.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    saved, part = stored_life.contents(step), stored_life.save_checkpoint(FileStore(tmp_path / "other"), step)
    assert set(header) == {"__metadata__", *TENSORS}
    for shard in part.shards:
        first, last = header[shard.box.name]["data_offsets"]
        assert body[first:last] == saved[shard.at : shard.at + shard.box.size]


def test_restore_refuses_a_damaged_checkpoint_and_writes_no_file(store: FileStore, tmp_path: Path) -> None:
    for entry in store.list(chunks_prefix(NAME)):
        store.put(entry.key, b"x" * entry.size)
    result = call("restore", NAME, "--store", store.url, "--to", tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert "no good copy" in result.stderr
    assert not list(tmp_path.glob("*out*"))


def test_restore_of_a_step_nobody_saved_names_those_that_were(store: FileStore, tmp_path: Path) -> None:
    result = call("restore", NAME, "--store", store.url, "--step", "5", "--to", tmp_path / "x")
    assert result.exit_code == 1
    assert "no checkpoint of step 5; there are: 4, 8" in result.stderr


def test_replay_of_an_honest_journal_finds_nothing(store: FileStore) -> None:
    told = ask(store, "replay")
    assert told["differences"] == []
    assert told["decisions"] >= 10


def test_replay_shows_a_decision_that_comes_out_differently(tmp_path: Path) -> None:
    store, records = FileStore(tmp_path / "store"), stored_life.disturbed()
    at = next(i for i, record in enumerate(records) if isinstance(record, Decided) and record.seq == 3)
    records[at] = replace(records[at], reason="it was told to")
    stored_life.write_journal(store, records)
    result = call("replay", NAME, "--store", store.url)
    assert result.exit_code == 1
    assert "decision 3 on NodeJoined: reason was 'it was told to'" in result.stdout


def test_data_verify_proves_every_sample(store: FileStore) -> None:
    told = ask(store, "data", "verify")
    assert (told["ok"], told["used"], told["lost"], told["repeated"]) == (True, 64, 0, 0)


def test_data_verify_fails_when_a_step_is_missing(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    records = [r for r in stored_life.undisturbed() if not (isinstance(r, Stepped) and r.record.step == 6)]
    stored_life.write_journal(store, records)
    result = call("data", "verify", NAME, "--store", store.url)
    assert result.exit_code == 1
    assert "NOT proven" in result.stdout


def test_a_damaged_journal_is_one_line_that_names_the_object(store: FileStore) -> None:
    key = next(entry.key for entry in store.list(f"jobs/{NAME}/journal/"))
    store.put(key, b"{broken\n")
    result = call("status", NAME, "--store", store.url)
    assert result.exit_code == 1
    assert key in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_job_is_bad_input_and_names_those_there_are(store: FileStore) -> None:
    result = call("status", "day", "--store", store.url)
    assert result.exit_code == 2
    assert "knows no job 'day' (it knows night)" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("status", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("status", "x", "--store", "gopher://x"), "unknown kind of store"),
        (("run", "nowhere.py", "{job}"), "there is no file nowhere.py"),
        (("run", "no_such_module:train", "{job}"), "there is no module 'no_such_module'"),
        (("run", "json:train", "{job}"), "json has no function 'train'"),
        (("run", "json:dumps", "{bad}"), "bad.yaml:2"),
    ],
)
def test_bad_input_is_one_line_with_status_2(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    job, bad = tmp_path / "job.yaml", tmp_path / "bad.yaml"
    job.write_text("job: night\nstore: ./store\n")
    bad.write_text("job: night\nworkres: {nodes: 2}\n")
    result = call(*(argument.format(job=job, bad=bad) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_option_is_bad_input() -> None:
    assert call("status", "--nonsense", "x").exit_code == 2
    assert call("nonsense").exit_code == 2
