"""Jobs API: what a guard asks of a cluster that it is no part of. Ray's token authentication applies as it does for `ray job`."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ray.job_submission import JobStatus, JobSubmissionClient

from ray_dr.errors import ClusterError

T = TypeVar("T")
ANSWER_S = 60.0
TAIL_CHARS = 600


class Submitter:
    """The cluster whose Jobs API answers at `address`; `python` runs ray_dr there."""

    def __init__(self, address: str, python: str) -> None:
        self._address, self._python = address, python
        self._pool = ThreadPoolExecutor(4, "jobs-api")

    def reachable(self) -> str:
        """Why the cluster can't be asked; empty when it can."""
        try:
            self._ask(lambda client: client.get_version())
        except ClusterError as error:
            return str(error)
        return ""

    def resume(self, job: str, store: str, name: str, environment: Mapping[str, str]) -> None:
        """Have `ray-dr resume` run there, as a submission of that name; nothing where there is one. Raises ClusterError."""
        words = [*shlex.split(self._python), "-m", "ray_dr.cli.main", "resume", job, "--store", store, "--detach"]
        runtime = {"env_vars": dict(environment)} if environment else {}
        try:
            self._ask(lambda client: client.submit_job(
                entrypoint=shlex.join(words), submission_id=name, runtime_env=runtime, metadata={"ray_dr": job},
            ))  # fmt: skip
        except ClusterError:
            if not self._known(name):  # else another guard was faster, or only the answer was lost
                raise

    def failed(self, name: str) -> str:
        """The end of what a submission said, when it has failed; empty otherwise, also when it can't be told."""
        try:
            if self._ask(lambda client: client.get_job_status(name)) not in (JobStatus.FAILED, JobStatus.STOPPED):
                return ""
            return self._ask(lambda client: client.get_job_logs(name))[-TAIL_CHARS:].strip() or "it said nothing"
        except ClusterError:
            return ""

    def _known(self, name: str) -> bool:
        try:
            self._ask(lambda client: client.get_job_status(name))
        except ClusterError:
            return False
        return True

    def _ask(self, question: Callable[[JobSubmissionClient], T]) -> T:
        """The answer, within ANSWER_S: a head that is frozen takes a connection and says nothing."""
        try:
            return self._pool.submit(lambda: question(JobSubmissionClient(self._address))).result(ANSWER_S)
        except TimeoutError as error:
            raise ClusterError(f"{self._address} does not answer within {ANSWER_S:g} s") from error
        except Exception as error:
            raise ClusterError(f"{self._address}: {type(error).__name__}: {error}") from error


def bring_up(how: str, environment: Mapping[str, str]) -> None:
    """Run what brings a cluster up: a shell command, or `ray up` with a cluster's YAML. Raises ClusterError."""
    is_file = how.endswith((".yaml", ".yml")) and " " not in how
    words = [sys.executable, "-m", "ray.scripts.scripts", "up", "-y", how] if is_file else ["/bin/sh", "-c", how]
    done = subprocess.run(words, env=dict(environment), stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ClusterError(f"{how} ended with status {done.returncode}")
