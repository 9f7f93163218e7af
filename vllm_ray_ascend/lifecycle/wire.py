"""One writer and its readers over TCP, in the place of the ZeroMQ sockets of vLLM's message queue.

A ZeroMQ socket hands every message to a thread of its own and back, on both sides; on busy cores that is most of a
round trip between nodes. These block in the kernel, end at once where the other process does, and can be closed by
another thread. Their methods are those that vLLM's MessageQueue calls of a ZeroMQ socket.

A node that vanishes without a word is the lifeline's matter, which closes them: here a reader may be silent for as long
as its step takes.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

from vllm_ray_ascend.lifecycle.messages import Address
from vllm_ray_ascend.lifecycle.sockets import connect, listen

_COUNT = struct.Struct("!I")
_LENGTH = struct.Struct("!Q")
_CHUNK = 1 << 16
_JOINED = 1 << 20
"""Bytes up to which copying a message into one piece is cheaper than a system call for each."""
_ACCEPT_POLL_S = 0.1
_CONNECT_LIMIT_S = 30.0
_TOKEN_BYTES = 16

Buffer = bytes | bytearray | memoryview


class Writer:
    """Sends every message to all readers. ``check`` is called while it waits for one, and may raise."""

    def __init__(self, host: str, check: Callable[[], None]) -> None:
        self._listener = listen(host)
        self._listener.settimeout(_ACCEPT_POLL_S)
        self._check = check
        self._readers: list[socket.socket] = []
        self._token = secrets.token_hex(_TOKEN_BYTES)
        self.address = Address(host, self._listener.getsockname()[1], self._token)

    def recv(self) -> bytes:
        """Wait for the next reader to connect."""
        while True:
            self._check()
            with contextlib.suppress(TimeoutError, ConnectionError):  # nobody yet, or a stranger who left
                connection, _ = self._listener.accept()
                connection.settimeout(_CONNECT_LIMIT_S)
                if secrets.compare_digest(_exactly(connection, len(self._token)), self._token.encode()):
                    break
                connection.close()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._readers.append(connection)
        return b""

    def send(self, data: Buffer) -> None:
        """A message of one part."""
        self.send_multipart([data])

    def send_multipart(self, parts: Sequence[Buffer], copy: bool = True) -> None:
        """A message of several parts, to all readers. Raises ConnectionError where one is gone; others have it then."""
        lengths = [memoryview(part).nbytes for part in parts]
        header = _COUNT.pack(len(parts)) + b"".join(map(_LENGTH.pack, lengths))
        pieces = [b"".join((header, *parts))] if sum(lengths) < _JOINED else [header, *parts]
        lost: OSError | None = None
        for reader in self._readers:
            try:
                for piece in pieces:
                    reader.sendall(piece)
            except OSError as error:
                lost = lost or error
        if lost is not None:
            raise ConnectionError(f"a reader of this queue is gone: {lost}") from lost

    def close(self, linger: int | None = None) -> None:
        """End all connections, and a send that is under way. May be called in any thread, and again.
        ``linger`` is ZeroMQ's: nothing lingers here."""
        self._listener.close()
        for reader in self._readers:
            _shut(reader)


class Reader:
    """Reads the messages of one writer."""

    def __init__(self, address: Address) -> None:
        """Connects. Raises OSError where the writer cannot be reached."""
        self._socket = connect(address, _CONNECT_LIMIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(address.token.encode())
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._pending = b""

    def poll(self, timeout: float | None = None) -> bool:
        """Whether there is something to read, or the writer is gone, within ``timeout`` milliseconds."""
        return bool(self._pending) or bool(self._poll.poll(timeout))

    def recv(self) -> bytes:
        """The next message, of one part."""
        (part,) = self.recv_multipart()
        return bytes(part)

    def recv_multipart(self, copy: bool = True) -> list[bytearray]:
        """The next message. Raises ConnectionError where the writer is gone, or this end was closed."""
        (count,) = _COUNT.unpack(self._take(_COUNT.size))
        lengths = _LENGTH.iter_unpack(self._take(_LENGTH.size * count))
        return [self._take(length) for (length,) in lengths]

    def close(self, linger: int | None = None) -> None:
        """End a read that is under way, and all later ones. May be called in any thread, and again.
        ``linger`` is ZeroMQ's: nothing lingers here."""
        _shut(self._socket)

    def _take(self, size: int) -> bytearray:
        """The next ``size`` bytes. What comes with them is kept: a small message is one read."""
        if len(self._pending) < size < _CHUNK:
            self._pending += self._receive()
        taken = bytearray(self._pending[:size])
        self._pending = self._pending[size:]
        if len(taken) < size:
            taken += _exactly(self._socket, size - len(taken))
        return taken

    def _receive(self) -> bytes:
        with _lost():
            data = self._socket.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("closed")
            return data


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, got = memoryview(data), 0
    with _lost():
        while got < size:
            more = connection.recv_into(view[got:])
            if not more:
                raise ConnectionResetError("closed")
            got += more
    return data


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """A node that no longer answers is a TimeoutError to Python, which here is no matter of time."""
    try:
        yield
    except OSError as error:
        raise ConnectionError(f"the other end of this queue is gone: {error}") from error


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
