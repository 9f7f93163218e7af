"""Sockets as all of this room has them: where one listens, how one connects, and how long it may be silent."""

from __future__ import annotations

import socket

from vllm_ray_ascend.lifecycle.messages import Address


def listen(host: str) -> socket.socket:
    """A socket that listens on an address of this node, on a port of the system's choice."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=128)


def connect(address: Address, limit_s: float = 10.0) -> socket.socket:
    """A connection that blocks, whatever the process's default is. OSError after ``limit_s`` seconds, or before."""
    connection = socket.create_connection((address.host, address.port), timeout=limit_s)
    connection.settimeout(None)
    return connection


def keep_alive(connection: socket.socket, silence_s: float) -> None:
    """Have the kernel end a connection whose other end has not answered for ``silence_s`` seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, int(silence_s / 3))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
