"""A small S3 server that misbehaves on request. SigV4 is really checked; a put shows whole or not at all.

    with S3Server() as server:
        store = open_store(server.url("bucket"))           # credentials: server.environment
        server.plan("503", method="PUT", times=2)

Faults: "503" (refused, not applied), "drop" (connection closed before it is applied), "apply_then_drop" (applied, then
closed without an answer), "cut" (closed after `amount` bytes of the answer's body), "delay" (`amount` seconds first),
"flip" (lowest bit of the answer's first byte flipped), or any "<status> <Code>" such as "507 InsufficientStorage".
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape

ACCESS_KEY, SECRET_KEY, REGION = "test-key", "test-secret", "us-east-1"
MOST_SKEW_S = 900
EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass
class Fault:
    kind: str
    method: str
    times: int
    amount: float
    contains: str


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    raw_query: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Answer:
    status: int
    body: bytes | memoryview = b""
    headers: dict[str, str] = field(default_factory=dict)


class S3Server:
    """One bucket namespace in memory, on a free loopback port. `conditional=False` ignores If-None-Match. Its clock is
    `ahead_s` seconds ahead of this machine's; more than 15 minutes between it and the caller's are too much."""

    def __init__(self, *, conditional: bool = True, page: int = 1000, ahead_s: float = 0.0) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.port = 0
        self._conditional = conditional
        self.ahead_s = ahead_s
        self._page = page
        self._faults: list[Fault] = []
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="s3-server", daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": REGION}

    def url(self, bucket: str) -> str:
        return f"s3://{bucket}?endpoint=http://127.0.0.1:{self.port}&region={REGION}"

    def plan(self, kind: str, *, method: str, times: int = 1, amount: float = 0, contains: str = "") -> None:
        self._faults.append(Fault(kind, method, times, amount, contains))

    def forgive(self) -> None:
        """Drop the faults that are still planned."""
        self._faults.clear()

    def __enter__(self) -> S3Server:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=4 * 2**20)
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False when the connection is to be closed."""
        request = await _read_head(reader)
        self.requests.append((request.method, request.path))
        if request.headers.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = await reader.readexactly(int(request.headers.get("content-length", "0")))
        fault = self._take(request)
        kind = fault.kind if fault else ""
        if fault and kind == "delay":
            await asyncio.sleep(fault.amount)
        if kind == "drop":
            return False
        if fault and kind[:3].isdigit():
            answer = _error(int(kind[:3]), kind[4:] or "SlowDown")
        else:
            answer = _check_signature(request, self.ahead_s) or self._apply(request)
        if kind == "apply_then_drop":
            return False
        if kind == "flip" and answer.body:
            answer.body = bytes([answer.body[0] ^ 1]) + bytes(answer.body[1:])
        cut = int(fault.amount) if fault and kind == "cut" else None
        await _write(writer, request, answer, cut)
        return cut is None

    def _take(self, request: Request) -> Fault | None:
        for fault in self._faults:
            if fault.method == request.method and fault.times > 0 and fault.contains in request.path:
                fault.times -= 1
                return fault
        return None

    def _apply(self, request: Request) -> Answer:
        bucket, _, key = request.path.lstrip("/").partition("/")
        name = f"{bucket}/{key}"
        match request.method:
            case "GET" if not key:
                return self._list(bucket, request.query)
            case "GET" | "HEAD":
                return self._get(name, request)
            case "PUT" if "uploadId" in request.query:
                self.uploads[request.query["uploadId"]][int(request.query["partNumber"])] = request.body
                return Answer(200, headers={"ETag": _etag(request.body)})
            case "PUT" if "x-amz-copy-source" in request.headers:
                return self._copy(unquote(request.headers["x-amz-copy-source"]).lstrip("/"), name, request)
            case "PUT":
                return self._put(name, request.body, request)
            case "POST" if "uploads" in request.query:
                return self._begin_upload(bucket, key)
            case "POST":
                parts = self.uploads.pop(request.query["uploadId"])
                answer = self._put(name, b"".join(parts[number] for number in sorted(parts)), request)
                body = b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
                return Answer(200, body) if answer.status == 200 else answer
            case "DELETE" if "uploadId" in request.query:
                self.uploads.pop(request.query["uploadId"], None)
                return Answer(204)
            case "DELETE":
                self.objects.pop(name, None)
                return Answer(204)
        return _error(501, "NotImplemented")

    def _put(self, name: str, body: bytes, request: Request) -> Answer:
        if self._conditional and request.headers.get("if-none-match") == "*" and name in self.objects:
            return _error(412, "PreconditionFailed")
        self.objects[name] = body
        return Answer(200, headers={"ETag": _etag(body)})

    def _copy(self, source: str, name: str, request: Request) -> Answer:
        if source not in self.objects:
            return _error(404, "NoSuchKey")
        answer = self._put(name, self.objects[source], request)
        body = f"<CopyObjectResult><ETag>{_etag(self.objects[source])}</ETag></CopyObjectResult>"
        return Answer(200, body.encode()) if answer.status == 200 else answer

    def _get(self, name: str, request: Request) -> Answer:
        if name not in self.objects:
            return _error(404, "NoSuchKey")
        value = self.objects[name]
        wanted = request.headers.get("range")
        if wanted is None:
            return Answer(200, value, {"ETag": _etag(value)})
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(value), int(last) + 1 if last else len(value))
        if start >= len(value):
            return _error(416, "InvalidRange")
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(value)}", "ETag": _etag(value)}
        return Answer(206, memoryview(value)[start:stop], headers)

    def _begin_upload(self, bucket: str, key: str) -> Answer:
        upload = uuid.uuid4().hex
        self.uploads[upload] = {}
        inside = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
        return Answer(200, f"<InitiateMultipartUploadResult>{inside}</InitiateMultipartUploadResult>".encode())

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        names = sorted(name.partition("/")[2] for name in self.objects if name.startswith(f"{bucket}/{prefix}"))
        names = [name for name in names if name > after]
        page, more = names[: self._page], len(names) > self._page
        items = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.objects[f'{bucket}/{name}'])}</Size></Contents>"
            for name in page
        )
        tail = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        flag = f"<IsTruncated>{str(more).lower()}</IsTruncated>"
        return Answer(200, f"<ListBucketResult>{flag}{tail}{items}</ListBucketResult>".encode())


