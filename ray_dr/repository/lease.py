"""Signs of life in a store, and what guards have done about their absence.

    jobs/<job>/lease/<term>.json    written again and again by the supervisor of that term, and by no other
    jobs/<job>/guard.json           the newest resubmission of a guard

One object per term, so that a supervisor which was fenced off and does not know it yet can't be taken for the one that has
the job. The lease decides nothing about commits: those are fenced by the term in the commit log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ray_dr.errors import NotFound, StoreError
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.lease import Guarding, Lease
from ray_dr.repository.layout import job_prefix
from ray_dr.stores.base import Store

_TERM = re.compile(r"/lease/(\d{6,})\.json$")


def lease_key(job: str, term: int) -> str:
    """Where a supervisor's lease lies."""
    return f"{job_prefix(job)}lease/{term:06d}.json"


def guard_key(job: str) -> str:
    """Where guards keep what they did."""
    return f"{job_prefix(job)}guard.json"


def write_lease(store: Store, job: str, lease: Lease) -> None:
    """Renew it. Raises StoreError."""
    store.put(lease_key(job, lease.term), _dump(lease))


def read_lease(store: Store, job: str) -> Lease | None:
    """The lease that counts: of the highest term; None when there is none. Raises StoreError, also for one that is damaged."""
    newest = max(_terms(store, job), default=None)
    if newest is None:
        return None
    try:
        lease: Lease = from_json(Lease, json.loads(store.get(newest[1])))
    except NotFound:
        return None  # a newer supervisor has just swept it up; the next look sees its own
    except (ValueError, TypeError) as error:
        raise StoreError(f"the lease is damaged, or of another version of ray_dr ({error})", key=newest[1]) from error
    return lease


def sweep_leases(store: Store, job: str, term: int) -> None:
    """Remove those of supervisors before the one of `term`. Raises StoreError."""
    for older, key in _terms(store, job):
        if older < term:
            store.delete(key)


def read_guarding(store: Store, job: str) -> Guarding:
    """What guards have done; nothing so far when it can't be understood. Raises StoreError."""
    try:
        done: Guarding = from_json(Guarding, json.loads(store.get(guard_key(job))))
    except (NotFound, ValueError, TypeError):
        return Guarding()
    return done


def write_guarding(store: Store, job: str, done: Guarding) -> None:
    """Keep it. Raises StoreError."""
    store.put(guard_key(job), _dump(done))


def _terms(store: Store, job: str) -> Iterator[tuple[int, str]]:
    for entry in list(store.list(f"{job_prefix(job)}lease/")):
        if found := _TERM.search(entry.key):
            yield int(found[1]), entry.key


def _dump(value: Any) -> bytes:
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":")).encode()
