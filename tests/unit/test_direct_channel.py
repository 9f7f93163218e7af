"""The TCP side of a direct transport's link: messages, and how the other end's end is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from vllm_ray_ascend.transport.direct.channel import Channel, ChannelLostError
from vllm_ray_ascend.transport.direct.messages import (
    Coming,
    Failed,
    Hello,
    Message,
    Refused,
    Want,
    Welcome,
    line,
    parse,
)

pytestmark = pytest.mark.unit

LIMIT = 20.0


class End:
    """A channel, and what it told of the other end's end."""

    def __init__(self, connection: socket.socket) -> None:
        self.told: list[str] = []
        self.over = threading.Event()
        self.channel = Channel(connection, 30.0, self._lost)

    def _lost(self, why: str) -> None:
        self.told.append(why)
        self.over.set()


@pytest.fixture
def ends() -> Iterator[tuple[End, socket.socket]]:
    """A channel and the bare connection at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        end = End(mine)
        yield end, theirs
        end.channel.close()
        theirs.close()


MESSAGES: list[Message] = [
    Hello("token", 3, "me", "NPU 3 of node a"),
    Welcome(bytes(range(256)), "you"),
    Want("00ff"),
    Coming(),
    Refused("no\nlonger"),
]


@pytest.mark.parametrize("message", [*MESSAGES, Failed("why")], ids=lambda message: type(message).__name__)
def test_messages_are_read_as_they_were_written(message: Message) -> None:
    text = line(message)
    assert text.count(b"\n") == 1
    assert parse(text) == message


def test_nonsense_is_no_message() -> None:
    assert parse(b"GET / HTTP/1.1") is None
    assert parse(b'{"type":"hello"}') is None


def test_messages_come_in_order_however_they_are_cut(ends: tuple[End, socket.socket]) -> None:
    end, theirs = ends
    text = b"".join(map(line, MESSAGES))
    for start in range(0, len(text), 7):
        theirs.sendall(text[start : start + 7])
    assert [end.channel.hear(LIMIT) for _ in MESSAGES] == MESSAGES
    end.channel.say(Coming())
    assert parse(theirs.recv(1000)) == Coming()
    with pytest.raises(TimeoutError):
        end.channel.hear(0.01)


def test_an_end_is_told_after_what_came_before_it(ends: tuple[End, socket.socket]) -> None:
    end, theirs = ends
    theirs.sendall(line(Coming()))
    theirs.close()
    assert end.over.wait(LIMIT)
    assert end.channel.hear(LIMIT) == Coming()
    for _ in range(2):
        with pytest.raises(ChannelLostError, match="closed"):
            end.channel.hear(LIMIT)
    assert (end.told, end.channel.told) == (["the connection was closed"], False)
    with pytest.raises(ChannelLostError, match="the connection was closed"):
        end.channel.say(Coming())


def test_a_reason_is_handed_on(ends: tuple[End, socket.socket]) -> None:
    end, theirs = ends
    theirs.sendall(line(Failed("out of luck")))
    assert end.channel.wait_lost(LIMIT) == "out of luck"
    assert end.channel.told


def test_a_stranger_is_left(ends: tuple[End, socket.socket]) -> None:
    end, theirs = ends
    theirs.sendall(b"GET / HTTP/1.1\n")
    assert end.channel.wait_lost(LIMIT) == "it sent what is no message"


def test_closing_ends_a_wait_in_another_thread(ends: tuple[End, socket.socket]) -> None:
    end, _ = ends
    timer = threading.Timer(0.1, end.channel.close)
    timer.start()
    with pytest.raises(ChannelLostError):
        end.channel.hear(LIMIT)
    timer.join()