async def _read_head(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = head[0].split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    path, _, raw_query = target.partition("?")
    return Request(method, unquote(path), dict(parse_qsl(raw_query, keep_blank_values=True)), raw_query, headers)


async def _write(writer: asyncio.StreamWriter, request: Request, answer: Answer, cut: int | None) -> None:
    lines = [f"HTTP/1.1 {answer.status} .", f"Content-Length: {len(answer.body)}", "Content-Type: application/xml",
             f"Last-Modified: {formatdate(usegmt=True)}"]  # fmt: skip
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    if request.method != "HEAD":
        view = memoryview(answer.body)[:cut]
        for at in range(0, len(view), 2**20):
            writer.write(view[at : at + 2**20])
            await writer.drain()
    await writer.drain()


def _check_signature(request: Request, ahead_s: float) -> Answer | None:
    """None when the request is signed with our key (AWS Signature Version 4, header form)."""
    scheme, _, rest = request.headers.get("authorization", "").partition(" ")
    fields = dict(item.strip().partition("=")[::2] for item in rest.split(","))
    if scheme != "AWS4-HMAC-SHA256" or "Signature" not in fields:
        return _error(403, "AccessDenied")
    key, *scope = fields["Credential"].split("/")
    payload = request.headers["x-amz-content-sha256"]
    if payload != "UNSIGNED-PAYLOAD" and payload != hashlib.sha256(request.body).hexdigest():
        return _error(400, "XAmzContentSHA256Mismatch")
    signed = fields["SignedHeaders"].split(";")
    pairs = sorted((quote(k, safe="~"), quote(v, safe="~")) for k, v in request.query.items())
    canonical = "\n".join(
        [
            request.method,
            quote(request.path, safe="/~"),
            "&".join(f"{k}={v}" for k, v in pairs),
            *(f"{name}:{' '.join(request.headers.get(name, '').split())}" for name in signed),
            "",
            ";".join(signed),
            payload,
        ]
    )
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", request.headers["x-amz-date"], "/".join(scope), digest])
    secret = f"AWS4{SECRET_KEY}".encode()
    for part in scope:
        secret = hmac.digest(secret, part.encode(), "sha256")
    right = hmac.new(secret, text.encode(), "sha256").hexdigest()
    if key != ACCESS_KEY:
        return _error(403, "InvalidAccessKeyId")
    if not hmac.compare_digest(right, fields["Signature"]):
        return _error(403, "SignatureDoesNotMatch")
    said = datetime.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    return _error(403, "RequestTimeTooSkewed") if abs(time.time() + ahead_s - said) > MOST_SKEW_S else None


def _error(status: int, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>planned or deserved</Message></Error>".encode())


def _etag(body: bytes) -> str:
    return f'"{len(body):x}"'
