"""One end of the TCP connection of a pair: it carries requests, and shows when the peer exits."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable

from vllm_ray_ascend.ipc.sockets import keep_alive, shut_down
from vllm_ray_ascend.ray_transport.direct.protocol import Failed, Message, decode_message, encode_message

_CHUNK_BYTES = 65536
_MAX_LINE_BYTES = 1 << 20


class ConnectionLostError(ConnectionError):
    """The peer is gone, or has closed the link: the text says which."""


class Connection:
    """Messages of one connection, read by a thread of its own, so that its end is noticed at any time.

    ``on_lost`` is called once, in that thread, with the reason when the connection has ended.
    """

    def __init__(self, connection: socket.socket, silence_s: float, on_lost: Callable[[str], None]) -> None:
        connection.settimeout(None)
        keep_alive(connection, silence_s)
        self._socket = connection
        self._on_lost = on_lost
        self._received: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lost_reason = ""
        self._ended = threading.Event()
        self.peer_reported = False
        """Whether the peer itself has sent the reason for closing."""
        threading.Thread(target=self._read_messages, daemon=True, name="RayAscendDirectReader").start()

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
        try:
            message = self._received.get(timeout=limit_s)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._received.put(None)
            raise ConnectionLostError(self._lost_reason)
        return message

    def close(self) -> None:
        """Close the connection; from any thread, any number of times."""
        shut_down(self._socket)

    def _read_messages(self) -> None:
        unread, reason = b"", "the connection was closed"
        while len(unread) < _MAX_LINE_BYTES:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except OSError as error:
                reason, data = str(error), b""
            if not data:
                break
            *lines, unread = (unread + data).split(b"\n")
            messages = [decode_message(line) for line in lines]
            failed = next((each.text for each in messages if isinstance(each, Failed)), None)
            if failed is not None or None in messages:
                reason, self.peer_reported = failed or "it sent an invalid message", failed is not None
                break
            for message in messages:
                self._received.put(message)
        self._socket.close()
        self._lost_reason = reason
        self._ended.set()
        self._received.put(None)
        self._on_lost(reason)
