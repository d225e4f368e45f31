"""The tests' servers end with the tests, however those end."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTER = """
import subprocess, sys, time
from tests.servers.bound import bound
subprocess.Popen(bound([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]))
time.sleep(60)
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no util-linux")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_with_whoever_was_killed_that_started_it(how: signal.Signals) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER], cwd=ROOT, stdout=subprocess.PIPE)
    with starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        starter.send_signal(how)
        rest, _ = starter.communicate(timeout=30)  # until nobody holds the output any more, the server neither
        assert rest == b""
    assert starter.returncode == -how
