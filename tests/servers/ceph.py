"""A real S3 server: Ceph's gateway over one monitor and one disk of a file, all on loopback, for as long as it is needed.

    with RadosGateway(folder) as gateway:          # some 5 s; raises NotAvailable, saying why
        store = open_store(gateway.url("bucket"))  # credentials: gateway.environment

It is what `install_ceph.sh` unpacked into .ceph. The monitor waits for no second change before it writes one down, else
the dozen changes of a start cost a second each.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.servers.bound import bound

ROOT = Path(__file__).resolve().parents[2]
CEPH = ROOT / ".ceph"
ACCESS_KEY, SECRET_KEY, REGION = "test-key", "test-secret", "us-east-1"
START_S = 90.0
INSTALL_S = 250.0
DISK_BYTES = 6 * 2**30
"""Of the sparse file that is the disk."""

CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}]
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
pid file =
crash dir = {folder}
keyring = {folder}/keyring
osd class dir = {libraries}/rados-classes
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
paxos propose interval = 0.01
paxos min wait = 0.01
[mon]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
osd memory target = 1073741824
bluestore block size = {disk}
"""


class NotAvailable(Exception):
    """Why there is no such server here."""


class RadosGateway:
    """The server. `folder` holds all it writes; leave it to the caller to remove."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        self._libraries = CEPH / "usr/lib/x86_64-linux-gnu"
        self.port = 0

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": REGION}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, bucket: str, prefix: str = "") -> str:
        return f"s3://{bucket}/{prefix}?endpoint={self.endpoint}&region={REGION}"

    def __enter__(self) -> RadosGateway:
        install()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def make_bucket(self, *, versioned: bool = False) -> str:
        """A new bucket's name."""
        import boto3

        client = boto3.client(
            "s3", endpoint_url=self.endpoint, region_name=REGION,
            aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
        )  # fmt: skip
        bucket = f"b-{uuid.uuid4().hex}"
        client.create_bucket(Bucket=bucket)
        if versioned:
            client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        return bucket

    def _start(self) -> None:
        fsid, disk, monitor_port = str(uuid.uuid4()), str(uuid.uuid4()), _free_port()
        conf = CONF.format(
            fsid=fsid, port=monitor_port, folder=self._folder, libraries=self._libraries, disk=DISK_BYTES
        )
        self._folder.joinpath("ceph.conf").write_text(conf)
        self._folder.joinpath("osd").mkdir()
        for name in ("mon.", "client.admin", "osd.0"):
            caps = [word for part in ("mon", "osd") for word in ("--cap", part, "allow *")]
            keyring = self._folder / "keyring"
            create = () if keyring.exists() else ("--create-keyring",)
            self._do("ceph-authtool", str(keyring), *create, "--gen-key", "-n", name, *caps)
        place = f"[v2:127.0.0.1:{monitor_port}]"
        self._do("monmaptool", "--create", "--fsid", fsid, "--addv", "a", place, str(self._folder / "monmap"))
        self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(self._folder / "monmap"),
                 "--keyring", str(self._folder / "keyring"))  # fmt: skip
        self._run("ceph-mon", "-i", "a")
        self._ceph("osd", "new", disk)
        self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._run("ceph-osd", "-i", "0")
        self._until(lambda: '"num_up_osds":1' in self._ceph("osd", "stat", "-f", "json").replace(" ", ""), "its disk")
        user = ("--uid", "test", "--display-name", "test", "--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        self._do("radosgw-admin", "user", "create", *user)
        self.port = _free_port()
        self._run("radosgw", "-n", "client.admin", "--keyring", str(self._folder / "keyring"),
                  f"--rgw-frontends=beast endpoint=127.0.0.1:{self.port} tcp_nodelay=1")  # fmt: skip
        self._until(self._answers, "its gateway")

    def _run(self, program: str, *arguments: str) -> None:
        """Start a daemon that stays in the foreground, and ends with this thread at the latest."""
        log = self._folder.joinpath(f"{program}.out").open("wb")
        with log:
            self._running.append(
                subprocess.Popen(
                    bound([*self._command(program), *arguments, "-f"]), stdout=log, stderr=log, env=self._environment()
                )
            )

    def _do(self, program: str, *arguments: str) -> str:
        """Run something to its end; what it printed."""
        done = subprocess.run(
            bound([*self._command(program), *arguments]),
            env=self._environment(), capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
        if done.returncode:
            raise NotAvailable(f"Ceph's {program} {arguments[0]} failed: {done.stderr[-500:]}")
        return done.stdout

    def _ceph(self, *arguments: str) -> str:
        """A command to the monitor, through Debian's own Python, which its module is built for."""
        python = "/usr/bin/python3"
        done = subprocess.run(
            [python, *self._command("ceph"), "--connect-timeout", str(int(START_S)), *arguments],
            env=self._environment(), capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
        if done.returncode:
            raise NotAvailable(f"Ceph's monitor does not answer to {arguments}: {done.stderr[-500:]}")
        return done.stdout

    def _command(self, program: str) -> list[str]:
        return [str(CEPH / "usr/bin" / program), "-c", str(self._folder / "ceph.conf")]

    def _environment(self) -> dict[str, str]:
        libraries = (self._libraries, self._libraries / "ceph", CEPH / "lib/x86_64-linux-gnu")
        return {
            "PATH": f"{CEPH / 'usr/bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONPATH": str(CEPH / "usr/lib/python3/dist-packages"),
            "HOME": str(self._folder),
        }

    def _until(self, true: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + START_S
        while not true():
            ended = [process.args for process in self._running if process.poll() is not None]
            if ended or time.monotonic() > until:
                raise NotAvailable(f"Ceph did not start {what}: {ended or f'not within {START_S:.0f} s'}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


def install() -> None:
    """Unpack it when it is not there yet. Raises NotAvailable."""
    if not Path("/usr/bin/python3").exists() or shutil.which("sh") is None:
        raise NotAvailable("Ceph's command needs Debian's /usr/bin/python3")
    script = ROOT / "tests/servers/install_ceph.sh"
    try:
        done = subprocess.run(["sh", str(script)], capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"Debian's packages of Ceph did not arrive within {INSTALL_S:.0f} s") from None
    if done.returncode:
        raise NotAvailable(f"Ceph cannot be had from Debian's packages here: {done.stderr[-300:] or 'no such packages'}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
