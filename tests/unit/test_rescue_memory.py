"""Memory for what is rescued, and what stays behind it until it has its copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ray_dr.checkpoint import vault as vaults
from ray_dr.checkpoint.memory import attach, copy_into
from ray_dr.checkpoint.vault import Holding, Vault
from ray_dr.errors import ConfigError, NotFound
from ray_dr.model.checkpoint import Held, Part, VersionId
from ray_dr.recovery.plan import stays_behind

SIZE = 4096
OLD, NEW = VersionId(1, 50), VersionId(1, 57)


@pytest.fixture
def vault() -> Iterator[Vault]:
    made = Vault("a", lambda worker, slot, path: None)
    yield made
    made.close()


def lent(vault: Vault, version: VersionId, rank: int) -> Holding:
    path = vault.lend("w", SIZE)
    copy_into(attach(path, SIZE), memoryview(bytes([rank + 1]) * SIZE))
    holding = vault.stage("w", None, version=version, rank=rank, world=2, size=SIZE, path=path)
    holding.part = Part(version, rank, 2, SIZE, (), ())
    vault.done(holding)
    return holding


def versions(vault: Vault) -> set[VersionId]:
    return {held.version for held in vault.held()}


def test_a_part_in_lent_memory_is_held_as_the_nodes_own(vault: Vault) -> None:
    lent(vault, NEW, 1)
    assert vault.held() == (Held("a", NEW, 1, 2, SIZE, own=True),)
    holding = vault.read(NEW, 1)
    assert bytes(holding.view) == b"\2" * SIZE
    vault.done(holding)


def test_lent_memory_can_be_handed_over_once_and_comes_back_with_the_end_of_its_worker(vault: Vault) -> None:
    path = vault.lend("w", SIZE)
    vault.stage("w", None, version=NEW, rank=0, world=2, size=SIZE, path=path)
    with pytest.raises(NotFound, match="was not lent"):
        vault.stage("w", None, version=NEW, rank=1, world=2, size=SIZE, path=path)
    other = vault.lend("w", 2 * SIZE)
    vault.forget_worker("w")
    assert vault.buffer(2 * SIZE).path == other


def test_without_memory_nothing_is_lent_and_the_reason_is_said(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vaults, "available_bytes", lambda: SIZE - 1)
    with pytest.raises(ConfigError, match="no memory for"):
        vault.lend("w", SIZE)


def test_the_older_version_stays_until_the_rescued_one_is_complete(vault: Vault) -> None:
    for version in (OLD, NEW):
        lent(vault, version, 0)
    vault.completed(OLD)
    vault.begin(NEW, OLD)
    assert versions(vault) == {OLD, NEW}
    vault.completed(NEW)
    assert versions(vault) == {NEW}


def test_what_was_rescued_outlives_newer_copies_that_are_not_complete(vault: Vault) -> None:
    for version in (OLD, NEW):
        lent(vault, version, 0)
    vault.completed(OLD)
    vault.begin(NEW, OLD)
    lent(vault, VersionId(2, 58), 0)
    vault.keep_copy(Part(VersionId(2, 59), 0, 2, SIZE, (), ()), vault.buffer(SIZE))
    assert {OLD, NEW} <= versions(vault)
    vault.completed(VersionId(2, 59))
    assert versions(vault) == {VersionId(2, 59)}


def test_without_one_behind_it_only_the_restored_version_stays(vault: Vault) -> None:
    for version in (OLD, NEW):
        lent(vault, version, 0)
    vault.begin(NEW)
    assert versions(vault) == {NEW}




def held(version: VersionId, rank: int, *nodes: str) -> list[Held]:
    return [Held(node, version, rank, 2, 1, own=at == 0) for at, node in enumerate(nodes)]


def test_behind_a_version_without_its_copies_stays_the_one_with_the_most_and_of_these_the_newest() -> None:
    new = [*held(NEW, 0, "a"), *held(NEW, 1, "a")]
    copied = [*held(OLD, 0, "a", "b"), *held(OLD, 1, "b", "a")]
    newer = VersionId(1, 55)
    bare = [*held(newer, 0, "a"), *held(newer, 1, "b")]
    assert stays_behind([*new, *copied, *bare], NEW, 2) == OLD
    assert stays_behind([*new, *bare], NEW, 2) == newer
    assert stays_behind([*new, *copied, *bare], NEW, 1) is None
    assert stays_behind([*new, *held(OLD, 0, "a", "b")], NEW, 2) is None
    whole = [*held(NEW, 0, "a", "b"), *held(NEW, 1, "a", "b")]
    assert stays_behind([*whole, *copied], NEW, 2) is None
