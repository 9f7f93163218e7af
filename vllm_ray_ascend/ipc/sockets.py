"""Sockets as this package uses them: addresses with a token, listening, connecting, keepalive, JSON lines.

Between nodes they are TCP's. Within a node they may be Unix sockets with an abstract name, which is written with an `@`
in the place of a host, as `ss` does: such a socket keeps the boundaries of its messages, can pass open files, and
leaves no file behind.

How the two ends of a connection prove the token to each other: ipc/authentication.py.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from vllm_ray_ascend.addresses import join_host_port, without_brackets
from vllm_ray_ascend.errors import ClusterResourceError

_ABSTRACT = "@"
"""What the name of an abstract Unix socket begins with."""


class Address(msgspec.Struct, frozen=True):
    """Where a server listens, and the token that its clients have to know. The token is in no text of an address.

    ``host`` may be the abstract name of a Unix socket, `@NAME`; ``port`` is 0 then.
    """

    host: str
    port: int
    token: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        return self.host if self.host.startswith(_ABSTRACT) else join_host_port(self.host, self.port)


def listen(host: str, clients: int = 128) -> socket.socket:
    """Return a socket that listens on this node's address or name ``host``, on a port that the system chooses.

    ``clients`` may connect simultaneously; the system may have a lower limit (net.core.somaxconn), beyond which they
    try again by themselves.

    ``host`` may also be an abstract name, `@NAME`: of a Unix socket.
    """
    if host.startswith(_ABSTRACT):
        return _listen_with_name(host, clients)
    family, _, _, _, found = socket.getaddrinfo(without_brackets(host), 0, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(found[:2], family=family, backlog=clients)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        raise ClusterResourceError(
            "VRA-286",
            f"Ray knows this node by {host}, and no interface here has that address, so that no process of an engine "
            "can listen at it. `ip -brief address` lists the addresses; `ray stop` here, then `ray start ... "
            "--node-ip-address=ADDRESS` with one that the other nodes reach.",
        ) from error


def _listen_with_name(name: str, clients: int) -> socket.socket:
    with _named_socket() as listener:
        listener.bind(_kernel_name(name))
        listener.listen(clients)
    return listener


@contextlib.contextmanager
def _named_socket() -> Iterator[socket.socket]:
    """Yield a new Unix socket that keeps messages apart; close it where the body fails."""
    new = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        yield new
    except OSError:
        new.close()
        raise


def _kernel_name(name: str) -> str:
    return "\0" + name.removeprefix(_ABSTRACT)


def bound_port(listener: socket.socket) -> int:
    """Return the port of a socket of `listen`; 0 where it has a name."""
    return 0 if listener.family == socket.AF_UNIX else int(listener.getsockname()[1])


def connect(address: Address, limit_s: float = 10.0) -> socket.socket:
    """Return a blocking connection, whatever the process's default timeout is.

    Raises OSError where it cannot be made within ``limit_s`` seconds.
    """
    if address.host.startswith(_ABSTRACT):
        return _connect_to_name(address.host, limit_s)
    connection = socket.create_connection((without_brackets(address.host), address.port), timeout=limit_s)
    connection.settimeout(None)
    return connection


def _connect_to_name(name: str, limit_s: float) -> socket.socket:
    with _named_socket() as connection:
        connection.settimeout(limit_s)
        connection.connect(_kernel_name(name))
        connection.settimeout(None)
    return connection


def shut_down(connection: socket.socket) -> None:
    """End a connection that may have ended already; who waits for it, in any thread, wakes up."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def keep_alive(connection: socket.socket, silence_s: float) -> None:
    """Have the kernel end a connection whose peer has not answered for ``silence_s`` seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval_s = max(1, int(silence_s / 3))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))


_Message = TypeVar("_Message")


class JsonLines(Generic[_Message]):
    """Framing of one protocol: one line of JSON a message. ``message_types`` is the union of its message types."""

    def __init__(self, message_types: Any) -> None:
        self._decoder: msgspec.json.Decoder[_Message] = msgspec.json.Decoder(message_types)

    def encode(self, message: _Message) -> bytes:
        """Return ``message`` as one line, with its newline."""
        return msgspec.json.encode(message) + b"\n"

    def decode(self, line: bytes) -> _Message | None:
        """Return the message of one line; None where the line is not a message of this protocol."""
        try:
            return self._decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
