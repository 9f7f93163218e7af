"""The TCP connection of a direct transport's link: messages, and how the loss of the peer is reported."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vllm_ray_ascend.ipc.sockets import Address
from vllm_ray_ascend.ray_transport.direct.connection import Connection, ConnectionLostError
from vllm_ray_ascend.ray_transport.direct.protocol import (
    Failed,
    FetchRequest,
    Hello,
    Message,
    Refused,
    SendReady,
    Welcome,
    decode_message,
    encode_message,
)
from vllm_ray_ascend.ray_transport.direct.receiver import Origin, _ReceiverLink

pytestmark = pytest.mark.unit

LIMIT = 20.0


class End:
    """A connection, and the reasons for its loss that it reported."""

    def __init__(self, connection: socket.socket) -> None:
        self.reasons: list[str] = []
        self.lost = threading.Event()
        self.connection = Connection(connection, 30.0, self._on_lost)

    def _on_lost(self, reason: str) -> None:
        self.reasons.append(reason)
        self.lost.set()


@pytest.fixture
def ends() -> Iterator[tuple[End, socket.socket]]:
    """Yield a connection, and the socket of its peer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        end = End(mine)
        yield end, theirs
        end.connection.close()
        theirs.close()


MESSAGES: list[Message] = [
    Hello(3, "me", "NPU 3 of node a"),
    Welcome(bytes(range(256)), "you"),
    FetchRequest("00ff"),
    SendReady(),
    Refused("no\nlonger"),
]


@pytest.mark.parametrize("message", [*MESSAGES, Failed("why")], ids=lambda message: type(message).__name__)
def test_messages_are_decoded_as_they_were_encoded(message: Message) -> None:
    text = encode_message(message)
    assert text.count(b"\n") == 1
    assert decode_message(text) == message


def test_invalid_messages_are_rejected() -> None:
    assert decode_message(b"GET / HTTP/1.1") is None
    assert decode_message(b'{"type":"hello"}') is None


def test_messages_arrive_in_order_however_they_are_split(ends: tuple[End, socket.socket]) -> None:
    end, theirs = ends
    text = b"".join(map(encode_message, MESSAGES))
    for start in range(0, len(text), 7):
        theirs.sendall(text[start : start + 7])
    assert [end.connection.wait(LIMIT) for _ in MESSAGES] == MESSAGES
    end.connection.send(SendReady())
    assert decode_message(theirs.recv(1000)) == SendReady()
    with pytest.raises(TimeoutError):
        end.connection.wait(0.01)


def test_a_loss_is_reported_after_earlier_messages(ends: tuple[End, socket.socket]) -> None:
    end, theirs = ends
    theirs.sendall(encode_message(SendReady()))
    theirs.close()
    assert end.lost.wait(LIMIT)
    assert end.connection.wait(LIMIT) == SendReady()
    for _ in range(2):
        with pytest.raises(ConnectionLostError, match="closed"):
            end.connection.wait(LIMIT)
    assert (end.reasons, end.connection.peer_reported) == (["the connection was closed"], False)
    with pytest.raises(ConnectionLostError, match="the connection was closed"):
        end.connection.send(SendReady())


def test_the_reason_of_the_peer_is_reported(ends: tuple[End, socket.socket]) -> None:
    end, theirs = ends
    theirs.sendall(encode_message(SendReady()) + encode_message(Failed("out of luck")))
    theirs.shutdown(socket.SHUT_RDWR)
    assert end.connection.wait_lost(LIMIT) == "out of luck", "nobody waits for a message"
    assert end.connection.peer_reported


def test_the_reason_of_the_peer_is_raised_in_a_wait_and_ends_the_connection(ends: tuple[End, socket.socket]) -> None:
    end, theirs = ends
    timer = threading.Timer(0.1, theirs.sendall, [encode_message(Failed("out of luck"))])
    timer.start()
    with pytest.raises(ConnectionLostError, match="out of luck"):
        end.connection.wait(LIMIT)
    assert end.lost.wait(LIMIT) and end.reasons == ["out of luck"]
    assert theirs.recv(1) == b""
    timer.join()


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\n", b"a" * (3 << 20)], ids=["another", "endless"])
def test_a_peer_with_another_protocol_is_disconnected(ends: tuple[End, socket.socket], text: bytes) -> None:
    end, theirs = ends

    def send() -> None:
        with contextlib.suppress(ConnectionError):
            theirs.sendall(text)

    sending = threading.Thread(target=send)
    sending.start()
    with pytest.raises(ConnectionLostError, match="it sent an invalid message"):
        end.connection.wait(LIMIT)
    sending.join()
    assert end.connection.wait_lost(LIMIT) == "it sent an invalid message"


def test_closing_ends_a_wait_in_another_thread(ends: tuple[End, socket.socket]) -> None:
    end, _ = ends
    timer = threading.Timer(0.1, end.connection.close)
    timer.start()
    with pytest.raises(ConnectionLostError):
        end.connection.wait(LIMIT)
    timer.join()


def test_a_sender_that_becomes_silent_is_reported_with_the_time_of_its_silence() -> None:
    """The limit is of the whole receive, of which an earlier part may have taken the most."""
    link = _ReceiverLink(SimpleNamespace(limit_s=3600.0), Origin(Address("127.0.0.1", 1, "token"), 0), 0)  # type: ignore[arg-type]
    link._start_phase("its producer was computing")
    code, reason = link._explain_failure(TimeoutError())
    found = re.match(r"the process at 127\.0\.0\.1:1 was silent for ([0-9.]+) s while its producer was computing, and "
                     r"the 3600 s of the whole receive have passed\. ", reason)  # fmt: skip
    assert code == "VRA-535" and found and float(found[1]) < 3600
    began = link._phase_started_at
    link._start_phase("its producer was computing")
    assert link._phase_started_at == began, "the same phase continues"
