"""One end of the TCP connection beside a pair's communicator: it carries requests, and ends as a peer does."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable

from vllm_ray_ascend.lifecycle.sockets import keep_alive
from vllm_ray_ascend.transport.direct.messages import Failed, Message, line, parse

_CHUNK = 65536
_MOST_UNREAD = 1 << 20


class ChannelLostError(ConnectionError):
    """The other end is gone, or gave the link up: the text says which."""


class Channel:
    """Messages of one connection, read by a thread of its own, so that its end is noticed whatever goes on.

    ``on_lost`` is called once, in that thread, when the other end is gone.
    """

    def __init__(self, connection: socket.socket, silence_s: float, on_lost: Callable[[str], None]) -> None:
        connection.settimeout(None)
        keep_alive(connection, silence_s)
        self._socket = connection
        self._on_lost = on_lost
        self._heard: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lost = ""
        self._ended = threading.Event()
        self.told = False
        """Whether the other end said why it went."""
        threading.Thread(target=self._read, daemon=True, name="RayAscendDirectReader").start()

    @property
    def lost(self) -> str:
        """Why the other end is no longer there; empty while it is."""
        return self._lost

    def wait_lost(self, limit_s: float) -> str:
        """``lost``, as it is after ``limit_s`` seconds or as soon as there is a reason."""
        self._ended.wait(limit_s)
        return self._lost

    def say(self, message: Message) -> None:
        """Send. Raises ChannelLostError."""
        try:
            self._socket.sendall(line(message))
        except OSError as error:
            raise ChannelLostError(self._lost or str(error)) from error

    def hear(self, limit_s: float | None = None) -> Message:
        """The next message. Raises ChannelLostError, and TimeoutError after ``limit_s`` seconds."""
        try:
            message = self._heard.get(timeout=limit_s)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._heard.put(None)
            raise ChannelLostError(self._lost)
        return message

    def close(self) -> None:
        """End the connection. May be called in any thread, and again."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        unread, why = b"", "the connection was closed"
        while len(unread) < _MOST_UNREAD:
            try:
                data = self._socket.recv(_CHUNK)
            except OSError as error:
                why, data = str(error), b""
            if not data:
                break
            *lines, unread = (unread + data).split(b"\n")
            messages = [parse(text) for text in lines]
            failed = next((each.text for each in messages if isinstance(each, Failed)), None)
            if failed is not None or None in messages:
                why, self.told = failed or "it sent what is no message", failed is not None
                break
            for message in messages:
                self._heard.put(message)
        self._socket.close()
        self._lost = why
        self._ended.set()
        self._heard.put(None)
        self._on_lost(why)
