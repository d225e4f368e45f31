"""A store without conditional writes: what is left of put-if-absent, and of the commit log upon it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ray_dr.errors import AlreadyExists, Fenced
from ray_dr.model.checkpoint import Manifest, VersionId
from ray_dr.repository.commit import CommitLog
from ray_dr.stores.base import Buffer
from ray_dr.stores.memory import MemoryStore
from ray_dr.stores.unconditional import Unconditional


class Ignoring(MemoryStore):
    """Ignores the condition, as some S3 servers do."""

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        super().put(key, data)


def beside(*others: Callable[[], None]) -> Callable[[float], None]:
    """A wait during which others do something, each wait the next of them."""
    waiting = iter(others)
    return lambda _: next(waiting, lambda: None)()


def manifest(term: int, step: int) -> Manifest:
    return Manifest(1, "j", term, VersionId(1, step), 1, step, (), 0.0)


def test_it_says_that_it_is_not_conditional() -> None:
    assert not Unconditional(MemoryStore()).traits.conditional_put


def test_a_taken_name_is_refused_and_kept() -> None:
    store = Unconditional(Ignoring(), settle=beside())
    store.put("k", b"first", if_absent=True)
    with pytest.raises(AlreadyExists):
        store.put("k", b"second", if_absent=True)
    assert store.get("k") == b"first"
    store.put("k", b"plain")
    assert store.get("k") == b"plain"


def test_of_two_that_looked_at_the_same_time_the_last_to_put_wins_and_the_first_is_told() -> None:
    inner = Ignoring()
    first = Unconditional(inner, settle=beside(lambda: inner.put("k", b"theirs")))
    with pytest.raises(AlreadyExists, match="same time"):
        first.put("k", b"mine", if_absent=True)
    assert inner.get("k") == b"theirs"


def test_without_it_a_replaced_supervisor_overwrites_the_newer_term() -> None:
    """What is mended: the reason why the store must be wrapped."""
    inner = Ignoring()
    old, new = CommitLog(inner, "j"), CommitLog(inner, "j")
    term = old.take_term("old", 0.0)
    new.take_term("new", 0.0)
    old.commit(manifest(term, 1))
    assert CommitLog(inner, "j").term() == term, "the newer term is lost"


def test_a_replaced_supervisor_is_fenced_all_the_same() -> None:
    inner = Ignoring()
    old, new = (CommitLog(Unconditional(inner, settle=beside()), "j") for _ in range(2))
    term = old.take_term("old", 0.0)
    newer = new.take_term("new", 0.0)
    with pytest.raises(Fenced):
        old.commit(manifest(term, 1))
    new.commit(manifest(newer, 2))
    assert [known.version.step for known in CommitLog(inner, "j").checkpoints()] == [2]
