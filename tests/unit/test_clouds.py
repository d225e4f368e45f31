"""What clouds say of a machine's end, from real servers that speak as theirs do, and what an agent makes of it."""

from __future__ import annotations

import http.server
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_dr import config
from ray_dr.actors.clouds import Lookout, Said, open_source
from ray_dr.actors.node_agent import Agent
from ray_dr.errors import ConfigError
from ray_dr.stores.wire import connect

NOW = 1_700_000_000.0


class Metadata:
    """A metadata service: `paths` says what stands where (a 404 elsewhere), `needs` which header every question must carry."""

    def __init__(self, needs: tuple[str, str]) -> None:
        self.paths: dict[str, str] = {}
        self.tokens = 0
        self.asked: list[str] = []
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                assert self.path == "/latest/api/token"
                assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
                service.tokens += 1
                self._answer(200, f"token-{service.tokens}")

            def do_GET(self) -> None:
                service.asked.append(self.path)
                name, value = needs
                wanted = f"token-{service.tokens}" if value == "token" else value
                if self.headers[name] != wanted:
                    self._answer(401, "who are you?")
                elif self.path in service.paths:
                    self._answer(200, service.paths[self.path])
                else:
                    self._answer(404, "not found")

            def _answer(self, status: int, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def metadata(name: str, value: str) -> Iterator[Metadata]:
    service = Metadata((name, value))
    threading.Thread(target=service.server.serve_forever, daemon=True).start()
    try:
        yield service
    finally:
        service.server.shutdown()
        service.server.server_close()


def test_a_spot_instance_of_aws_learns_its_end_with_a_token() -> None:
    with metadata("X-aws-ec2-metadata-token", "token") as aws:
        source = open_source(f"aws@{aws.url}")
        assert source.read(NOW) == ()
        aws.paths["/latest/meta-data/spot/instance-action"] = '{"action": "terminate", "time": "2023-11-14T22:15:20Z"}'
        assert source.read(NOW) == (Said("aws spot terminate", NOW + 120.0),)
        assert aws.tokens == 1, "a token serves for many questions"


def test_a_token_of_aws_that_has_run_out_is_asked_for_again() -> None:
    with metadata("X-aws-ec2-metadata-token", "token") as aws:
        source = open_source(f"aws@{aws.url}")
        source.read(NOW)
        aws.tokens += 1  # what the service gave before counts no more
        aws.paths["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "2023-11-14T22:13:20Z"}'
        assert source.read(NOW) == (Said("aws rebalance recommendation", math.inf, certain=False),)


def test_an_instance_of_gcp_counts_from_when_it_first_saw_the_word() -> None:
    base = "/computeMetadata/v1/instance"
    with metadata("Metadata-Flavor", "Google") as gcp:
        gcp.paths = {f"{base}/preempted": "FALSE", f"{base}/maintenance-event": "NONE"}
        source = open_source(f"gcp@{gcp.url}")
        assert source.read(NOW) == ()
        gcp.paths[f"{base}/preempted"] = "TRUE\n"
        assert source.read(NOW + 5) == source.read(NOW + 9) == (Said("gcp preempted", NOW + 35),)
        gcp.paths = {f"{base}/preempted": "FALSE", f"{base}/maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
        assert source.read(NOW + 10) == (Said("gcp maintenance", NOW + 70),)
        gcp.paths[f"{base}/maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
        assert [said.certain for said in source.read(NOW + 11)] == [False]


def test_a_machine_of_azure_hears_its_own_events_only() -> None:
    def event(kind: str, machine: str, before: str) -> dict[str, object]:
        return {"EventType": kind, "ResourceType": "VirtualMachine", "Resources": [machine], "NotBefore": before}

    events = [
        event("Preempt", "vm_1", "Tue, 14 Nov 2023 22:13:50 GMT"), event("Reboot", "vm_2", "Tue, 14 Nov 2023 22:13:50 GMT"),
        event("Freeze", "vm_1", ""), event("Terminate", "vm_1", ""),
    ]  # fmt: skip
    with metadata("Metadata", "true") as azure:
        azure.paths["/metadata/instance/compute/name?api-version=2021-02-01&format=text"] = "vm_1"
        azure.paths["/metadata/scheduledevents?api-version=2020-07-01"] = json.dumps({"Events": events})
        assert open_source(f"azure@{azure.url}").read(NOW) == (
            Said("azure preempt", NOW + 30), Said("azure freeze", math.inf, certain=False), Said("azure terminate", NOW),
        )  # fmt: skip


def test_a_file_says_it_for_everybody_else(tmp_path: Path) -> None:
    path = tmp_path / "leaves"
    source = open_source(f"file:{path}")
    assert source.read(NOW) == ()
    path.touch()
    assert source.read(NOW) == (Said(f"file {path}", math.inf),)
    path.write_text("30\n")
    os.utime(path, (NOW, NOW))
    assert source.read(NOW + 10) == (Said(f"file {path}", NOW + 30),)


def test_a_service_that_is_away_is_noted_once_and_takes_nothing_back(tmp_path: Path) -> None:
    noted: list[str] = []
    with metadata("X-aws-ec2-metadata-token", "token") as aws:
        aws.paths["/latest/meta-data/spot/instance-action"] = '{"action": "stop", "time": "2023-11-14T22:15:20Z"}'
        lookout = Lookout([], lambda name, fields: noted.append(name))
        lookout._sources = {f"aws@{aws.url}": open_source(f"aws@{aws.url}")}
        lookout.look()
        assert [said.source for said in lookout.said] == ["aws spot stop"]
        aws.paths["/latest/meta-data/spot/instance-action"] = "no JSON"
        lookout.look()
        lookout.look()
    lookout.look()
    assert noted == ["notices.unavailable"]
    assert [said.source for said in lookout.said] == ["aws spot stop"]


def test_what_is_new_is_told_once_to_each_who_watches(tmp_path: Path) -> None:
    path = tmp_path / "leaves"
    lookout = Lookout([], lambda name, fields: None)
    lookout._sources = {f"file:{path}": open_source(f"file:{path}")}
    first, second = lookout.listener(), lookout.listener()
    lookout.look()
    assert first() == []
    path.write_text("30")
    lookout.look()
    (told,) = first()
    assert told["notices"][0]["source"] == f"file {path}"
    assert 0 < told["notices"][0]["left_s"] <= 30
    assert first() == []
    assert len(second()) == 1


def test_nobody_is_asked_who_was_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_DR_NOTICES", raising=False)
    assert config.parse("job: j\nstore: /tmp/x").recovery.notices == ()
    assert config.parse("job: j\nstore: /tmp/x\nrecovery: {notices: off}").recovery.notices == ()
    given = config.parse("job: j\nstore: /tmp/x\nrecovery: {notices: 'aws, file:/run/leaves'}").recovery.notices
    assert given == ("aws", "file:/run/leaves")
    monkeypatch.setenv("RAY_DR_NOTICES", "gcp@http://127.0.0.1:1")
    assert config.parse("job: j\nstore: /tmp/x").recovery.notices == ("gcp@http://127.0.0.1:1",)
    assert config.parse("job: j\nstore: /tmp/x\nrecovery: {notices: 'off'}").recovery.notices == ()
    with pytest.raises(ConfigError, match=r"recovery\.notices: 'ibm' gives no notices"):
        config.parse("job: j\nstore: /tmp/x\nrecovery: {notices: ibm}")
    monkeypatch.setenv("RAY_DR_NOTICES", "ibm")
    with pytest.raises(ConfigError, match="RAY_DR_NOTICES"):
        config.parse("job: j\nstore: /tmp/x")


@pytest.mark.parametrize("text", ["ibm", "file:relative", "", "aws2"])
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="gives no notices"):
        open_source(text)


def test_an_agent_reports_what_its_cloud_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_dr.actors.clouds.EVERY_S", 0.01)
    token = bytes(32)
    with metadata("X-aws-ec2-metadata-token", "token") as aws:
        agent = Agent("n1", "127.0.0.1", "memory://clouds", token, notices=(f"aws@{aws.url}",))
        try:
            connection = connect(agent.address, token)
            connection.timeout(10.0)
            connection.send({"op": "watch"})
            aws.paths["/latest/meta-data/spot/instance-action"] = '{"action": "terminate", "time": "2023-11-14T22:15:20Z"}'
            told: list[Any] = []
            while not told:
                header, _ = connection.receive()
                told = [message for message in header["messages"] if "notices" in message]
            connection.close()
        finally:
            agent.close()
    (notice,) = told[0]["notices"]
    assert (notice["source"], notice["certain"]) == ("aws spot terminate", True)
    assert notice["left_s"] < 0, "long ago"
