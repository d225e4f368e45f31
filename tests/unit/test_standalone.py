"""Saving and loading without a cluster: every kind of value, all or nothing, in the background, from the command line."""

from __future__ import annotations

import copy
import json
import math
import struct
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ray_dr
from ray_dr.cli.main import main
from ray_dr.errors import (
    CheckpointError,
    ConfigError,
    Fenced,
    IncompatibleState,
    NoCheckpoint,
    StoreError,
    UnsupportedState,
)
from ray_dr.model.checkpoint import DTYPE_BYTES
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.layout import chunk_key, chunks_prefix
from ray_dr.repository.parts import read_part
from ray_dr.stores.keys import WrongKey
from ray_dr.stores.open import open_store
from ray_dr.telemetry.journal import segment_key
from ray_dr.train import standalone
from ray_dr.train.state import bytes_of


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/store"


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Each test is a process that has saved nothing yet."""
    standalone._jobs.clear()
    yield
    standalone._settle()
    standalone._give_back_slot()


def random_bytes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of random bits: NaNs with payloads too."""
    size = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 256 if dtype != torch.bool else 2, (size,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def every_tensor() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    found = {f"of {name}": random_bytes(getattr(torch, name), 3, 5) for name in DTYPE_BYTES}
    found |= {f"0-d {name}": random_bytes(getattr(torch, name)) for name in DTYPE_BYTES}
    found["empty"] = torch.empty(0, 4)
    found["transposed"] = torch.randn(4, 6).T
    found["strided"] = torch.randn(9, 9)[::2, 1::3]
    found["expanded"] = torch.randn(1, 5).expand(4, 5)
    found["conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
    found["channels last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return found


def bits(value: torch.Tensor) -> bytes:
    return bytes(bytes_of(value.detach()))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_of_every_kind_come_back_to_the_bit(url: str) -> None:
    saved = every_tensor()
    ray_dr.save({"all": saved}, url, step=3)
    blank = {key: torch.zeros_like(value, memory_format=torch.preserve_format) for key, value in saved.items()}
    blank["expanded"] = torch.zeros(5).expand(4, 5)  # cannot be filled: it is replaced
    inside = {key: value.data_ptr() for key, value in blank.items() if key != "expanded"}
    assert ray_dr.load({"all": blank}, url) == 3
    assert {key: bits(value) for key, value in blank.items()} == {key: bits(value) for key, value in saved.items()}
    assert {key: value.data_ptr() for key, value in blank.items() if key != "expanded"} == inside  # where they were


def test_a_tree_of_values_comes_back_as_it_was(url: str) -> None:
    payload = struct.unpack("<d", bytes.fromhex("010000000000f87f"))[0]
    arrays = {name: np.arange(6).reshape(2, 3).astype(name) for name in ("<f2", "<f8", "<i1", "<u8", "?", "<c16")}
    arrays |= {"0-d": np.array(3.5), "none": np.zeros((0, 2)), "strided": np.arange(20.0)[::-3]}
    arrays["nan"] = np.array([payload])
    value: dict[str, Any] = {
        "arrays": arrays, "numbers": [1, -2.5, 2**80, True, None, -0.0, float("inf"), 1 + 2j], "text": "ä\n",
        "bytes": b"\x00\xff", "pair": (1, [2, (3,)]), 7: {"$odd": 1}, "count": Counter("aab"), "": {},
    }  # fmt: skip
    ray_dr.save({"tree": value, "epoch": 4, "w": torch.arange(3)}, url)
    found: dict[str, Any] = {"tree": {}, "epoch": 0, "w": torch.zeros(3, dtype=torch.int64)}
    tree, w = found["tree"], found["w"]
    ray_dr.load(found, url)
    assert found["tree"] is tree
    assert found["w"] is w
    assert (found["epoch"], w.tolist()) == (4, [0, 1, 2])
    for key, array in tree.pop("arrays").items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            arrays[key].dtype, arrays[key].shape, arrays[key].tobytes(),
        )  # fmt: skip
    del value["arrays"]
    assert tree == value
    assert [str(item) for item in tree["numbers"]] == [str(item) for item in value["numbers"]]


def trained(seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(steps):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": torch.get_rng_state()}


def state_of(objects: dict[str, Any]) -> Any:
    """Everything there is, as one comparable text."""
    return repr(plain({k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in objects.items()}))


def plain(value: Any) -> Any:
    """Comparable: mappings in order of key, tensors as their bits."""
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return (value.dtype, value.shape, bits(value).hex()) if isinstance(value, torch.Tensor) else value


def test_training_state_comes_back_whole_and_training_goes_on_alike(url: str) -> None:
    saved = trained(0, 5)
    ray_dr.save(saved, url, step=5)
    other = trained(1, 1)
    weights = [p.data_ptr() for p in other["model"].parameters()]
    assert ray_dr.load(other, url) == 5
    assert state_of(other) == state_of(saved)
    assert [p.data_ptr() for p in other["model"].parameters()] == weights


def test_part_of_a_checkpoint_can_be_loaded_and_a_module_is_its_state_dict(url: str) -> None:
    saved = trained(0, 2)
    ray_dr.save({"model": saved["model"].state_dict(), "optimizer": saved["optimizer"]}, url)
    model = trained(1, 0)["model"]
    ray_dr.load({"model": model}, url)
    assert state_of({"m": model}) == state_of({"m": saved["model"]})
    ray_dr.save({"model": model}, url)
    state = OrderedDict((key, torch.zeros_like(value)) for key, value in model.state_dict().items())
    ray_dr.load({"model": state}, url)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    optimizer: dict[str, Any] = {"optimizer": {}}
    ray_dr.load(optimizer, url, step=0)
    assert sorted(optimizer["optimizer"]["state"]["#5"]) == ["exp_avg", "exp_avg_sq", "step"]


class Stubborn:
    """Refuses what it is given, once it is told to."""

    def __init__(self) -> None:
        self.value, self.refuse = 1, False

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.refuse and state["value"] != self.value:
            raise ValueError("I do not want to")
        self.value = state["value"]


def damage(url: str) -> None:
    store = open_store(url)
    last = list(store.list(chunks_prefix("main")))[-1]
    store.put(last.key, bytes(last.size))


def differ(into: dict[str, Any]) -> None:
    into["model"][2] = nn.Linear(3, 7)
    into["extra"] = nn.Linear(1, 1)


@pytest.mark.parametrize("reason", ["damaged", "different", "refused", "frozen"])
def test_a_failed_load_changes_nothing(url: str, reason: str) -> None:
    saved = {**trained(0, 5), "stubborn": Stubborn(), "tree": {"a": torch.ones(3), "b": [1]}, "zz": Stubborn()}
    saved["stubborn"].value = 2
    saved["zz"].value = 2
    ray_dr.save(saved, url)
    into: Any = {**trained(1, 2), "stubborn": Stubborn(), "tree": {"a": torch.zeros(3), "b": [2]}, "zz": Stubborn()}
    if reason == "damaged":
        damage(url)
    if reason == "different":
        differ(into)
    into["zz"].refuse = reason == "refused"
    if reason == "frozen":
        into["tree"] = 1
    before = copy.deepcopy(state_of(into))
    expected = {"damaged": CheckpointError, "different": IncompatibleState, "refused": ValueError, "frozen": ConfigError}
    with pytest.raises(expected[reason]) as caught:
        ray_dr.load(MappingProxyType(into) if reason == "frozen" else into, url)
    assert state_of(into) == before
    assert (into["stubborn"].value, into["zz"].value) == (1, 1)
    if reason == "different":
        text = str(caught.value)
        assert "model/2.weight: shape [2, 3] in the checkpoint, [7, 3] in the program" in text
        assert "extra/bias: the program wants float32[1], the checkpoint does not have it" in text


def test_a_bad_chunk_leaves_a_tensor_of_several_chunks_as_it_was(url: str) -> None:
    ray_dr.save({"model": nn.Linear(1, 3 * 2**20, bias=False)}, url)
    store = open_store(url)
    chunks = read_part(store, CommitLog(store, "main").checkpoints()[0].parts[0]).chunks
    store.put(chunk_key("main", chunks[1]), bytes(chunks[1].size))
    into = nn.Linear(1, 3 * 2**20, bias=False)
    before = into.weight.detach().clone()
    with pytest.raises(CheckpointError, match="no good copy"):
        ray_dr.load({"model": into}, url)
    assert torch.equal(into.weight, before)


def test_tensors_missing_from_a_tree_are_named(url: str) -> None:
    ray_dr.save({"tree": {"a": torch.ones(3), "b": torch.ones(2)}}, url)
    into = {"tree": {"a": torch.zeros(3), "c": np.zeros(1)}}
    with pytest.raises(IncompatibleState) as caught:
        ray_dr.load(into, url)
    assert caught.value.differences == (
        "tree/c: the program wants float64[1], the checkpoint does not have it",
        "tree/b: the checkpoint has float32[2], the program does not want it",
    )
    assert into["tree"]["a"].tolist() == [0, 0, 0]
    with pytest.raises(IncompatibleState, match=r"tree/a: shape \[3\] in the checkpoint, \[4\] in the program"):
        ray_dr.load({"tree": {"a": torch.zeros(4), "b": torch.ones(2)}}, url)


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop them
        return torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": {1, 2}}, "x/a: a set cannot be stored without pickle"),
        ({"a": np.array(["s"])}, "x/a: a numpy array of <U1 cannot be stored"),
        ({"a": np.zeros(2, ">f4")}, "x/a: a numpy array in foreign byte order"),
        (torch.zeros(2, 2).to_sparse(), "x: a torch.sparse_coo tensor"),
        (torch.zeros(2, device="meta"), "x: a meta tensor"),
        (quantised(), "of torch.qint8 has no bytes"),
        ({"a": [nn.Linear(1, 1)]}, "x/a/0: a Linear cannot be stored"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_named(url: str, value: Any, said: str) -> None:
    with pytest.raises(UnsupportedState) as caught:
        ray_dr.save({"x": value}, url)
    assert said in str(caught.value)
    assert CommitLog(open_store(url), "main").checkpoints() == ()


@pytest.mark.parametrize(("name", "step"), [("a/b", 1), ("", 1), ("$a", 1), ("a", -1)])
def test_bad_arguments_are_refused(url: str, name: str, step: int) -> None:
    with pytest.raises(ConfigError):
        ray_dr.save({name: 1}, url, step=step)
    with pytest.raises(StoreError):
        ray_dr.save({"a": 1}, url, job="../evil")


def test_a_background_save_keeps_what_the_state_was_when_it_began(url: str) -> None:
    weight = torch.zeros(2**18)
    for step in range(3):
        weight.fill_(step)
        saving = ray_dr.save_async({"w": weight}, url, step=step)
        weight.fill_(-1)
    assert saving.wait(60).step == 2
    assert saving.done
    for step in range(3):
        ray_dr.load({"w": weight}, url, step=step)
        assert set(weight.tolist()) == {step}


@pytest.mark.filterwarnings("ignore")
def test_a_background_save_that_fails_says_so_when_waited_for(url: str, caplog: pytest.LogCaptureFixture) -> None:
    saving = ray_dr.save_async({"w": torch.zeros(1)}, "https://no.such.store")
    with pytest.raises(StoreError, match="unknown kind of store"):
        saving.wait(60)
    assert "save.failed" in caplog.text


def test_a_background_save_that_nobody_waits_for_is_finished_at_exit(tmp_path: Path) -> None:
    program = f"import ray_dr, torch; ray_dr.save_async({{'w': torch.ones(2**24)}}, {str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=Path(__file__).parents[2])
    found: dict[str, Any] = {"w": None}
    ray_dr.load(found, str(tmp_path))
    assert found["w"].sum() == 2**24


def test_unchanged_chunks_are_not_sent_again(url: str) -> None:
    state = {"a": torch.randn(2**10), "b": torch.ones(100)}
    first = ray_dr.save(state, url)
    again = ray_dr.save(state, url)
    assert first.sent == first.size > 0
    assert (again.step, again.sent) == (1, 0)


def test_going_back_is_a_new_attempt_and_the_last_save_is_the_newest(url: str) -> None:
    for step, attempt in ((5, 1), (7, 1), (6, 2), (7, 2), (None, 2)):
        assert ray_dr.save({"step": [step, attempt]}, url, step=step).attempt == attempt
    found: dict[str, Any] = {"step": None}
    assert ray_dr.load(found, url) == 8
    assert ray_dr.load(found, url, step=7) == 7
    assert found["step"] == [7, 2]
    with pytest.raises(NoCheckpoint, match="no checkpoint of step 9; there are: 5, 7, 6, 7, 8"):
        ray_dr.load(found, url, step=9)


def test_a_process_that_was_overtaken_cannot_save(url: str) -> None:
    ray_dr.save({"a": 1}, url)
    mine = dict(standalone._jobs)
    standalone._jobs.clear()
    ray_dr.save({"a": 2}, url)
    standalone._jobs.update(mine)
    with pytest.raises(Fenced):
        ray_dr.save({"a": 3}, url)
    found: dict[str, Any] = {"a": 0}
    ray_dr.load(found, url)
    assert found == {"a": 2}


def test_a_supervised_job_is_not_fenced(url: str) -> None:
    open_store(url).put(segment_key("main", 1, 1), b"{}")
    with pytest.raises(ConfigError, match="choose another name"):
        ray_dr.save({"a": 1}, url)


def test_the_command_line_lists_and_restores_what_was_saved(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    weight = torch.randn(3, 2)
    ray_dr.save({"model": {"w": weight}, "note": "hello"}, url, step=12)
    run = CliRunner()
    told = run.invoke(main, ["checkpoints", "main", "--store", url, "--json"])
    assert told.exit_code == 0, told.output
    assert [row["step"] for row in json.loads(told.stdout)["checkpoints"]] == [12]
    target = tmp_path / "out.safetensors"
    told = run.invoke(main, ["restore", "main", "--store", url, "--to", str(target)])
    assert told.exit_code == 0, told.output
    data = target.read_bytes()
    assert data.endswith(bits(weight))
    assert json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["scalars"])["note"] == "hello"


def test_a_load_without_the_stores_key_says_so_and_not_that_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_KEY", "ab" * 32)
    ray_dr.save({"step": 7}, f"file://{tmp_path}?key=env:STORE_KEY")
    for step in (None, 0):
        with pytest.raises(WrongKey, match=r"is encrypted: add \?key=env:NAME"):
            ray_dr.load({"step": 0}, f"file://{tmp_path}", step=step)
