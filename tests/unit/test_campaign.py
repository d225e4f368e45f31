"""The fault campaign's bookkeeping and its program's faults; the campaign itself needs a cluster (tests/ray)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import campaign, scene
from benchmarks.campaign import FAILED, INVALID, KINDS, Result, chosen, summary
from benchmarks.campaign_program import Planned


def context(armed: Path, rank: int, size: int, **settings: Any) -> Any:
    place = SimpleNamespace(rank=rank, size=size)
    return SimpleNamespace(world=place, settings={"armed": str(armed), "deed": "raise", **settings})


def test_a_fault_that_did_not_take_effect_has_not_passed() -> None:
    told = summary([Result("a"), Result("b", INVALID, "not seen"), Result("c", FAILED, "other weights")])
    assert (told["kinds"], told["failed"], told["invalid"], told["not_passed"]) == (3, 2, 1, ["b", "c"])


def test_the_first_broken_promise_is_the_one_that_is_told() -> None:
    result = Result("a")
    for holds, why in ((True, "one"), (False, "two"), (False, "three")):
        result.must(holds, why)
    assert (result.verdict, result.why) == (FAILED, "two")


def test_kinds_have_names_of_their_own_and_the_quick_ones_are_enough() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 30
    assert 8 <= len(chosen(True, [])) < len(chosen(False, [])) == len(KINDS)
    with pytest.raises(SystemExit, match="no kind 'tea'"):
        chosen(False, ["tea"])


def test_weights_differ_by_a_bit_by_a_missing_and_by_another_tensor() -> None:
    assert campaign._differences({"a": b"1", "b": b"2", "c": b"3"}, {"a": b"1", "b": b"0", "d": b"4"}) == ["b", "c", "d"]


def test_a_planned_fault_comes_once_on_the_last_rank_and_only_when_armed(tmp_path: Path) -> None:
    armed = tmp_path / "armed"
    first, last = (Planned(context(armed, rank, 2, where="step")) for rank in range(2))
    last.here("step")
    armed.touch()
    first.here("step")
    last.here("loader")
    with pytest.raises(ValueError, match="a passing fault"):
        last.here("step")
    last.here("step")
    assert armed.with_name("armed.taken").is_file()


def test_a_planned_fault_waits_for_a_group_that_is_large_enough(tmp_path: Path) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    Planned(context(armed, 0, 1, where="restore", world=2)).here("restore")
    assert armed.is_file()


def test_a_process_that_is_gone_before_the_fault_makes_it_unseen() -> None:
    with pytest.raises(scene.Unseen, match="gone before"):
        scene._signal(2**22 + 1, 0)
