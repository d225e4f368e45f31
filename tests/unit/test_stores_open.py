"""URLs of stores, and the probe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ray_dr.errors import AccessDenied, BrokenPromise, StoreError, StoreUnavailable
from ray_dr.stores.base import Buffer
from ray_dr.stores.checks import PUT_IF_ABSENT
from ray_dr.stores.examine import try_out
from ray_dr.stores.faulty import FaultyStore
from ray_dr.stores.memory import MemoryStore, forget
from ray_dr.stores.open import open_store, probe, proven


def test_a_path_and_a_file_url_are_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "with space %20 #1?"
    open_store(str(place)).put("k", b"x")
    assert place.joinpath("k").read_bytes() == b"x"
    monkeypatch.chdir(tmp_path)
    open_store("relative").put("k", b"y")
    assert open_store(f"file://{tmp_path}/relative").get("k") == b"y"
    assert not open_store("relative").traits.shared
    assert open_store(f"file://{tmp_path}/relative?shared=true").traits.shared


def test_memory_stores_of_one_name_are_one() -> None:
    open_store("memory://one").put("k", b"x")
    try:
        assert open_store("memory://one").get("k") == b"x"
        assert list(open_store("memory://two").list("")) == []
    finally:
        forget("one")
    assert list(open_store("memory://one").list("")) == []


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("gs://bucket", "s3://"),
        ("file://host/path", "absolute"),
        ("s3://", "bucket"),
        ("s3://key:secret@bucket/x", "environment"),
        ("s3://bucket?endpont=http://x", "endpoint"),
        ("file:///tmp/x?share=1", "shared"),
        ("memory://", "name"),
    ],
)
def test_a_url_that_names_no_store_is_refused_with_a_remedy(url: str, hint: str) -> None:
    with pytest.raises(StoreError, match=hint) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_importing_this_does_not_import_the_s3_client() -> None:
    code = "import sys, ray_dr.stores.open, ray_dr.stores.s3; sys.exit(bool({'boto3', 'botocore'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [AccessDenied, StoreUnavailable])
def test_a_store_that_cannot_be_written_is_found_out(error: type[StoreError]) -> None:
    store = FaultyStore(MemoryStore())
    store.fail("put", error=error)
    with pytest.raises(error):
        probe(store)


class Overwriting(MemoryStore):
    """Ignores the condition, as some servers do, but only in a race."""

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        super().put(key, data, if_absent=if_absent and "one_wins" not in key)


def test_a_store_that_is_conditional_only_without_a_race_is_found_out() -> None:
    store = Overwriting()
    assert not probe(store).conditional_put
    assert not proven(store).traits.conditional_put
    assert "lets 8 of 8 racing writers win" in try_out(PUT_IF_ABSENT[1], store, "one_wins").said
    store.delete("one_wins/0")
    assert list(store.list("")) == []


def test_a_sound_store_is_proven_as_it_is() -> None:
    store = MemoryStore()
    assert proven(store) is store


def test_a_store_that_gives_back_other_bytes_is_found_out() -> None:
    store = FaultyStore(MemoryStore())
    store.flip("get", 0)
    with pytest.raises(BrokenPromise, match="give back"):
        probe(store)
