"""What a node's surroundings say about its end: its cloud's metadata service, or a file that a script of the site writes.

    aws         instance metadata v2: spot/instance-action; a rebalance recommendation is told, and nothing is done about it
    gcp         instance/preempted, instance/maintenance-event
    azure       Scheduled Events that are about this machine
    file:PATH   the node leaves once PATH exists; what it holds is in how many seconds from its time of change on (empty:
                nobody knows). For a preStop hook, a batch system's warning signal, an operator

Nobody is asked who was not named: a metadata address means something else outside of its cloud. `aws@http://host:port` asks
there instead. What can't be asked now is asked again; a service that never answers is noted once.
"""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Protocol

from ray_dr.errors import ConfigError
from ray_dr.model import codec
from ray_dr.model.signal import Notice
from ray_dr.stores.wire import Header

EVERY_S = 2.0
TIMEOUT_S = 1.0
ANSWER_MAX_BYTES = 2**20
TOKEN_S = 21_600
GCP_PREEMPTED_S, GCP_MAINTENANCE_S = 30.0, 60.0
"""What Google promises at least from the word until the end; it does not say since when the word has been standing there."""


@dataclass(frozen=True, slots=True)
class Said:
    """`deadline`: UTC seconds; inf: nobody said when. `certain`: see `Notice`."""

    source: str
    deadline: float
    certain: bool = True


class Source(Protocol):
    """Somebody who may know. `read` gives all that stands there now; raises OSError or ValueError when it can't be known."""

    def read(self, now: float) -> tuple[Said, ...]: ...


def open_source(text: str) -> Source:
    """`aws`, `gcp`, `azure`, any of them with `@http://host:port`, or `file:/path`. Raises ConfigError."""
    name, _, url = text.partition("@")
    match name:
        case "aws":
            return Aws(url or "http://169.254.169.254")
        case "gcp":
            return Gcp(url or "http://metadata.google.internal")
        case "azure":
            return Azure(url or "http://169.254.169.254")
        case _ if text.startswith("file:/"):
            return NoticeFile(Path(text.removeprefix("file:")))
        case _:
            raise ConfigError(f"{text!r} gives no notices", key="recovery.notices",
                              remedy="write aws, gcp, azure, or file:/path")  # fmt: skip


