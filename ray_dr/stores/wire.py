"""Frames over TCP between the processes of one job: a JSON header and a run of bytes, nothing executable.

Why not Ray's object plane: between two raylets it moves 0.3 to 1.1 GB/s and its objects die with their owner; a plain
socket moves 2 to 4 times that, fills the receiver's memory directly, and its closing tells of a death within a
millisecond.

    frame := length of header (u32) | length of payload (u64) | header (JSON, UTF-8) | payload      (big endian)

Both ends prove to know the job's token before anything else is read: the server sends a nonce, the client answers with
its own nonce and HMAC-SHA256(token, "client" | nonces), the server answers with HMAC-SHA256(token, "server" | nonces).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray_dr.errors import AccessDenied, StoreError, StoreUnavailable

HEADER = struct.Struct(">IQ")
TIMEVAL = struct.Struct("@ll")
HEADER_MAX_BYTES = 64 * 2**20
PAYLOAD_MAX_BYTES = 256 * 2**20
NONCE_BYTES = 16
HANDSHAKE_S = 5.0
CONNECT_S = 5.0

Header = dict[str, Any]


class Connection:
    """One end of an authenticated connection. Sending is safe from several threads; receiving belongs to one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def peer(self) -> str:
        """Address of the other end, for messages."""
        try:
            host, port = self._sock.getpeername()[:2]
            return f"{host}:{port}"
        except OSError:
            return "closed"

    def send(self, header: Mapping[str, Any], payload: memoryview | bytes = b"") -> None:
        """One frame. Raises StoreUnavailable when the other end is gone; StoreError, sending nothing, for a frame that
        the other end would refuse."""
        text = json.dumps(header, separators=(",", ":")).encode()
        _check_size(len(text), len(payload), f"to {self.peer}")
        with self._sending:
            try:
                self._sock.sendall(HEADER.pack(len(text), len(payload)) + text)
                if len(payload):
                    self._sock.sendall(payload)
            except OSError as error:
                raise self._broken(error) from error

    def receive(self) -> tuple[Header, int]:
        """The next frame's header and the length of its payload, which the caller must then read (bytes).

        Raises StoreUnavailable; StoreError for bytes that are no frame, after which the connection is of no use.
        """
        header_size, payload_size = HEADER.unpack(self._exactly(HEADER.size))
        _check_size(header_size, payload_size, f"from {self.peer}")
        try:
            header = json.loads(self._exactly(header_size))
        except ValueError as error:
            raise StoreError(f"frame from {self.peer} has no JSON header: {error}") from error
        if not isinstance(header, dict):
            raise StoreError(f"frame from {self.peer} has a header that is no JSON object")
        return header, payload_size

    def read_into(self, into: memoryview) -> None:
        """Fill `into` with the payload's next bytes. Silence in the middle of them may go on for twice the time-out."""
        self._fill(into, socket.MSG_WAITALL)  # not a wake-up per packet

    def _fill(self, into: memoryview, flags: int = 0) -> None:
        done = 0
        while done < len(into):
            try:
                count = self._sock.recv_into(into[done:], 0, flags)
            except OSError as error:
                raise self._broken(error) from error
            if count == 0:
                raise StoreUnavailable(f"connection to {self.peer} was closed")
            done += count

    def request(self, header: Mapping[str, Any], payload: memoryview | bytes = b"") -> tuple[Header, int]:
        """Send a frame and wait for the answer's header; an answer `{"error": ...}` becomes a StoreError."""
        self.send(header, payload)
        answer, size = self.receive()
        if "error" in answer:
            raise StoreError(str(answer["error"]))
        return answer, size

    def timeout(self, seconds: float | None) -> None:
        """Let every later receive fail after so long without a byte, and a send that finds no room (None: wait for ever).

        By the kernel: a socket with a time-out of Python's does not block, and gives its bytes a few at a time.
        """
        limit = TIMEVAL.pack(*divmod(0 if seconds is None else max(1, round(seconds * 1e6)), 1_000_000))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, limit)

    def close(self) -> None:
        """End it; a thread that waits in receive gets StoreUnavailable."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _broken(self, error: OSError) -> StoreUnavailable:
        why = "timed out" if isinstance(error, BlockingIOError) else error
        return StoreUnavailable(f"connection to {self.peer} broke: {why}")

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        self._fill(memoryview(data))
        return data


def connect(address: str, token: bytes, *, timeout_s: float = CONNECT_S) -> Connection:
    """An authenticated connection to a server at `host:port`. Raises StoreUnavailable, AccessDenied."""
    host, _, port = address.rpartition(":")
    try:
        sock = socket.create_connection((host, int(port)), timeout=timeout_s)
    except OSError as error:
        raise StoreUnavailable(f"cannot reach {address}: {error}") from error
    sock.settimeout(HANDSHAKE_S)
    connection = Connection(sock)
    try:
        theirs = bytes(connection._exactly(NONCE_BYTES))
        mine = secrets.token_bytes(NONCE_BYTES)
        sock.sendall(mine + _proof(token, b"client", theirs, mine))
        if not hmac.compare_digest(bytes(connection._exactly(32)), _proof(token, b"server", theirs, mine)):
            raise AccessDenied(f"{address} does not know this job's token")
    except BaseException:
        connection.close()
        raise
    sock.settimeout(None)
    return connection


class Server:
    """Accepts connections on `host` and hands each, authenticated, to `serve` in a thread of its own."""

    def __init__(self, host: str, token: bytes, serve: Callable[[Connection], None]) -> None:
        self._token, self._serve = token, serve
        self._socket = socket.create_server((host, 0), backlog=64)
        self._open: set[Connection] = set()
        self._lock = threading.Lock()
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, name="wire-accept", daemon=True).start()

    def close(self) -> None:
        """Stop accepting and end every open connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            connections = tuple(self._open)
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._welcome, args=(sock,), name="wire-serve", daemon=True).start()

    def _welcome(self, sock: socket.socket) -> None:
        connection = Connection(sock)
        with self._lock:
            self._open.add(connection)
        try:
            sock.settimeout(HANDSHAKE_S)
            mine = secrets.token_bytes(NONCE_BYTES)
            sock.sendall(mine)
            theirs = bytes(connection._exactly(NONCE_BYTES))
            if not hmac.compare_digest(bytes(connection._exactly(32)), _proof(self._token, b"client", mine, theirs)):
                return
            sock.sendall(_proof(self._token, b"server", mine, theirs))
            sock.settimeout(None)
            self._serve(connection)
        except (OSError, StoreError):
            pass  # the other end is gone or talks nonsense: its owner learns it from the closed connection
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def _check_size(header: int, payload: int, which: str) -> None:
    if header > HEADER_MAX_BYTES or payload > PAYLOAD_MAX_BYTES:
        raise StoreError(f"frame {which} is too large ({header} + {payload} bytes)")


def _proof(token: bytes, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.new(token, side + server_nonce + client_nonce, hashlib.sha256).digest()
