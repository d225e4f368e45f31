"""Nodes with a network of their own on one machine: a namespace each, on a bridge of the machine's. Takes root, and `ip`.

    with Network() as network:
        place = network.place()
        cluster.add_node(within=place.command, ip=place.ip)
        network.cut_off(place)      # its link is down: nobody reaches it
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

HOSTS = Path("/etc/netns")
"""Where `ip netns exec` looks for what a namespace has in place of files of /etc."""


@dataclass(frozen=True, slots=True)
class Place:
    """A namespace, its address, and the bridge's end of its link."""

    name: str
    ip: str
    link: str

    @property
    def command(self) -> tuple[str, ...]:
        """What runs a command there."""
        return "ip", "netns", "exec", self.name


class Network:
    """Gone with all its namespaces when the `with` is left."""

    def __init__(self) -> None:
        self._name = f"rd{secrets.token_hex(2)}"
        self._prefix = f"10.{77 + secrets.randbelow(100)}.{secrets.randbelow(256)}"
        self._places: list[Place] = []

    def __enter__(self) -> Self:
        _ip("link", "add", self._name, "type", "bridge")
        try:
            _ip("addr", "add", f"{self._prefix}.1/24", "dev", self._name)
            _ip("link", "set", self._name, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove all of it; what runs there still has no network then."""
        for place in self._places:
            shutil.rmtree(HOSTS / place.name, ignore_errors=True)
            with contextlib.suppress(RuntimeError):
                _ip("netns", "del", place.name)
        _ip("link", "del", self._name)

    def place(self) -> Place:
        """One more namespace, reached by the machine and by the others, reaching them. Its own name is its address there."""
        number = len(self._places) + 2
        place = Place(f"{self._name}-{number}", f"{self._prefix}.{number}", f"{self._name}l{number}")
        _ip("netns", "add", place.name)
        self._places.append(place)
        inside = f"{self._name}i{number}"
        _ip("link", "add", place.link, "type", "veth", "peer", "name", inside, "netns", place.name)
        _ip("link", "set", place.link, "master", self._name, "up")
        _ip("-n", place.name, "addr", "add", f"{place.ip}/24", "dev", inside)
        for up in ("lo", inside):
            _ip("-n", place.name, "link", "set", up, "up")
        _ip("-n", place.name, "route", "add", "default", "via", f"{self._prefix}.1")
        (HOSTS / place.name).mkdir(parents=True)
        (HOSTS / place.name / "hosts").write_text(f"127.0.0.1 localhost\n{place.ip} {socket.gethostname()}\n")
        return place

    def cut_off(self, place: Place) -> None:
        """No way to it from anywhere. Raises RuntimeError when its link is not seen to be down then."""
        _ip("link", "set", place.link, "down")
        if "state DOWN" not in _ip("link", "show", place.link):
            raise RuntimeError(f"the link of {place.name} is up still")

    def part(self, one: Place, other: Place) -> None:
        """No way between two; all others reach both. Raises RuntimeError when there is one still."""
        for place, away in ((one, other), (other, one)):
            _ip("-n", place.name, "route", "add", "blackhole", f"{away.ip}/32")
            if "blackhole" not in _ip("-n", place.name, "route", "show", f"{away.ip}/32"):
                raise RuntimeError(f"{place.name} reaches {away.name} still")

    def join(self, one: Place, other: Place) -> None:
        """The way between two is open again."""
        for place, away in ((one, other), (other, one)):
            _ip("-n", place.name, "route", "del", "blackhole", f"{away.ip}/32")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
