"""A TCP queue of one writer and several readers, which replaces the ZeroMQ sockets of vLLM's message queue.

A ZeroMQ socket hands every message to an I/O thread of its own and back, on both sides; on busy cores that is most of a
round trip between nodes. Here a small message that the kernel accepts whole costs the writing thread one system call
per reader and wakes no other thread. Large messages, and what a slow reader leaves over, are sent by a thread beside
it, so that one slow reader delays neither the writer nor the others, and two processes that send each other large
messages at the same time both continue to read. What is pending is bounded: beyond that, `wait_for_space` waits.
Measured: docs/decisions/0001-tcp-not-zeromq.md.

There is no keepalive here, as a reader may be silent for as long as its step takes: silent node loss is detected by the
control connection, after which these sockets are closed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from threading import Condition, Lock, Thread

from vllm_ray_ascend.addresses import join_host_port
from vllm_ray_ascend.ipc.authentication import MAX_HANDSHAKES, AuthenticatingListener, connect_authenticated
from vllm_ray_ascend.ipc.message_parser import Buffer, MessageParser, frame
from vllm_ray_ascend.ipc.sockets import Address, shut_down

MAX_PENDING_BYTES = 256 << 20
"""For each reader. A single message may exceed it."""
_MAX_DIRECT_BYTES = 4 << 20
"""Up to so many bytes to all readers together, readers have a message sooner where no other thread is woken for it."""
_CHUNK_BYTES = 1 << 16
_MAX_PIECES = 512
"""Pieces of one system call (IOV_MAX is 1024)."""


class TcpQueueWriter:
    """Sends every message to all readers, each of which has to connect first (`recv`)."""

    def __init__(self, host: str, readers: int, max_pending_bytes: int = MAX_PENDING_BYTES) -> None:
        """Listen on ``host`` until ``readers`` readers have connected."""
        self._outbox = outbox = _Outbox(readers, max_pending_bytes)
        self._listener = AuthenticatingListener(
            host,
            outbox.add_reader,
            max_handshakes=MAX_HANDSHAKES + readers,
            thread_name="RayAscendQueueListener",
        )
        outbox.listener = self._listener
        self.address: Address = self._listener.address
        # The threads know the outbox alone, so that an unreferenced queue is collected, and ends them.
        weakref.finalize(self, outbox.close).atexit = False

    def poll(self, timeout: float | None = None) -> bool:
        """Return whether a further reader, for `recv`, has connected within ``timeout`` milliseconds."""
        return self._outbox.wait_for_reader(timeout)

    def recv(self) -> bytes:
        """Wait for the next reader to connect. Raises ConnectionError where the queue is closed."""
        self.poll()
        self._outbox.admit_reader()
        return b""

    def send(self, data: Buffer) -> None:
        """Send a message of one part to all readers."""
        self.send_multipart([data])

    def send_multipart(self, parts: Sequence[Buffer], copy: bool = True) -> None:
        """Send a message of several parts to all readers. It does not wait: see `wait_for_space`.

        The parts may be changed afterwards. Raises ConnectionError where a reader is gone; all other readers have been
        sent the message by then. ``copy`` is ZeroMQ's, and makes no difference.
        """
        self._outbox.send(_Message(frame(parts)))

    def wait_for_space(self, limit_s: float | None) -> None:
        """Wait until less than the bound is pending for every reader.

        Raises TimeoutError after ``limit_s`` seconds, which names the reader, and ConnectionError where the queue is
        closed.
        """
        self._outbox.wait_for_space(limit_s)

    def close(self, linger: int | None = None) -> None:
        """Close all connections, which ends every wait; what is pending is lost. From any thread, any number of times.

        ``linger`` is ZeroMQ's, and makes no difference.
        """
        self._outbox.close()


class QueueReader(ABC):
    """The reading end of a queue, with the methods of a ZeroMQ socket that vLLM's message queue calls."""

    @abstractmethod
    def poll(self, timeout: float | None = None) -> bool:
        """Return whether there is a whole message, or an end is gone, within ``timeout`` milliseconds."""

    def recv(self) -> bytes:
        """Return the next message, which has one part. Raises what `recv_multipart` does."""
        (part,) = self.recv_multipart()
        return bytes(part)

    @abstractmethod
    def recv_multipart(self, copy: bool = True) -> list[bytearray]:
        """Return the parts of the next message. Raises ConnectionError where an end is gone or this end is closed.

        ``copy`` is ZeroMQ's, and makes no difference.
        """

    @abstractmethod
    def close(self, linger: int | None = None) -> None:
        """Close this end, which ends a read in progress and all later ones; from any thread, any number of times.

        ``linger`` is ZeroMQ's, and makes no difference.
        """


