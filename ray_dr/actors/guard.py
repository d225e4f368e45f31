"""A guard: the loop that looks at jobs' leases and submits those again whose cluster is lost. Decisions: `recovery.guarding`.

What it does is written to the store before it is done, so that one that is started again, or a second one, goes on from there.
It is no part of any cluster: it runs where the jobs' store and the Jobs API can be reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ray_dr.actors.submitting import Submitter, bring_up
from ray_dr.errors import ClusterError, StoreError
from ray_dr.recovery.guarding import (
    GuardPolicy,
    Leave,
    Resubmit,
    Verdict,
    Wait,
    Watch,
    decide,
    look,
    refused,
    resubmitted,
)
from ray_dr.repository.lease import read_guarding, read_lease, write_guarding
from ray_dr.stores.base import Store

LOOK_S = 3.0


@dataclass(frozen=True, slots=True)
class Orders:
    """How jobs are submitted again.

    store        the URL of their store, as the cluster is to open it
    on_loss      what brings the cluster up when it can't be reached; empty: nothing does
    environment  of that command, and where the programs' variables are looked up
    """

    store: str
    policy: GuardPolicy
    on_loss: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


class Guard:
    """`run` returns when no job needs it any more: how each one ended. `say` is told what changes."""

    def __init__(self, jobs: Mapping[str, Store], submitter: Submitter, orders: Orders,
                 variables: Callable[[str], Mapping[str, str]], say: Callable[[str], None]) -> None:  # fmt: skip
        self._stores, self._submitter, self._orders = dict(jobs), submitter, orders
        self._variables, self._say = variables, say
        self._watches = {job: Watch() for job in jobs}
        self._known: set[str] = set()
        self._told: dict[str, str] = {}

    def run(self) -> dict[str, Leave]:
        """Look until every job is over or given up."""
        left: dict[str, Leave] = {}
        while len(left) < len(self._stores):
            for job in [job for job in self._stores if job not in left]:
                verdict = self.look(job, time.time())
                if isinstance(verdict, Leave):
                    left[job] = verdict
            if len(left) < len(self._stores):
                time.sleep(LOOK_S)
        return left

    def look(self, job: str, at: float) -> Verdict:
        """One look at one job, and what follows from it."""
        store, policy = self._stores[job], self._orders.policy
        watch = self._watches[job]
        try:
            if job not in self._known:
                watch = replace(watch, done=read_guarding(store, job))
                self._known.add(job)
            watch = look(watch, at, read_lease(store, job), policy)
        except StoreError as error:
            watch = look(watch, at, None, policy, trouble=str(error))
        self._watches[job] = self._learn_end(job, watch, at)
        verdict = decide(self._watches[job], at, policy)
        self._tell(job, verdict)
        if isinstance(verdict, Resubmit):
            self._resubmit(job, at)
        return verdict

    def _learn_end(self, job: str, watch: Watch, at: float) -> Watch:
        """A submission that failed brings no supervisor: its end is told, and counts."""
        done, lease = watch.done, watch.lease
        if not done.tries or done.refused or watch.trouble or lease is None or lease.term > done.term:
            return watch
        if why := self._submitter.failed(self._name(job, watch)):
            self._say(f"job {job}: what was submitted failed: {why}")
            watch = refused(watch, at, counts=True)
            self._keep(job, watch)
        return watch

    def _resubmit(self, job: str, at: float) -> None:
        watch, store = self._watches[job], self._stores[job]
        try:
            newest = read_guarding(store, job)
            if newest != watch.done and newest.tried_at > watch.done.tried_at:
                self._watches[job] = replace(watch, done=newest)  # another guard was faster: think again
                return
            watch = resubmitted(watch, at)
            write_guarding(store, job, watch.done)
        except StoreError as error:
            self._say(f"job {job}: not submitted: {error}")
            return
        try:
            self._submit(job, watch)
        except ClusterError as error:
            self._say(f"job {job}: could not be submitted: {error}")
            watch = refused(watch, at, counts=False)
            self._keep(job, watch)
        self._watches[job] = watch

    def _submit(self, job: str, watch: Watch) -> None:
        if (why := self._submitter.reachable()) and self._orders.on_loss:
            self._say(f"job {job}: {why}; running: {self._orders.on_loss}")
            told = {"RAY_DR_JOB": job, "RAY_DR_GUARDED_STORE": self._orders.store}
            bring_up(self._orders.on_loss, {**self._orders.environment, **told})
        name = self._name(job, watch)
        self._submitter.resume(job, self._orders.store, name, self._variables(job))
        self._say(f"job {job}: submitted as {name}")

    def _keep(self, job: str, watch: Watch) -> None:
        try:
            write_guarding(self._stores[job], job, watch.done)
        except StoreError as error:
            self._say(f"job {job}: {error}")

    def _name(self, job: str, watch: Watch) -> str:
        """What a submission is called: the same for every guard, so that a cluster takes it once."""
        return f"ray-dr-{job}-{watch.done.term}-{watch.done.tries}"

    def _tell(self, job: str, verdict: Verdict) -> None:
        """Repeat only what changed, numbers that count seconds and steps apart."""
        kind = type(verdict).__name__ + "".join(c for c in verdict.reason.partition(", step")[0] if not c.isdigit())
        if self._told.get(job) != kind:
            self._told[job] = kind
            word = {Wait: "", Resubmit: "submitting it again: ", Leave: "needs no guard any more: "}[type(verdict)]
            self._say(f"job {job}: {word}{verdict.reason}")
