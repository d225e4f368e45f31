"""Checkpoints of other formats in and out, to the bit; and pickles that want to run something."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn

import ray_dr
from ray_dr.checkpoint import foreign
from ray_dr.checkpoint.foreign_pickle import DTYPES, Inert, answer
from ray_dr.cli.main import main
from ray_dr.errors import CheckpointError
from ray_dr.model.checkpoint import DTYPE_BYTES
from ray_dr.train import standalone
from tests.unit.test_standalone import bits, every_tensor, plain, state_of, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]


@pytest.fixture
def url(tmp_path: Path) -> str:
    standalone._jobs.clear()
    return f"file://{tmp_path}/store"


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def save_dcp(state: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=True)


def state() -> dict[str, Any]:
    """Tensors of all kinds that torch itself can save, values of all kinds, nested."""
    tensors = {key: value.resolve_conj() for key, value in every_tensor().items()}
    return {
        "model": tensors,
        "optimizer": {"state": {"w": {"step": torch.tensor(3.0), "exp_avg": torch.randn(3)}}, "lr": 1e-3},
        "extra": {"epoch": 3, "name": "ä", "best": float("inf"), "list": [1, torch.ones(2), "x"], "none": None,
                  "pair": (1, 2.5), "bytes": b"\x00\xff", "empty": b"", "big": 2**70},
    }  # fmt: skip


@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_what_torch_saved_comes_in_to_the_bit(url: str, tmp_path: Path, form: str) -> None:
    saved = state()
    path = tmp_path / f"theirs.{form}"
    torch.save(saved, path) if form == "pt" else save_dcp(saved, path)
    told = json.loads(call("import", path, "--store", url, "--job", "theirs", "--step", 8, "--json").stdout)
    assert (told["step"], told["tensors"]) == (8, len(saved["model"]) + 3)
    found: dict[str, Any] = {"model": {}, "optimizer": {}, "extra": {}}
    assert ray_dr.load(found, url, job="theirs") == 8
    assert plain(found) == plain(saved)


def test_a_module_is_loaded_from_what_torch_saved(url: str, tmp_path: Path) -> None:
    theirs = trained(0, 2)["model"]
    torch.save(theirs.state_dict(), tmp_path / "whole.pt")
    save_dcp({"model": theirs.state_dict()}, tmp_path / "dcp")
    save_dcp(theirs.state_dict(), tmp_path / "flat")
    for name in ("whole.pt", "dcp", "flat"):
        call("import", tmp_path / name, "--store", url, "--job", name)
        mine = trained(1, 0)["model"]
        ray_dr.load({"model": mine}, url, job=name)
        assert state_of({"m": mine}) == state_of({"m": theirs})


def test_dcp_loads_what_was_exported_to_the_bit(url: str, tmp_path: Path) -> None:
    saved = {**trained(0, 3), "all": every_tensor(), "array": np.arange(5), "note": "hello"}
    ray_dr.save(saved, url, step=3)
    call("restore", "main", "--store", url, "--to", tmp_path / "out", "--as", "dcp")
    into: dict[str, Any] = {
        "model": {key: torch.zeros_like(value) for key, value in saved["model"].state_dict().items()},
        "all": {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in saved["all"].items()},
        "optimizer": {"state": {"0.weight": {"exp_avg": torch.zeros(3, 4)}}, "param_groups": [{"lr": 0.0}]},
        "array": torch.zeros(5, dtype=torch.int64), "note": "",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.load(into, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
    assert plain(into["model"]) == plain(dict(saved["model"].state_dict()))
    assert plain(into["all"]) == plain({key: value.resolve_conj() for key, value in saved["all"].items()})
    moments = saved["optimizer"].state[next(saved["model"].parameters())]
    assert bits(into["optimizer"]["state"]["0.weight"]["exp_avg"]) == bits(moments["exp_avg"])
    assert (into["array"].tolist(), into["note"]) == ([0, 1, 2, 3, 4], "hello")


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_out_and_in_again_is_the_same_checkpoint(url: str, tmp_path: Path, form: str) -> None:
    formless = ("complex", "fnuz", "e8m0", "float4")
    tensors = {k: v for k, v in every_tensor().items() if not any(word in str(v.dtype) for word in formless)}
    saved = {**trained(0, 3), "all": tensors, "note": {"text": "hello", "count": [1, 2]}}
    ray_dr.save(saved, url, step=3)
    path = tmp_path / f"out.{form}"
    call("restore", "main", "--store", url, "--to", path, "--as", form)
    call("import", path, "--store", url, "--job", "again")
    first: dict[str, Any] = {name: {} for name in saved}
    second: dict[str, Any] = {name: {} for name in saved}
    ray_dr.load(first, url)
    ray_dr.load(second, url, job="again")
    assert plain(second) == plain(first)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, torch.Tensor]]) -> None:
    header, end = {}, 0
    for name, (dtype, tensor) in tensors.items():
        size = len(bits(tensor))
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    body = b"".join(bits(tensor) for _, tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_a_foreign_safetensors_file_becomes_the_model(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "PART_BYTES", 100)  # several parts, and tensors cut between them
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 2).to(torch.bfloat16))
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16"}
    write_safetensors(tmp_path / "a.safetensors", {k: (kinds[v.dtype], v) for k, v in model.state_dict().items()})
    call("import", tmp_path / "a.safetensors", "--store", url)
    parts = json.loads(call("checkpoints", "main", "--store", url, "--json").stdout)["checkpoints"][0]["parts"]
    assert parts > 3
    mine = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 2).to(torch.bfloat16))
    ray_dr.load({"model": mine}, url)
    assert state_of({"m": mine}) == state_of({"m": model})


def test_a_folder_of_safetensors_files_is_one_model(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    model = nn.Linear(3, 2)
    for number, (key, value) in enumerate(model.state_dict().items()):
        write_safetensors(folder / f"model-{number}.safetensors", {key: ("F32", value)})
    (folder / "config.json").write_text("{}")
    call("import", folder, "--store", url)
    mine = nn.Linear(3, 2)
    ray_dr.load({"model": mine}, url)
    assert state_of({"m": mine}) == state_of({"m": model})
    write_safetensors(folder / "model-again.safetensors", {"weight": ("F32", torch.ones(1))})
    assert "model/weight is in more than one file" in CliRunner().invoke(main, ["import", str(folder), "--store", url]).stderr


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self._reduced


def payloads(witness: Path) -> dict[str, bytes]:
    touch = f"open({str(witness)!r}, 'w').close()"
    direct = {
        "system": Evil(os.system, f"touch {witness}"), "exec": Evil(exec, touch), "eval": Evil(eval, touch),
        "open": Evil(open, str(witness), "w"), "import": Evil(__import__, "this"),
        "getattr": Evil(getattr, "", "upper"), "load": Evil(torch.load, str(witness)),
        "mkdir": Evil(Path.mkdir, witness), "loads": Evil(pickle.loads, pickle.dumps(Evil(exec, touch))),
    }  # fmt: skip
    found = {f"{name} {protocol}": pickle.dumps(evil, protocol) for name, evil in direct.items() for protocol in (0, 2, 5)}
    found["dotted"] = b"\x80\x04\x8c\x06pickle\x8c\x0bsys.modules\x93."
    found["inner"] = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93."
    found["instance"] = f"(S{touch!r}\ni__builtin__\nexec\n.".encode()
    found["bomb"] = pickle.dumps(Evil(bytearray, 2**40))
    found["nothing"] = b""
    return found


def archive(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        written.writestr("archive/data.pkl", data)
        written.writestr("archive/version", "3\n")
    return file.getvalue()


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    """In this process too: what stands before the allow-list in another process must not be needed."""
    witness = tmp_path / "witness"
    for name, data in payloads(witness).items():
        with pytest.raises(Exception, match="Ran out of input" if name == "nothing" else "not allowed"):
            Inert(data, "", {}).load()
    assert not witness.exists()


@pytest.mark.parametrize("name", ["exec 2", "system 5", "dotted", "nothing"])
@pytest.mark.parametrize("form", ["pt", "metadata", "item"])
def test_a_malicious_checkpoint_is_refused_by_name(url: str, tmp_path: Path, name: str, form: str) -> None:
    witness, path = tmp_path / "witness", tmp_path / "evil"
    data = payloads(witness)[name]
    if form == "pt":
        path.write_bytes(archive(data))
    else:
        save_dcp({"a": {"b": 1}}, path)
        item = next(path.glob("*.distcp"))
        if form == "metadata":
            (path / ".metadata").write_bytes(data)
        else:
            metadata = pickle.loads((path / ".metadata").read_bytes())
            for place in metadata.storage_data.values():
                place.offset, place.length = 0, len(archive(data))
            (path / ".metadata").write_bytes(pickle.dumps(metadata))
            item.write_bytes(archive(data))
    result = CliRunner().invoke(main, ["import", str(path), "--store", url])
    assert result.exit_code == 1
    assert ("damaged" if name == "nothing" else "which is not allowed") in result.stderr
    assert not witness.exists()
    assert not (tmp_path / "store" / "jobs").exists()


def test_a_file_that_takes_forever_is_given_up(tmp_path: Path) -> None:
    laughs: list[Any] = []
    for _ in range(100):
        laughs = [laughs, laughs]
    path = tmp_path / "slow.pt"
    torch.save({"a": laughs}, path)
    with pytest.raises(CheckpointError, match=r"took more than 0\.5 s, so it was given up"):
        foreign.read_inventory(path, limit_s=0.5)


def damaged(path: Path, kind: str) -> str:
    """Damage a saved file of each kind; what is said of it."""
    if kind == "missing":
        return "there is no such file"
    if kind == "text":
        path.write_text("hello")
        return "no archive of torch.save"
    if kind == "outside":
        save_dcp({"a": torch.ones(3)}, path)
        metadata = pickle.loads((path / ".metadata").read_bytes())
        for place in metadata.storage_data.values():
            place.relative_path = "../secret"
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        return "is no file of the checkpoint's own folder"
    if kind == "short":
        save_dcp({"a": torch.ones(3)}, path)
        next(path.glob("*.distcp")).write_bytes(b"PK")
        return "no archive of torch.save"
    if kind == "sparse":
        torch.save({"a": torch.eye(3).to_sparse()}, path)
        return "torch._utils._rebuild_sparse_tensor, which is not allowed"
    torch.save({"a": torch.ones(3, dtype=torch.complex64).conj()}, path)
    return "the lazy conjugate"


@pytest.mark.parametrize("kind", ["missing", "text", "outside", "short", "sparse", "conjugate"])
def test_what_cannot_be_read_is_said(url: str, tmp_path: Path, kind: str) -> None:
    said = damaged(tmp_path / "bad", kind)
    result = CliRunner().invoke(main, ["import", str(tmp_path / "bad"), "--store", url])
    assert result.exit_code == 1
    assert said in result.stderr


def test_every_truncation_of_a_file_of_torch_is_refused(tmp_path: Path) -> None:
    save_dcp({"a": torch.ones(3), "b": {"c": 1}}, tmp_path / "dcp")
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    for path, asked in ((tmp_path / "a.pt",) * 2, (tmp_path / "dcp" / ".metadata", tmp_path / "dcp")):
        data = path.read_bytes()
        assert "refused" not in answer(asked)
        for length in range(0, len(data), 1 if len(data) < 1000 else 7):
            path.write_bytes(data[:length])
            assert "refused" in answer(asked), length


@pytest.mark.parametrize("damage", ["offsets", "dtype", "long", "cut"])
def test_a_damaged_safetensors_file_is_refused(url: str, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": ("F32" if damage != "dtype" else "F4", torch.ones(5))})
    data = path.read_bytes()
    changed = {"offsets": data.replace(b"[0, 20]", b"[0, 24]"), "dtype": data, "cut": data[:-4],
               "long": (2**40).to_bytes(8, "little") + data[8:]}  # fmt: skip
    path.write_bytes(changed[damage])
    result = CliRunner().invoke(main, ["import", str(path), "--store", url])
    assert result.exit_code == 1
    said = {"offsets": "24 bytes, not 20", "dtype": "no form for", "cut": "ends before the bytes of model/w",
            "long": "longer than a header"}  # fmt: skip
    assert said[damage] in result.stderr


def test_the_reader_of_pickles_knows_every_dtype() -> None:
    assert set(DTYPES) == set(DTYPE_BYTES)
