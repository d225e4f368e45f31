from __future__ import annotations

from ray_dr.model.checkpoint import Held, VersionId
from ray_dr.recovery.plan import choose_version, copies

V40, V41 = VersionId(1, 40), VersionId(1, 41)


def held(node: str, version: VersionId, rank: int, *, own: bool = True, world: int = 2) -> Held:
    return Held(node, version, rank, world, 100, own)


def test_chooses_the_newest_version_of_which_every_part_is_held() -> None:
    parts = [held("a", V40, 0), held("b", V40, 1), held("a", V41, 0)]
    assert choose_version(parts, None) == V40


def test_counts_a_peers_copy_of_a_lost_nodes_part() -> None:
    assert choose_version([held("a", V41, 0), held("a", V41, 1, own=False)], V40) == V41


def test_falls_back_to_the_committed_version_when_a_part_is_lost() -> None:
    assert choose_version([held("a", V41, 0)], V40) == V40


def test_prefers_a_committed_version_that_is_newer() -> None:
    assert choose_version([held("a", V40, 0), held("b", V40, 1)], V41) == V41


def test_a_later_attempts_version_supersedes_a_higher_step_of_an_earlier_one() -> None:
    later = VersionId(2, 35)
    assert choose_version([held("a", later, 0, world=1), held("a", V41, 0), held("b", V41, 1)], None) == later


def test_parts_of_one_version_with_different_worlds_do_not_complete_each_other() -> None:
    assert choose_version([held("a", V41, 0, world=2), held("b", V41, 1, world=3)], None) is None


def test_there_is_no_version_when_nothing_is_held_or_committed() -> None:
    assert choose_version([], None) is None


def test_names_a_ranks_own_copy_before_those_of_peers() -> None:
    parts = [held("a", V41, 1, own=False), held("b", V41, 1), held("c", V40, 1), held("a", V41, 0)]
    assert copies(parts, V41) == {0: ("a",), 1: ("b", "a")}