class TcpQueueReader(QueueReader):
    """Reads the messages of one writer."""

    def __init__(self, address: Address) -> None:
        """Connect. Raises OSError where the writer cannot be reached, or is not the one of ``address``."""
        self._socket = connect_authenticated(address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._parser = MessageParser()
        self._error: OSError | None = None

    def poll(self, timeout: float | None = None) -> bool:
        """Return whether there is a whole message, or the writer is gone, within ``timeout`` milliseconds."""
        deadline = deadline_of(timeout)
        while not self._parser.messages and self._error is None:
            if not self._poll.poll(remaining_ms(deadline)):
                return False
            self._receive()
        return True

    def recv_multipart(self, copy: bool = True) -> list[bytearray]:
        """Return the parts of the next message. Raises ConnectionError where the writer is gone or this end is closed.

        ``copy`` is ZeroMQ's, and makes no difference.
        """
        self.poll()
        if self._parser.messages:
            return self._parser.messages.popleft()
        # ConnectionError: Python's TimeoutError, for a node that no longer answers, would mean something else here.
        raise ConnectionError(f"VRA-502: the other end of this queue is gone: {self._error}") from self._error

    def close(self, linger: int | None = None) -> None:
        """Close the connection, which ends a read in progress and all later ones; from any thread, any number of times.

        ``linger`` is ZeroMQ's, and makes no difference.
        """
        shut_down(self._socket)

    def _receive(self) -> None:
        """Read what has arrived: large parts right into their place, small messages in one system call."""
        try:
            part = self._parser.unfilled()
            if part is not None and len(part) >= _CHUNK_BYTES:
                size = self._socket.recv_into(part, 0, socket.MSG_DONTWAIT)
                self._parser.filled(size)
            else:
                data = self._socket.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT)
                self._parser.feed(data)
                size = len(data)
            if not size:
                raise ConnectionResetError("closed")
        except BlockingIOError:
            return
        except OSError as error:
            self._error = error


class _Message:
    """The pieces of one message, which all readers share."""

    def __init__(self, pieces: Sequence[Buffer]) -> None:
        self.pieces = pieces
        self.size = sum(memoryview(piece).nbytes for piece in pieces)
        self._kept: list[memoryview] | None = None

    def keep_from(self, offset: int) -> list[memoryview]:
        """Return what follows the first ``offset`` bytes, safe from changes: vLLM reuses its arrays for later steps."""
        if self._kept is None:
            self._kept = [memoryview(each if isinstance(each, bytes) else bytes(each)) for each in self.pieces]
        return _skip(self._kept, offset)


