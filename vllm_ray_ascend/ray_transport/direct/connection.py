"""One end of the TCP connection of a pair: it carries requests, and shows when the peer exits."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from vllm_ray_ascend.ipc.sockets import keep_alive, shut_down
from vllm_ray_ascend.ray_transport.direct.protocol import Failed, Message, decode_message, encode_message

_CHUNK_BYTES = 65536
_MAX_LINE_BYTES = 1 << 20
_INVALID = "it sent an invalid message"


class ConnectionLostError(ConnectionError):
    """The peer is gone, or has closed the link: the text says which."""


class Connection:
    """Messages of one connection. A thread of its own waits for the end, so that it is noticed at any time.

    A message is read by the thread that waits for it: to wake another one for that would double its latency.
    ``on_lost`` is called once, in the thread of the connection, with the reason when it has ended.
    """

    def __init__(self, connection: socket.socket, silence_s: float, on_lost: Callable[[str], None]) -> None:
        connection.settimeout(None)
        keep_alive(connection, silence_s)
        self._socket = connection
        self._on_lost = on_lost
        self._reading = threading.Lock()  # guards the fields below
        self._messages: deque[Message] = deque()
        self._unread = b""
        self._lost_reason = ""
        self._ended = threading.Event()
        self.peer_reported = False
        """Whether the peer itself has sent the reason for closing."""
        self._readable = _poller(connection, select.POLLIN)
        threading.Thread(target=self._await_end, daemon=True, name="RayAscendDirectWatch").start()

    @property
    def lost_reason(self) -> str:
        """Why the connection has ended; empty while it is open."""
        return self._lost_reason

    def wait_lost(self, limit_s: float) -> str:
        """Return `lost_reason` as soon as there is one, or after ``limit_s`` seconds."""
        self._ended.wait(limit_s)
        return self._lost_reason

    def send(self, message: Message) -> None:
        """Send a message. Raises ConnectionLostError."""
        try:
            self._socket.sendall(encode_message(message))
        except OSError as error:
            raise ConnectionLostError(self._lost_reason or str(error)) from error

    def wait(self, limit_s: float | None = None) -> Message:
        """Return the next message. Raises ConnectionLostError, and TimeoutError after ``limit_s`` seconds."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        with self._reading:
            while not self._messages:
                if self._lost_reason:
                    raise ConnectionLostError(self._lost_reason)
                if not self._readable.poll(_remaining_ms(deadline)):
                    raise TimeoutError
                self._read()
            return self._messages.popleft()

    def close(self) -> None:
        """Close the connection; from any thread, any number of times."""
        shut_down(self._socket)

    def _await_end(self) -> None:
        _poller(self._socket, select.POLLRDHUP).poll()
        with self._reading:
            while not self._lost_reason:  # what was sent before the end may be the reason for it
                self._read()
            self._socket.close()
        self._ended.set()
        self._on_lost(self._lost_reason)

    def _read(self) -> None:
        """Read what has arrived: messages, or the end."""
        self._lost_reason = self._receive_messages()
        if self._lost_reason:
            shut_down(self._socket)  # wakes `_await_end`

    def _receive_messages(self) -> str:
        """Receive messages. Return the reason for the end where it is reached, else an empty text."""
        try:
            data = self._socket.recv(_CHUNK_BYTES)
        except OSError as error:
            return str(error)
        if not data:
            return "the connection was closed"
        *lines, self._unread = (self._unread + data).split(b"\n")
        for message in map(decode_message, lines):
            if message is None:
                return _INVALID
            if isinstance(message, Failed):
                self.peer_reported = True
                return message.text or "it gave no reason"
            self._messages.append(message)
        return _INVALID if len(self._unread) > _MAX_LINE_BYTES else ""


def _poller(connection: socket.socket, events: int) -> select.poll:
    poller = select.poll()
    poller.register(connection, events)
    return poller


def _remaining_ms(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