class Aws:
    """Instance metadata, version 2: each question carries a token that is asked for before."""

    def __init__(self, url: str) -> None:
        self._url, self._token = url.rstrip("/"), ""

    def read(self, now: float) -> tuple[Said, ...]:
        """A spot instance's end, two minutes before it."""
        action, rebalance = self._get("spot/instance-action"), self._get("events/recommendations/rebalance")
        said = []
        if action is not None:
            told = _object(action)
            said.append(Said(f"aws spot {told.get('action', 'end')}", _iso(told["time"])))
        if rebalance is not None:
            said.append(Said("aws rebalance recommendation", math.inf, certain=False))
        return tuple(said)

    def _get(self, path: str) -> str | None:
        try:
            return self._ask(path)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
        self._token = ""  # it has run out
        return self._ask(path)

    def _ask(self, path: str) -> str | None:
        if not self._token:
            lasts = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
            self._token = _fetch(f"{self._url}/latest/api/token", lasts, method="PUT") or ""
        return _fetch(f"{self._url}/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})


class Gcp:
    """Google's words carry no time: it counts from when they were first seen."""

    def __init__(self, url: str) -> None:
        self._url = f"{url.rstrip('/')}/computeMetadata/v1/instance"
        self._first: dict[str, float] = {}

    def read(self, now: float) -> tuple[Said, ...]:
        """That it is being preempted, or will be ended for maintenance; a live migration is no end."""
        said = []
        if self._get("preempted") == "TRUE":
            said.append(Said("gcp preempted", self._first.setdefault("preempted", now) + GCP_PREEMPTED_S))
        match self._get("maintenance-event"):
            case "TERMINATE_ON_HOST_MAINTENANCE":
                said.append(Said("gcp maintenance", self._first.setdefault("maintenance", now) + GCP_MAINTENANCE_S))
            case "MIGRATE_ON_HOST_MAINTENANCE":
                said.append(Said("gcp live migration", math.inf, certain=False))
        return tuple(said)

    def _get(self, path: str) -> str:
        return (_fetch(f"{self._url}/{path}", {"Metadata-Flavor": "Google"}) or "").strip()


class Azure:
    """Scheduled Events; those of other machines of the scale set are told as well, and left out."""

    ENDS = ("Preempt", "Terminate", "Redeploy", "Reboot")

    def __init__(self, url: str) -> None:
        self._url, self._name = f"{url.rstrip('/')}/metadata", ""

    def read(self, now: float) -> tuple[Said, ...]:
        """One for each event; a freeze passes."""
        if not self._name:
            self._name = (self._get("instance/compute/name?api-version=2021-02-01&format=text") or "").strip()
        events = _object(self._get("scheduledevents?api-version=2020-07-01") or "{}").get("Events", [])
        if not isinstance(events, list):
            raise ValueError("Azure's Events are no list")
        return tuple(self._said(event, now) for event in events if isinstance(event, dict) and self._mine(event))

    def _mine(self, event: Mapping[str, object]) -> bool:
        resources = event.get("Resources")
        return not self._name or not isinstance(resources, list) or self._name in resources

    def _said(self, event: Mapping[str, object], now: float) -> Said:
        kind, before = str(event.get("EventType")), str(event.get("NotBefore") or "")
        if kind not in self.ENDS:
            return Said(f"azure {kind.lower()}", math.inf, certain=False)
        return Said(f"azure {kind.lower()}", parsedate_to_datetime(before).timestamp() if before else now)

    def _get(self, path: str) -> str | None:
        return _fetch(f"{self._url}/{path}", {"Metadata": "true"})


class NoticeFile:
    """A file that somebody puts there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, now: float) -> tuple[Said, ...]:
        """When it is there, the node leaves."""
        try:
            text, written_at = self._path.read_text()[:64].strip(), self._path.stat().st_mtime
        except FileNotFoundError:
            return ()
        return (Said(f"file {self._path}", written_at + float(text) if text else math.inf),)


class Lookout:
    """Asks the named sources in a thread of its own, as long as its process lives. `note(name, fields)` tells of trouble."""

    def __init__(self, sources: Sequence[str], note: Callable[[str, dict[str, object]], None]) -> None:
        self._sources = {text: open_source(text) for text in sources}
        self._note, self._away = note, set[str]()
        self.said: tuple[Said, ...] = ()
        self._closing = threading.Event()
        if sources:
            threading.Thread(target=self._run, name="lookout", daemon=True).start()

    def close(self) -> None:
        """Ask no more."""
        self._closing.set()

    def look(self) -> None:
        """Ask each once; what one that does not answer had said before goes on to count."""
        found: list[Said] = []
        for text, source in self._sources.items():
            try:
                found += source.read(time.time())
                self._away.discard(text)
            except (OSError, ValueError, KeyError, TypeError) as error:
                found += [said for said in self.said if said.source.startswith(text.partition("@")[0].partition(":")[0])]
                if text not in self._away:
                    self._note("notices.unavailable", {"source": text, "error": str(error)[:200]})
                self._away.add(text)
        self.said = tuple(found)

    def listener(self) -> Callable[[], list[Header]]:
        """What tells the news to one who watches."""
        told: tuple[Said, ...] = ()

        def news() -> list[Header]:
            nonlocal told
            if self.said == told:
                return []
            told = self.said
            now = time.time()
            notices = tuple(Notice(said.source, said.deadline - now, said.certain) for said in told)
            return [{"notices": codec.to_json(notices)}]

        return news

    def _run(self) -> None:
        while not self._closing.is_set():
            self.look()
            self._closing.wait(EVERY_S)


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A metadata service is on the machine's own link: never behind the proxy of the environment."""


def _fetch(url: str, headers: Mapping[str, str], *, method: str = "GET") -> str | None:
    """The answer's text; None: there is nothing (404). Raises OSError."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _opener.open(request, timeout=TIMEOUT_S) as answer:
            return str(answer.read(ANSWER_MAX_BYTES).decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                return None
        raise


def _object(text: str) -> dict[str, object]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _iso(text: object) -> float:
    return datetime.fromisoformat(str(text)).timestamp()
