"""Ray's own front doors: the Jobs API and `ray job submit`, with token authentication; and what becomes of a killed driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from ray_dr.actors.local_cluster import LocalCluster
from ray_dr.model.recovery import Finished
from ray_dr.stores.open import open_store
from ray_dr.telemetry.journal import read_journal
from ray_dr.telemetry.timeline import status, verify_data
from tests.ray import jobs

pytestmark = pytest.mark.ray
EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt"
STEPS = 120


def driver_pid(cluster: LocalCluster) -> int | None:
    """The process of the submitted script itself: no shell, no Ray process around it."""
    for node in cluster.nodes():
        for pid in node.pids:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if Path(f"/proc/{pid}").exists() else []
            if len(words) > 1 and words[-2].endswith(b"train.py") and b"python" in words[0]:
                return pid
    return None


def phase(store: Path) -> str:
    records = list(read_journal(open_store(f"file://{store}"), "gpt"))
    return status(records).phase if records else ""


def wait_for_end(store: Path) -> None:
    jobs.until(lambda: phase(store) in ("finished", "failed"), "the job's end")
    assert phase(store) == "finished"
    report = verify_data(list(read_journal(open_store(f"file://{store}"), "gpt")))
    assert report.ok, report
    assert report.steps == STEPS


def step(store: Path) -> int:
    records = list(read_journal(open_store(f"file://{store}"), "gpt"))
    return status(records).step if records else 0


def test_a_job_submitted_through_the_jobs_api_finishes_without_its_driver(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    client = JobSubmissionClient(cluster.dashboard_url)
    name = client.submit_job(
        entrypoint=f"{sys.executable} train.py",
        runtime_env={"working_dir": str(EXAMPLE), "env_vars": {"RAY_DR_STORE": str(tmp_path)}},
    )
    jobs.until(lambda: step(tmp_path) >= 20, "twenty steps")
    pid = jobs.until(lambda: driver_pid(cluster), "the driver")
    os.kill(pid, signal.SIGKILL)
    jobs.until(lambda: client.get_job_status(name) == JobStatus.FAILED, "Ray's word on the driver")
    wait_for_end(tmp_path)


def test_a_job_submitted_on_the_command_line_finishes(cluster: LocalCluster, tmp_path: Path) -> None:
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(EXAMPLE)]
    done = subprocess.run(
        [*ray, "--runtime-env-json", f'{{"env_vars": {{"RAY_DR_STORE": "{tmp_path}"}}}}', "--",
         sys.executable, "train.py"],
        env=os.environ | cluster.env, capture_output=True, text=True, timeout=jobs.WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Finished" in done.stdout
    wait_for_end(tmp_path)


def test_a_wrong_token_is_refused(cluster: LocalCluster) -> None:
    wrong = os.environ | cluster.env | {"RAY_AUTH_TOKEN": "f" * 64}
    del wrong["RAY_AUTH_TOKEN_PATH"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "list"]
    done = subprocess.run(ray, env=wrong, capture_output=True, text=True, timeout=jobs.WAIT_S, check=False)
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()


def test_ctrl_c_drains_and_running_again_goes_on(cluster: LocalCluster, tmp_path: Path) -> None:
    environment = os.environ | cluster.env | {"RAY_DR_STORE": str(tmp_path)}
    first = subprocess.Popen(
        [sys.executable, "train.py"], cwd=EXAMPLE, env=environment, stderr=subprocess.PIPE, text=True
    )
    jobs.until(lambda: step(tmp_path) >= 20, "twenty steps")
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=jobs.WAIT_S)
    assert first.returncode == 0, said
    records = list(read_journal(open_store(f"file://{tmp_path}"), "gpt"))
    ended = [r.state.phase for r in records if hasattr(r, "state")][-1]
    assert ended == Finished(drained=True)
    stopped_at = status(records).step
    assert 20 <= stopped_at < STEPS
    subprocess.run([sys.executable, "train.py"], cwd=EXAMPLE, env=environment, check=True, timeout=jobs.WAIT_S)
    wait_for_end(tmp_path)
