"""Sockets as all of this room has them: where one listens, and how long a connection may be silent."""

from __future__ import annotations

import socket


def listen(host: str) -> socket.socket:
    """A socket that listens on an address of this node, on a port of the system's choice."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=128)


def keep_alive(connection: socket.socket, silence_s: float) -> None:
    """Have the kernel end a connection whose other end has not answered for ``silence_s`` seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, int(silence_s / 3))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
