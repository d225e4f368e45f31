"""Frames between processes: who may connect, what is refused, and how an end is noticed."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_dr.errors import AccessDenied, StoreError, StoreUnavailable
from ray_dr.stores import wire
from ray_dr.stores.wire import Connection, Server, connect

TOKEN = b"secret"


def echo(connection: Connection) -> None:
    """Answer every frame with itself, until the other end closes."""
    while True:
        header, size = connection.receive()
        payload = bytearray(size)
        connection.read_into(memoryview(payload))
        connection.send({"error": header["fail"]} if "fail" in header else header, bytes(payload))


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server("127.0.0.1", TOKEN, echo)
    yield started
    started.close()


def ask(connection: Connection, number: int, payload: bytes) -> bytes:
    header, size = connection.request({"number": number}, payload)
    assert header == {"number": number}
    into = bytearray(size)
    connection.read_into(memoryview(into))
    return bytes(into)


def raw(server: Server) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_header_and_payload_arrive_as_sent(server: Server) -> None:
    connection = connect(server.address, TOKEN)
    assert [ask(connection, i, payload) for i, payload in enumerate([b"", b"x", b"y" * 3_000_000])] == [
        b"", b"x", b"y" * 3_000_000,
    ]  # fmt: skip
    connection.close()


def test_many_clients_are_served_at_once(server: Server) -> None:
    def client(number: int) -> bool:
        connection = connect(server.address, TOKEN)
        sent = [bytes([number]) * (1000 * i) for i in range(20)]
        got = [ask(connection, number, payload) for payload in sent]
        connection.close()
        return got == sent

    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(client, range(24)))


def test_frames_of_several_senders_on_one_connection_do_not_mix(server: Server) -> None:
    connection = connect(server.address, TOKEN)

    def send(number: int) -> None:
        connection.send({"number": number}, bytes([number]) * 50_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(40)))
    seen = set()
    for _ in range(40):
        header, size = connection.receive()
        payload = bytearray(size)
        connection.read_into(memoryview(payload))
        assert bytes(payload) == bytes([header["number"]]) * 50_000
        seen.add(header["number"])
    assert seen == set(range(40))
    connection.close()


def test_a_client_with_another_token_is_refused(server: Server) -> None:
    with pytest.raises(StoreUnavailable, match=r"closed|broke"):
        connect(server.address, b"guess")


def test_a_server_that_does_not_know_the_token_is_refused() -> None:
    impostor = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        sock, _ = impostor.accept()
        with sock:
            sock.sendall(b"n" * wire.NONCE_BYTES)
            sock.recv(1000)
            sock.sendall(b"p" * 32)

    threading.Thread(target=pretend, daemon=True).start()
    with pytest.raises(AccessDenied, match="does not know this job's token"):
        connect(f"127.0.0.1:{impostor.getsockname()[1]}", TOKEN)
    impostor.close()


def test_a_proof_cannot_be_played_back(server: Server) -> None:
    """The server's own proof, sent back to it, is no client's proof."""
    with raw(server) as sock:
        nonce = sock.recv(wire.NONCE_BYTES, socket.MSG_WAITALL)
        sock.sendall(nonce + wire._proof(TOKEN, b"server", nonce, nonce))
        assert sock.recv(1) == b""


def test_nobody_listening_is_unavailable_and_worth_a_retry() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(StoreUnavailable) as raised:
        connect(address, TOKEN)
    assert raised.value.retryable


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">IQ", wire.HEADER_MAX_BYTES + 1, 0),
        struct.pack(">IQ", 2, wire.PAYLOAD_MAX_BYTES + 1) + b"{}",
        struct.pack(">IQ", 5, 0) + b"\xff\xfe{}}",
        struct.pack(">IQ", 2, 0) + b"[]",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["header too large", "payload too large", "no JSON", "no object", "another protocol"],
)
def test_a_frame_that_cannot_be_ends_its_connection_and_no_other(server: Server, frame: bytes) -> None:
    bystander = connect(server.address, TOKEN)
    connection = connect(server.address, TOKEN)
    connection._sock.sendall(frame)
    with pytest.raises(StoreUnavailable):
        connection.receive()
    assert ask(bystander, 1, b"still here") == b"still here"
    bystander.close()
    connection.close()


def test_a_frame_too_large_is_refused_before_a_byte_of_it_is_sent(server: Server) -> None:
    connection = connect(server.address, TOKEN)
    with pytest.raises(StoreError, match="too large"):
        connection.send({"long": "x" * wire.HEADER_MAX_BYTES})
    assert ask(connection, 1, b"still in step") == b"still in step"
    connection.close()


@given(st.binary(max_size=200))
def test_garbage_instead_of_a_handshake_neither_crashes_nor_hangs_the_server(garbage: bytes) -> None:
    server = Server("127.0.0.1", TOKEN, echo)
    with raw(server) as sock:
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1000):
            pass
    connection = connect(server.address, TOKEN)
    assert ask(connection, 1, b"well") == b"well"
    connection.close()
    server.close()


def test_an_answer_that_says_error_is_raised(server: Server) -> None:
    connection = connect(server.address, TOKEN)
    with pytest.raises(StoreError, match="no such thing"):
        connection.request({"fail": "no such thing"})
    connection.close()


def test_a_server_that_closes_ends_every_connection_at_once(server: Server) -> None:
    connection = connect(server.address, TOKEN)
    server.close()
    with pytest.raises(StoreUnavailable):
        ask(connection, 1, b"")
    connection.close()


def test_closing_wakes_the_thread_that_waits_in_receive(server: Server) -> None:
    connection = connect(server.address, TOKEN)
    woken: list[StoreError] = []

    def wait() -> None:
        try:
            connection.receive()
        except StoreError as error:
            woken.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    connection.close()
    waiter.join(10)
    assert isinstance(woken[0], StoreUnavailable)


def test_a_peer_that_stays_silent_is_given_up_after_the_timeout(server: Server) -> None:
    connection = connect(server.address, TOKEN)
    connection.timeout(0.05)
    with pytest.raises(StoreUnavailable, match="timed out"):
        connection.receive()
    connection.close()


def test_a_send_that_finds_no_room_is_given_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connection = Connection(socket.create_connection(listening.getsockname()))
        connection.timeout(0.05)
        with pytest.raises(StoreUnavailable, match="timed out"):
            connection.send({}, bytes(2**26))  # nobody reads it
        connection.close()


def test_without_a_timeout_any_longer_a_receive_waits_for_ever(server: Server) -> None:
    connection = connect(server.address, TOKEN)
    connection.timeout(0.01)
    connection.timeout(None)
    timer = threading.Timer(0.1, connection.close)
    timer.start()
    with pytest.raises(StoreUnavailable) as raised:
        connection.receive()
    assert "timed out" not in str(raised.value)
    timer.join()