class _Reader:
    """One reader: its connection, and what it has not taken yet.

    Either the writing thread sends to it, or, while something is pending, the thread that sends what is pending.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection = connection
        self.name = name
        self.pending: deque[memoryview] = deque()
        self.pending_bytes = 0
        self.error: OSError | None = None

    def append(self, pieces: Iterable[memoryview]) -> None:
        """Have these pieces sent after those that are pending."""
        for piece in pieces:
            self.pending.append(piece)
            self.pending_bytes += piece.nbytes

    def drop(self, size: int) -> None:
        """Note that the first ``size`` pending bytes are sent."""
        self.pending_bytes -= size
        while size and size >= self.pending[0].nbytes:
            size -= self.pending.popleft().nbytes
        if size:
            self.pending[0] = self.pending[0][size:]

    def fail(self, error: OSError) -> None:
        """Note that the reader is gone."""
        self.error = error
        self.pending.clear()
        self.pending_bytes = 0


class _Outbox:
    """What the threads of a writer share. The lock is never held during a system call that sends."""

    def __init__(self, expected: int, max_pending_bytes: int) -> None:
        self.listener: AuthenticatingListener | None = None
        self._expected = expected
        self._max_pending_bytes = max_pending_bytes
        self._readers: list[_Reader] = []
        self._admitted = 0
        self._closed = False
        self._changed = Condition(Lock())
        self._writing = Lock()
        self._wake: int | None = None
        """The event that wakes the thread which sends what is pending; None before there is one."""

    def add_reader(self, connection: socket.socket) -> None:
        """Take a reader that has connected. Called in the listener's thread."""
        with contextlib.suppress(OSError):  # it may be gone again
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = _Reader(connection, _peer_name(connection))
        with self._changed:
            if self._closed or len(self._readers) >= self._expected:
                connection.close()
                return
            self._readers.append(reader)
            complete = len(self._readers) == self._expected
            self._changed.notify_all()
        if complete and self.listener is not None:
            self.listener.close()

    def wait_for_reader(self, timeout_ms: float | None) -> bool:
        """Return whether a reader that was not admitted yet has connected, or the queue is closed."""
        timeout_s = None if timeout_ms is None else timeout_ms / 1000
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or self._admitted < len(self._readers), timeout_s)

    def admit_reader(self) -> None:
        """Count a reader that has connected."""
        with self._changed:
            self._raise_if_closed()
            self._admitted += 1
            complete = self._admitted == self._expected
        if complete and self.listener is not None:
            self.listener.close()

    def wait_for_space(self, limit_s: float | None) -> None:
        """Wait until less than the bound is pending for every reader."""
        if not self._closed and self._fullest() is None:  # usual, and then no lock is needed
            return
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._fullest() is None, limit_s)
            self._raise_if_closed()
            if (reader := self._fullest()) is not None:
                raise TimeoutError(
                    f"VRA-593: {reader.pending_bytes / 2**20:.0f} MiB wait for the reader at {reader.name}, which has "
                    f"left no room for {limit_s:g} s (the bound is {self._max_pending_bytes / 2**20:g} MiB): its "
                    "process hangs or is stopped, or the link to its node is too slow"
                )

    def send(self, message: _Message) -> None:
        """Send a message to all readers, or have it sent."""
        with self._writing:
            self._raise_if_closed()
            is_large = message.size * len(self._readers) > _MAX_DIRECT_BYTES
            for reader in self._readers:
                self._send_to(reader, message, is_large)
            error = next((reader.error for reader in self._readers if reader.error is not None), None)
        if error is not None:
            raise ConnectionError(f"VRA-501: a reader of this queue is gone: {error}") from error

    def close(self) -> None:
        """Close all connections."""
        with self._changed:
            self._closed = True
            readers = list(self._readers)
            self._wake_sender()
            self._changed.notify_all()
        if self.listener is not None:
            self.listener.close()
        for reader in readers:
            shut_down(reader.connection)

    def _send_to(self, reader: _Reader, message: _Message, is_large: bool) -> None:
        if reader.error is not None or self._append_to_pending(reader, message, 0, only_after_others=not is_large):
            return
        try:
            rest = _send_now(reader.connection, message)
        except OSError as error:
            reader.fail(error)
            return
        if rest is not None:
            self._append_to_pending(reader, message, rest, only_after_others=False)

    def _append_to_pending(self, reader: _Reader, message: _Message, offset: int, *, only_after_others: bool) -> bool:
        if only_after_others and not reader.pending:
            return False
        kept = message.keep_from(offset)  # before the lock: it may copy
        with self._changed:
            if only_after_others and not reader.pending:  # sent meanwhile
                return False
            reader.append(kept)
            self._start_sender()
            self._wake_sender()
        return True

    def _start_sender(self) -> None:
        if self._wake is None and not self._closed:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            Thread(target=self._send_pending, args=(self._wake,), daemon=True, name="RayAscendQueueSender").start()

    def _wake_sender(self) -> None:
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)

    def _send_pending(self, wake: int) -> None:
        """Send what is pending, to each reader when its socket takes more. Runs in a thread of its own."""
        try:
            while behind := self._wait_for_pending(wake):
                poll = select.poll()
                poll.register(wake, select.POLLIN)
                for number in behind:
                    poll.register(number, select.POLLOUT)
                for number, _ in poll.poll():
                    if number != wake:
                        self._send_some(behind[number])
        finally:
            with self._changed:
                self._wake = None
                os.close(wake)

    def _wait_for_pending(self, wake: int) -> dict[int, _Reader]:
        """Return the readers for which something is pending, by number of their connections; none once it is closed."""
        while True:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(wake)
            with self._changed:
                if self._closed:
                    return {}
                if behind := {each.connection.fileno(): each for each in self._readers if each.pending}:
                    return behind
            _wait_readable(wake)

    def _send_some(self, reader: _Reader) -> None:
        with self._changed:
            pieces = list(itertools.islice(reader.pending, _MAX_PIECES))
        try:
            sent = reader.connection.sendmsg(pieces, [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            with self._changed:
                reader.fail(error)
                self._changed.notify_all()
            return
        with self._changed:
            reader.drop(sent)
            self._changed.notify_all()

    def _fullest(self) -> _Reader | None:
        """Return a reader for which as much is pending as may be; None where there is none."""
        for reader in self._readers:
            if reader.pending_bytes >= self._max_pending_bytes:
                return reader
        return None

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise ConnectionError("VRA-594: this queue was closed")


def _send_now(connection: socket.socket, message: _Message) -> int | None:
    """Send what the kernel accepts without waiting. Return the number of bytes, None for all. Raises OSError."""
    left, sent = message.pieces, 0
    try:
        while sent < message.size:
            size = connection.sendmsg(left[:_MAX_PIECES], [], socket.MSG_DONTWAIT)
            sent += size
            if sent < message.size:
                left = _skip(left, size)
    except BlockingIOError:
        return sent
    return None


def _skip(pieces: Sequence[Buffer], size: int) -> list[memoryview]:
    """Return ``pieces`` without their first ``size`` bytes."""
    left: list[memoryview] = []
    for piece in pieces:
        view = memoryview(piece)
        if size < view.nbytes:
            left.append(view[size:])
        size = max(0, size - view.nbytes)
    return left


def _wait_readable(number: int) -> None:
    poll = select.poll()
    poll.register(number, select.POLLIN)
    poll.poll()


def _peer_name(connection: socket.socket) -> str:
    try:
        host, port, *_ = connection.getpeername()
    except OSError:
        return "an unknown address"
    return join_host_port(host, port)


def deadline_of(timeout_ms: float | None) -> float | None:
    """Return when ``timeout_ms`` milliseconds will have passed, on the clock of time.monotonic(); None: never."""
    return None if timeout_ms is None else time.monotonic() + timeout_ms / 1000


def remaining_ms(deadline: float | None) -> float | None:
    """Return the milliseconds until ``deadline``, at least 0; None: without limit."""
    return None if deadline is None else max(0.0, 1000 * (deadline - time.monotonic()))
