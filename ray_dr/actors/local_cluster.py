"""A Ray cluster on one machine whose nodes can be killed: for the demo, the tests and the benchmarks.

Theory of operation. `ray start --head --block` runs as a child in a session of its own. With autoscaling, its monitor
runs Ray's real autoscaler over Ray's fake multi-node provider (cluster_configs/local.yaml, local_node.py): ask with
`ray.autoscaler.sdk.request_resources` and raylets appear; kill one and the autoscaler launches another. Without, nodes
are added by hand. Nothing is shared with other clusters of the machine: ports are free ones, the directory is
temporary, so any number can run side by side. Token authentication is on; the token lies in the cluster's directory,
readable by its owner only.

The cluster ends by SIGKILL, process by process (a graceful stop drains for 30 s, and nothing here outlives it anyway):
on `stop`, on leaving the `with`, when the interpreter exits, and, through a small reaper process, when the owner is
killed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import yaml

# Private: a process has one authentication token and caches it; there is no public way to tell Ray that it changed.
from ray._private.services import get_node_ip_address
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled, without stubs

from ray_dr.actors import local_processes
from ray_dr.actors.local_processes import MARKER, Process
from ray_dr.errors import ClusterError

TEMPLATE = Path(__file__).parents[2] / "cluster_configs" / "local.yaml"
START_TIMEOUT_S = 90.0
_STARTED = "Ray runtime started"
_NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
_SOCKET_PATH_BYTES = 107

# What makes a lost node known and replaced within seconds instead of a quarter of a minute. A killed raylet refuses the
# connection and so fails a check at once; a merely slow one has Ray's 10 s per check, twice, before it counts as lost.
_SETTINGS: Mapping[str, str] = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "2",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_METRIC_PORT": "0",  # any free port: the fixed one would clash between clusters
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
_AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True, slots=True)
class LocalNode:
    """A node that runs: its raylet, and all of its processes (raylet, agents, workers and what those started)."""

    node_id: str
    raylet_pid: int
    pids: tuple[int, ...]


class LocalCluster:
    """A cluster from `start` (or `with`) to `stop`; can be started once.

    nodes_max            worker nodes the autoscaler may run at a time
    cpus_per_node        a whole number of CPUs that each of them offers
    object_store_bytes   shared memory of each node, at least 75 MB (Ray's limit)
    env                  set for all processes of the cluster; outranks the cluster's own settings
    autoscaling          False: no autoscaler, nodes come by `add_node`
    dashboard            False: starts faster, but there is no Jobs API
    template             the cluster configuration that is filled in
    """

    def __init__(
        self,
        nodes_max: int = 4,
        *,
        cpus_per_node: float = 1.0,
        object_store_bytes: int = 80 * 2**20,
        head_cpus: int = 0,
        env: Mapping[str, str] | None = None,
        autoscaling: bool = True,
        dashboard: bool = True,
        template: Path = TEMPLATE,
    ) -> None:
        self._nodes_max, self._cpus_per_node = nodes_max, _whole(cpus_per_node)
        self._object_store_bytes, self._head_cpus = object_store_bytes, head_cpus
        self._extra = dict(env or {})
        self._autoscaling, self._dashboard, self._template = autoscaling, dashboard, template
        self._directory: Path | None = None
        self._running = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._sessions: dict[int, int] = {}
        self._node_of: dict[tuple[int, int], str] = {}
        self._reaper: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._host, self._port, self._dashboard_port, self._client_port = "", 0, 0, 0
        self._head_id, self._head_type = "", ""

    # -- what a client needs ------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """`ip:port` for `ray.init(address=...)`."""
        return f"{self._host}:{self._port}"

    @property
    def dashboard_url(self) -> str:
        """Address of the Jobs API. Raises ClusterError on a cluster without a dashboard."""
        if not self._dashboard:
            raise ClusterError("this local cluster was started with dashboard=False and has no Jobs API")
        return f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def temp_dir(self) -> Path:
        """The cluster's directory: token, configuration, sockets, logs. Gone after stop."""
        if self._directory is None or not self._running:
            raise ClusterError("the local cluster is not running (call start, or use it in a with statement)")
        return self._directory

    @property
    def token_file(self) -> Path:
        """The authentication token, mode 0600."""
        return self.temp_dir / "token"

    @property
    def head_id(self) -> str:
        """Node id of the head."""
        return self._head_id

    @property
    def env(self) -> dict[str, str]:
        """Variables with which another process finds the cluster and may talk to it."""
        found = {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return found | ({"RAY_API_SERVER_ADDRESS": self.dashboard_url} if self._dashboard else {})

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Start the head and wait until drivers can connect. Raises ClusterError with the end of Ray's output."""
        if self._directory is not None:
            raise ClusterError("a local cluster can be started once: make another one")
        atexit.register(self.stop)
        try:
            self._prepare()
            self._start_ray(self._head_command(), self._head_id, self.temp_dir / "head.out")
            _admit(self)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every process of the cluster and remove its directory and shared memory. May be called at any time."""
        if self._directory is None or not self._running or os.getpid() != self._owner:
            return
        if ray.is_initialized() and _connected_address() == self.address:
            ray.shutdown()
        local_processes.end_all(self._members)
        for child in self._children:
            child.wait()
        _dismiss(self)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._end_reaper()
        self._running = False
        atexit.unregister(self.stop)

    def leaks(self) -> list[str]:
        """Processes of the cluster that still live, as `pid command`. Empty after stop."""
        return [f"{process.pid} {process.command[:120]}" for process in self._members().values()]

    # -- nodes --------------------------------------------------------------------------------------------------------

    def nodes(self) -> list[LocalNode]:
        """Nodes whose raylet runs, the head first."""
        members = self._members()
        homes = {pid: self._home(process, members) for pid, process in members.items()}
        raylets = sorted((homes[pid], pid) for pid, process in members.items() if _is_raylet(process))
        found = [
            LocalNode(node, pid, tuple(sorted({pid} | {other for other, home in homes.items() if home == node})))
            for node, pid in raylets
        ]
        return sorted(found, key=lambda node: (node.node_id != self._head_id, node.node_id))

    def add_node(self, cpus: float = 1.0, *, labels: Mapping[str, str] | None = None, within: Sequence[str] = (),
                 ip: str = "") -> LocalNode:  # fmt: skip
        """Start one more node, outside the autoscaler's books, and wait until it has joined.

        within, ip   a command that its own is run by (`ip netns exec NAME`), and the address the node has there
        """
        node_id = secrets.token_hex(28)
        command = [*within, sys.executable, "-m", "ray_dr.actors.local_node", "start", "--address", self.address]
        command += ["--node-ip-address", ip] if ip else []
        command += self._common(_whole(cpus))
        if labels:
            command += ["--labels", ",".join(f"{name}={value}" for name, value in labels.items())]
        self._start_ray(command, node_id, self.temp_dir / f"node-{node_id[:8]}.out")
        return self._node(node_id)

    def kill_raylet(self, node_id: str) -> None:
        """SIGKILL only the node's raylet: Ray's own processes are lost, workers find out by themselves."""
        members = self._members()
        local_processes.kill([members[self._node(node_id).raylet_pid]])

    def kill_node(self, node_id: str) -> None:
        """Cut the node's power: SIGKILL to all of its processes at once; what it held in shared memory is gone too.

        With the head goes everything the head runs (GCS, autoscaler, dashboard); worker nodes stay.
        """
        members = self._members()
        doomed = [members[pid] for pid in self._node(node_id).pids if pid in members]
        held = local_processes.shared_memory(doomed)
        local_processes.kill(doomed)
        local_processes.unlink(held - local_processes.shared_memory(self._members().values()))

    def freeze_node(self, node_id: str) -> None:
        """SIGSTOP to all processes of a node: its connections stay, and nothing answers. `kill_node` ends it all the same."""
        members = self._members()
        stopped = [members[pid] for pid in self._node(node_id).pids if pid in members]
        local_processes.kill(stopped, with_signal=signal.SIGSTOP)

    def _node(self, node_id: str) -> LocalNode:
        for node in self.nodes():
            if node.node_id == node_id:
                return node
        raise ClusterError(f"no node {node_id} runs in the local cluster {self.address}")

    # -- processes ----------------------------------------------------------------------------------------------------

    def _members(self) -> dict[int, Process]:
        if self._directory is None:
            return {}
        return local_processes.members(local_processes.read_processes(), self._directory, self._sessions)

    def _home(self, process: Process, members: Mapping[int, Process]) -> str:
        """Node id of a process: what its environment said when it was first seen (titles overwrite it later)."""
        key = (process.pid, process.started)
        known = self._node_of.get(key) or process.carries(_NODE_ID)
        if len(known) != len(self._head_id):  # overwritten, in whole or in part: as the process that started it
            known = self._home(members[process.parent], members) if process.parent in members else ""
        if known:
            self._node_of[key] = known
        return known

    def _start_ray(self, command: list[str], node_id: str, output: Path) -> None:
        with output.open("wb") as sink:
            child = subprocess.Popen(
                command,
                env=self._environment(node_id),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for us; we end the cluster in order
            )
        self._children.append(child)
        started = local_processes.read_processes().get(child.pid)
        self._sessions[child.pid] = started.started if started else 0
        local_processes.write_sessions(self.temp_dir, self._sessions)
        _await_start(child, output)

    def _environment(self, node_id: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in {*_AUTHENTICATION, "RAY_ADDRESS"}}
        node = {_NODE_ID: node_id, "RAY_CLOUD_INSTANCE_ID": node_id, MARKER: str(self.temp_dir)}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}
        if node_id == self._head_id:
            node["RAY_NODE_TYPE_NAME"] = self._head_type
        return {**inherited, **_SETTINGS, **self._extra, **node, **token}

    def _head_command(self) -> list[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port", str(self._port)]
        command += ["--temp-dir", str(self.temp_dir / "ray"), "--node-ip-address", self._host]
        command += ["--ray-client-server-port", str(self._client_port), "--dashboard-port", str(self._dashboard_port)]
        command += ["--include-dashboard", str(self._dashboard).lower()]
        if self._autoscaling:
            command += ["--autoscaling-config", str(self.temp_dir / "cluster.yaml")]
        return command + self._common(self._head_cpus)

    def _common(self, cpus: int) -> list[str]:
        # Port ranges of several nodes on one machine would overlap: 0 lets the kernel choose.
        return [
            "--block",
            "--disable-usage-stats",
            *("--num-cpus", str(cpus)),
            *("--object-store-memory", str(self._object_store_bytes)),
            *("--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"),
        ]

    # -- setting up ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self._directory, self._running = Path(tempfile.mkdtemp(prefix="rdr-")), True
        _check_socket_room(self._directory)
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", local_processes.__name__, str(self._directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._host = get_node_ip_address()
        self._port, self._dashboard_port, self._client_port = _free_ports(3)
        descriptor = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as sink:
            sink.write(_token())
        config = self._config()
        self._head_id, self._head_type = config["provider"]["head_node_id"], config["head_node_type"]
        (self.temp_dir / "cluster.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def _config(self) -> dict[str, Any]:
        """The template with this cluster's address, sizes and limits."""
        if not self._template.exists():
            raise ClusterError(
                f"{self._template} is missing: a local cluster needs a checkout of ray-dr, or `template=`"
            )
        config: dict[str, Any] = yaml.safe_load(self._template.read_text())
        config["max_workers"] = self._nodes_max
        config["provider"]["gcs_address"] = self.address
        config["available_node_types"][config["head_node_type"]]["resources"] = {"CPU": self._head_cpus}
        worker = config["available_node_types"]["worker"]
        worker["max_workers"] = self._nodes_max
        worker["resources"] = {"CPU": self._cpus_per_node, "object_store_memory": self._object_store_bytes}
        return config

    def _end_reaper(self) -> None:
        if self._reaper is not None and self._reaper.stdin is not None:
            self._reaper.stdin.close()
            self._reaper.wait()
            self._reaper = None


def _whole(cpus: float) -> int:
    if cpus != int(cpus) or cpus < 0:
        raise ClusterError(f"a local node offers a whole number of CPUs, not {cpus}")
    return int(cpus)


def _is_raylet(process: Process) -> bool:
    return process.command.partition(" ")[0].endswith("/raylet")


def _await_start(child: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while _STARTED not in output.read_text(errors="replace"):
        if child.poll() is not None or time.monotonic() > deadline:
            shown = "\n".join(output.read_text(errors="replace").splitlines()[-20:])
            raise ClusterError(f"ray did not start (exit status {child.poll()}); the end of its output:\n{shown}")
        time.sleep(0.05)


def _check_socket_room(directory: Path) -> None:
    longest = directory / "ray" / "session_2026-01-01_00-00-00_000000_1000000" / "sockets" / "plasma_store.10"
    if len(str(longest)) > _SOCKET_PATH_BYTES:
        raise ClusterError(f"{directory.parent} is too long a path for Ray's sockets (set TMPDIR to a shorter one)")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [int(each.getsockname()[1]) for each in sockets]


# -- the process's own authentication ---------------------------------------------------------------------------------
# A process has one token, read once. So all clusters of one process share one, and the process's environment points to
# the newest cluster's file; with the last cluster gone the environment is again as it was found.


@functools.cache
def _token() -> str:
    return secrets.token_hex(32)


_running: list[LocalCluster] = []
_found: dict[str, str | None] = {}


def _admit(cluster: LocalCluster) -> None:
    if not _running:
        _found.update({name: os.environ.get(name) for name in _AUTHENTICATION})
    _running.append(cluster)
    _follow_newest()


def _dismiss(cluster: LocalCluster) -> None:
    if cluster in _running:
        _running.remove(cluster)
        _follow_newest()


def _follow_newest() -> None:
    for name in _AUTHENTICATION:
        value = _running[-1].env.get(name) if _running else _found[name]
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    Config.initialize("")  # first: a draining thread must not reload a token in token mode when there is none
    AuthenticationTokenLoader.instance().reset_cache()


def _connected_address() -> str:
    return str(ray.get_runtime_context().gcs_address)
