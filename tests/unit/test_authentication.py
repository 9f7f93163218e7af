"""The handshake by which both ends of a connection prove that they know a token, over real sockets."""

from __future__ import annotations

import contextlib
import hmac
import queue
import resource
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.threads import in_thread
from vllm_ray_ascend.ipc.authentication import (
    MAX_HANDSHAKES,
    NONCE_BYTES,
    PROOF_BYTES,
    AuthenticatingListener,
    Handshake,
    connect_authenticated,
)
from vllm_ray_ascend.ipc.sockets import Address, connect, listen

pytestmark = pytest.mark.unit

HOST = "127.0.0.1"
TOKEN = "0123456789abcdef"
LIMIT_S = 20.0


class Listening:
    """A listener, and the connections that it has handed out."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.connections: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self.listener = AuthenticatingListener(HOST, self.connections.put, limit_s=limit_s)
        self.address = self.listener.address

    def assert_accepts(self) -> None:
        with connect_authenticated(self.address, LIMIT_S) as client, self.connections.get(timeout=LIMIT_S) as server:
            server.sendall(b"hello")
            assert client.recv(5) == b"hello"


@pytest.fixture
def listening() -> Iterator[Listening]:
    found = Listening()
    yield found
    found.listener.close()


def with_token(address: Address, token: str) -> Address:
    return Address(address.host, address.port, token)


def is_rejected(client: socket.socket) -> bool:
    """Return whether the other end closes the connection without a proof of its own."""
    client.settimeout(LIMIT_S)
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(4096):
            received += data
    return len(received) <= NONCE_BYTES


def test_both_ends_that_know_the_token_are_connected(listening: Listening) -> None:
    listening.assert_accepts()
    listening.assert_accepts()


def test_the_token_is_never_sent() -> None:
    sent = []
    with listen(HOST) as listener:
        address = Address(HOST, listener.getsockname()[1], TOKEN)
        thread, found = in_thread(lambda: connect_authenticated(address, LIMIT_S))
        connection, _ = listener.accept()
        with connection:
            handshake = Handshake(connection, TOKEN)
            while (result := handshake.advance()) is None:
                pass
            assert result
            sent.append(handshake._received)
        thread.join(LIMIT_S)
    assert isinstance(found[0], socket.socket)
    assert TOKEN.encode() not in sent[0] and len(sent[0]) == NONCE_BYTES + PROOF_BYTES


def test_an_address_does_not_show_its_token() -> None:
    address = Address("::1", 80, TOKEN)
    assert TOKEN not in f"{address} {address!r} {[address]}" and str(address) == "[::1]:80"


def test_a_client_with_another_token_is_rejected(listening: Listening) -> None:
    with pytest.raises(ConnectionError, match="VRA-590"):
        connect_authenticated(with_token(listening.address, TOKEN), LIMIT_S)
    assert listening.connections.empty()
    listening.assert_accepts()


def test_a_server_that_does_not_know_the_token_is_rejected() -> None:
    with listen(HOST) as listener:
        address = Address(HOST, listener.getsockname()[1], TOKEN)
        thread, found = in_thread(lambda: connect_authenticated(address, LIMIT_S))
        for _ in range(3):  # its attempts
            connection, _ = listener.accept()
            with connection:
                nonce = b"n" * NONCE_BYTES
                connection.sendall(nonce)
                theirs = connection.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)
                # The best that it can do: send the client's own proof back.
                connection.sendall(theirs[NONCE_BYTES:])
        thread.join(LIMIT_S)
    assert isinstance(found[0], ConnectionError) and "does not know the token" in str(found[0])


def test_a_proof_is_good_for_one_connection_only(listening: Listening) -> None:
    with connect(listening.address) as first, connect(listening.address) as second:
        nonce = first.recv(NONCE_BYTES, socket.MSG_WAITALL)
        ours = b"o" * NONCE_BYTES
        proof = hmac.digest(listening.address.token.encode(), b"client" + nonce + ours, "sha256")
        second.sendall(ours + proof)
        assert is_rejected(second)
        first.sendall(ours + proof)
        first.settimeout(LIMIT_S)
        assert len(first.recv(PROOF_BYTES, socket.MSG_WAITALL)) == PROOF_BYTES


def test_strangers_that_send_nothing_delay_nobody(listening: Listening) -> None:
    """More of them than are authenticated at once, with a limit that the test does not wait for."""
    with contextlib.ExitStack() as strangers:
        for _ in range(MAX_HANDSHAKES + 10):
            strangers.enter_context(connect(listening.address))
        listening.assert_accepts()


def test_a_stranger_that_sends_nothing_is_disconnected_after_the_limit() -> None:
    listening = Listening(limit_s=0.2)
    with connect(listening.address) as stranger:
        assert is_rejected(stranger)
    listening.assert_accepts()
    listening.listener.close()


def test_a_stranger_that_sends_little_by_little_is_disconnected_after_the_limit() -> None:
    listening = Listening(limit_s=0.5)
    with connect(listening.address) as stranger:
        ended = threading.Event()

        def trickle() -> None:
            while not ended.wait(0.01):
                with contextlib.suppress(OSError):
                    stranger.send(b"x")

        thread, _ = in_thread(trickle)
        assert is_rejected(stranger)
        ended.set()
        thread.join(LIMIT_S)
    listening.listener.close()


def test_a_server_without_free_files_goes_on_once_there_are_some(listening: Listening) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket()
    opened = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(64, client.fileno() + 8), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(socket.socket())
        client.connect((HOST, listening.address.port))  # it cannot be accepted
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(NONCE_BYTES)
    finally:
        for each in opened:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    client.settimeout(LIMIT_S)
    assert len(client.recv(NONCE_BYTES, socket.MSG_WAITALL)) == NONCE_BYTES
    client.close()
    listening.assert_accepts()


def test_a_closed_listener_accepts_nobody(listening: Listening) -> None:
    with connect(listening.address) as waiting:
        waiting.recv(NONCE_BYTES, socket.MSG_WAITALL)
        listening.listener.close()
        assert is_rejected(waiting)
    with pytest.raises(OSError, match=r"refused|reset|VRA-590"):
        connect_authenticated(listening.address, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=100), max_size=4))
def test_no_bytes_of_a_stranger_are_taken_for_a_proof(pieces: list[bytes]) -> None:
    server, client = socket.socketpair()
    with server, client:
        handshake = Handshake(server, TOKEN)
        results = []
        for piece in pieces:
            client.sendall(piece)
            results.append(handshake.advance())
            if results[-1] is not None:
                break
        client.shutdown(socket.SHUT_WR)
        while not results or results[-1] is None:
            results.append(handshake.advance())
        assert results[-1] is False
        received = client.recv(4096)
        assert len(received) <= NONCE_BYTES
