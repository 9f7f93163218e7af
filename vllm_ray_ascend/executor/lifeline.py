"""A TCP connection between the executor and each worker, by which each learns at once that the other is gone.

The kernel closes a dead process's connections, on whatever node it was, so that no Ray timeout stands between a
worker's death and the executor's knowing it, or the driver's and its workers'. A node that vanishes without a word is
found by keep-alive. The executor also gives its two orders this way: a worker that is stuck in HCCL answers nothing
else.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

import msgspec

VARIABLE = "_VLLM_RAY_ASCEND_LIFELINE"
STOP = b"S"
DIE = b"D"

_CONNECT_LIMIT_S = 10.0
_MOST_GREETING = 4096


class Address(msgspec.Struct, frozen=True):
    """Where the executor listens, and the word by which it knows its own workers."""

    host: str
    port: int
    token: str


class Greeting(msgspec.Struct, frozen=True):
    """What a worker says when it has connected."""

    token: str
    rank: int
    pid: int


class Hub:
    """The executor's end. ``on_death(rank, pid)`` is called in the hub's thread when a worker is gone."""

    def __init__(self, host: str, silence_s: float, on_death: Callable[[int, int], None]) -> None:
        self._on_death = on_death
        self._silence_s = silence_s
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self._token = secrets.token_hex(8)
        self.address = Address(host, self._listener.getsockname()[1], self._token)
        self._workers: dict[socket.socket, Greeting] = {}
        self._changed = threading.Condition()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in (self._listener, self._woken):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True, name="RayAscendLifeline")
        self._thread.start()

    def text(self) -> str:
        """The address as workers find it in VARIABLE."""
        return msgspec.json.encode(self.address).decode()

    def ranks(self) -> list[int]:
        """Ranks of the workers that are connected."""
        with self._changed:
            return sorted(greeting.rank for greeting in self._workers.values())

    def order(self, command: bytes) -> None:
        """Send STOP or DIE to every worker."""
        with self._changed:
            for worker in self._workers:
                with contextlib.suppress(OSError):
                    worker.send(command)

    def wait_until_gone(self, limit_s: float) -> list[int]:
        """Wait until no worker is connected; the ranks that still are after ``limit_s`` seconds."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            self._changed.wait_for(lambda: not self._workers, max(0.0, deadline - time.monotonic()))
        return self.ranks()

    def close(self) -> None:
        """Close all connections; workers that still live then end. May be called in any thread, and again."""
        with contextlib.suppress(OSError):
            self._wake.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._close_all()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        _keep_alive(connection, self._silence_s)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        """A greeting, or the end of a connection: workers say nothing else."""
        try:
            data = connection.recv(_MOST_GREETING)
        except OSError:
            data = b""
        if data and connection not in self._workers:
            greeting = _greeting(data)
            if greeting is not None and greeting.token == self._token:
                with self._changed:
                    self._workers[connection] = greeting
                    self._changed.notify_all()
                return
        self._selector.unregister(connection)
        connection.close()
        with self._changed:
            gone = self._workers.pop(connection, None)
            self._changed.notify_all()
        if gone is not None:
            self._on_death(gone.rank, gone.pid)

    def _close_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        with self._changed:
            self._workers.clear()
            self._changed.notify_all()


class Lifeline:
    """A worker's end. ``on_stop()`` and ``on_end(lost)`` are called in its thread; lost: the executor is gone."""

    def __init__(
        self,
        text: str,
        rank: int,
        pid: int,
        silence_s: float,
        on_stop: Callable[[], None],
        on_end: Callable[[bool], None],
    ) -> None:
        """Connects. Raises OSError where the executor cannot be reached."""
        address = msgspec.json.decode(text, type=Address)
        self._on_stop, self._on_end = on_stop, on_end
        self._closed = False
        self._socket = socket.create_connection((address.host, address.port), timeout=_CONNECT_LIMIT_S)
        self._socket.settimeout(None)
        _keep_alive(self._socket, silence_s)
        self._socket.sendall(msgspec.json.encode(Greeting(address.token, rank, pid)))
        threading.Thread(target=self._run, daemon=True, name="RayAscendLifeline").start()

    def close(self) -> None:
        """Tell the executor that this worker is done: it need not wait for the end of the process."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while True:
            try:
                order = self._socket.recv(1)
            except OSError:
                order = b""
            if self._closed:
                return
            if order != STOP:
                self._on_end(order != DIE)
                return
            self._on_stop()


def _greeting(data: bytes) -> Greeting | None:
    try:
        return msgspec.json.decode(data, type=Greeting)
    except msgspec.MsgspecError:
        return None


def _keep_alive(connection: socket.socket, silence_s: float) -> None:
    """Have the kernel end a connection whose other end has not answered for ``silence_s`` seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, int(silence_s / 3))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
