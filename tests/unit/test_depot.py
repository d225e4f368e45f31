"""One store as a job's supervisor sees it: taken, committed to, pruned; and shared with the job it was tuned from."""

from __future__ import annotations

import pytest

from ray_dr.actors import launch
from ray_dr.checkpoint.depot import Depot
from ray_dr.checkpoint.sealing import Sealer
from ray_dr.errors import ConfigError, Fenced
from ray_dr.model.checkpoint import Part, VersionId
from ray_dr.model.job import StoreTier
from ray_dr.repository.chunks import KnownChunks
from ray_dr.repository.saving import SavedPart, save_part

SIZE = 3_000_000


def put(depot: Depot, step: int, fill: bytes = b"x") -> SavedPart:
    data = memoryview(fill * SIZE)
    bare = Part(VersionId(1, step), 0, 1, SIZE, (), ())
    part = Part(bare.version, 0, 1, SIZE, (), tuple(chunk for chunk, _ in Sealer().seal(bare, data)))
    saved = save_part(depot.store, depot.log, depot.job, part, data, term=depot.term, known=KnownChunks())
    depot.arrived(bare.version, saved.ref)
    return saved


def commit(depot: Depot, step: int) -> None:
    manifest = depot.manifest(VersionId(1, step), 1, 0)
    assert manifest is not None
    depot.committed(depot.log.commit(manifest))


def test_a_version_of_which_a_part_is_missing_is_no_manifest_and_may_be_asked_for_again() -> None:
    depot = Depot(StoreTier("memory://depot-parts"), "job", "me")
    put(depot, 1)
    assert depot.manifest(VersionId(1, 1), 2, 0) is None
    assert depot.manifest(VersionId(1, 2), 1, 0) is None
    for _ in range(2):
        assert depot.manifest(VersionId(1, 1), 1, 0) is not None, "a commit that failed is tried again"


def test_what_is_committed_is_known_and_the_rest_is_pruned() -> None:
    depot = Depot(StoreTier("memory://depot", keep_last=2), "job", "me")
    for step in (1, 2, 3):
        put(depot, step, bytes([step]))
        commit(depot, step)
        depot.prune()
    assert [manifest.version.step for manifest in depot.stored] == [2, 3]
    assert depot.refs(VersionId(1, 1)) == ()
    assert len(depot.refs(VersionId(1, 3))) == 1
    again = Depot(depot.tier, "job", "you")
    assert [manifest.version.step for manifest in again.stored] == [2, 3]
    put(depot, 4)
    with pytest.raises(Fenced):
        commit(depot, 4)


def test_a_version_struck_is_gone_and_the_last_one_stays() -> None:
    depot = Depot(StoreTier("memory://depot-struck"), "job", "me")
    for step in (1, 2):
        put(depot, step)
        commit(depot, step)
    depot.strike(VersionId(1, 2))
    depot.strike(VersionId(1, 1))
    assert [manifest.version.step for manifest in depot.log.checkpoints()] == [1]


def test_a_job_puts_nothing_that_the_job_it_shares_with_has() -> None:
    base = Depot(StoreTier("memory://depot-shared"), "base", "me")
    put(base, 1)
    commit(base, 1)
    tuned = Depot(StoreTier("memory://depot-shared", share_with="base"), "tuned", "me")
    assert tuned.alone == ""
    assert put(tuned, 1).sent == 0
    commit(tuned, 1)
    assert put(tuned, 2, b"y").sent > 0
    commit(tuned, 2)


def test_sharing_with_a_job_that_has_nothing_is_refused_at_the_door_and_said_later() -> None:
    tier = StoreTier("memory://depot-nothing", share_with="base")
    with pytest.raises(ConfigError, match=r"share_with: job base has no checkpoint in memory://depot-nothing"):
        launch._check_base("tuned", tier)
    depot = Depot(tier, "tuned", "me")
    assert "job base has no committed checkpoint" in depot.alone
    put(depot, 1)
    commit(depot, 1)
    launch._check_base("tuned", tier)  # it has begun already
