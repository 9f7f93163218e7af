"""The relay of a message queue's messages within a node other than the writer's.

The writer has one TCP connection to each such node: to the *first*, the lowest of its ranks. That rank hands every
message on to the *others* before it looks into it, in the thread that reads. So the writer's cost grows with the nodes,
and a message crosses the network once for each node. Why, and what was measured: docs/decisions/0010-node-relay.md.

Within the node a message goes through a Unix socket that keeps messages apart (SOCK_SEQPACKET). A large one goes as an
open file in memory (memfd), which the first rank fills once and the others read from. Neither has a name in a file
system, so nothing is left behind, whoever is killed; and a reader that waits sleeps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import socket
import struct
import time
import weakref
from collections.abc import Iterator, Sequence

import msgspec

from vllm_ray_ascend.ipc.authentication import AuthenticatingListener, connect_authenticated, create_token
from vllm_ray_ascend.ipc.message_parser import Buffer, MessageParser, frame
from vllm_ray_ascend.ipc.sockets import Address, shut_down
from vllm_ray_ascend.ipc.tcp_queue import QueueReader, TcpQueueReader, deadline_of, remaining_ms

MAX_UNREAD_BYTES = 256 << 20
"""Large messages that one reader may leave unread. A single message may exceed it."""
_MAX_INLINE_BYTES = 1 << 16
"""Larger messages are passed as a file. The default buffer of a socket has room for three of this size."""
_CHUNK_BYTES = 1 << 16
_IN_FILE = b"\0"
"""What accompanies a file; an inline message is never as short."""
_HAVE_READ = b"\0"
"""What a reader answers once it has read a file."""
_HELLO = struct.Struct("!I")
"""The first message of a reader: its rank."""


class Relay(msgspec.Struct, frozen=True):
    """How one node gets the messages of a queue. ``first``, which listens at ``address``, and ``others`` are ranks.

    ``limit_s``: the seconds that first waits for the others to make room; None: until the queue is closed.
    """

    first: int
    others: tuple[int, ...]
    address: Address
    limit_s: float | None = None


def plan_relays(nodes: Sequence[Sequence[int]], limit_s: float | None = None) -> list[Relay]:
    """Return the relays of ``nodes``, each of which is the ranks of a node. A node of one rank needs none."""
    return [_plan_relay(sorted(ranks), limit_s) for ranks in nodes if len(ranks) > 1]


def _plan_relay(ranks: Sequence[int], limit_s: float | None) -> Relay:
    address = Address(f"@vllm-ray-ascend-relay-{create_token()}", 0, create_token())
    return Relay(ranks[0], tuple(ranks[1:]), address, limit_s)


def open_reader(address: Address, relays: Sequence[Relay], rank: int) -> QueueReader:
    """Return the reading end of ``rank`` of the queue whose writer is at ``address``."""
    for relay in relays:
        if rank == relay.first:
            return RelayingReader(address, relay)
        if rank in relay.others:
            return RelayedReader(relay, rank)
    return TcpQueueReader(address)


class RelayingReader(QueueReader):
    """The reading end of a node's first rank."""

    def __init__(self, address: Address, relay: Relay) -> None:
        """Connect to the writer, and listen for the other ranks. Raises OSError as TcpQueueReader does."""
        self._reader = TcpQueueReader(address)
        self._limit_s = relay.limit_s
        self._writer = RelayWriter(relay)

    def poll(self, timeout: float | None = None) -> bool:
        """Return whether there is a message and every other rank is connected, within ``timeout`` milliseconds.

        Or whether an end is gone.
        """
        deadline = deadline_of(timeout)
        return self._writer.accept_readers(deadline) and self._reader.poll(remaining_ms(deadline))

    def recv_multipart(self, copy: bool = True) -> list[bytearray]:
        """Return the parts of the next message, once the other ranks have it too, or it is in their sockets.

        Raises ConnectionError where an end is gone or this end is closed, TimeoutError where a rank has made no room
        within the relay's limit. ``copy`` is ZeroMQ's, and makes no difference.
        """
        self.poll()
        parts = self._reader.recv_multipart()
        self._writer.send(parts, self._limit_s)
        return parts

    def late_readers(self) -> list[int]:
        """Return the ranks that have no room for the message that is being handed on. From any thread."""
        return self._writer.late_readers()

    def close(self, linger: int | None = None) -> None:
        """Close all connections, which ends every wait; from any thread, any number of times."""
        self._reader.close()
        self._writer.close()


class RelayWriter:
    """Sends messages to the other ranks of a node, in order."""

    def __init__(self, relay: Relay) -> None:
        """Listen for them."""
        self._awaited = set(relay.others)
        self._connected: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self._hello: socket.socket | None = None
        """A connection whose rank is not known yet."""
        self._readers: list[_Reader] = []
        self._late: list[_Reader] = []
        self._closed = False
        self._listener = AuthenticatingListener(
            relay.address.host,
            self._connected.put,
            token=relay.address.token,
            thread_name="RayAscendRelayListener",
        )
        weakref.finalize(self, self._listener.close).atexit = False

    def accept_readers(self, deadline: float | None) -> bool:
        """Return whether all ranks are connected by ``deadline`` (of time.monotonic()), or this end is closed."""
        while self._awaited and not self._closed:
            if not self._accept_reader(deadline):
                return False
        return True

    def _accept_reader(self, deadline: float | None) -> bool:
        """Take one rank. Return False where none has connected by ``deadline``."""
        if self._hello is None:
            try:
                self._hello = self._connected.get(timeout=_remaining_s(deadline))
            except queue.Empty:
                return False
        if self._hello is None:  # `close` has put it
            return True
        if not _wait([(self._hello, select.POLLIN)], deadline):
            return False
        connection, self._hello = self._hello, None
        with contextlib.suppress(OSError, struct.error, KeyError):  # gone again, or no rank that is awaited
            (rank,) = _HELLO.unpack(connection.recv(_HELLO.size))
            self._awaited.remove(rank)
            self._readers.append(_Reader(connection, rank))
        if not self._awaited:
            self._listener.close()
        return True

    def send(self, parts: Sequence[Buffer], limit_s: float | None) -> None:
        """Send a message to all ranks; a rank without room delays no other one.

        Returns once all have it, or have room for it. Raises TimeoutError after ``limit_s`` seconds, which names the
        ranks, and ConnectionError where one is gone, or this end is closed.
        """
        if self._closed:
            raise ConnectionError("VRA-399: this rank was closed while it handed on a message within its node")
        deadline = None if limit_s is None else time.monotonic() + limit_s
        with _message_of(parts) as message:
            self._late = [reader for reader in self._readers if not reader.send(message)]
            while self._late:
                if not _wait([(reader.connection, reader.awaited_event) for reader in self._late], deadline):
                    raise TimeoutError(
                        f"VRA-396: ranks {self.late_readers()} of this node have left no room for {limit_s:g} s for "
                        "the message that this rank hands on to them: their processes hang or are stopped"
                    )
                self._late = [reader for reader in self._late if not reader.send(message)]
        if gone := [reader for reader in self._readers if reader.error is not None]:
            raise ConnectionError(
                f"VRA-397: rank {gone[0].rank} of this node, to which this rank hands on the engine's messages, is "
                f"gone: {gone[0].error}"
            ) from gone[0].error

    def late_readers(self) -> list[int]:
        """Return the ranks for which `send` waits. From any thread."""
        return sorted(reader.rank for reader in self._late)

    def close(self) -> None:
        """Close all connections. From any thread, any number of times."""
        self._closed = True
        self._connected.put(None)
        self._listener.close()
        for reader in list(self._readers):
            shut_down(reader.connection)


class RelayedReader(QueueReader):
    """The reading end of a node's other rank."""

    def __init__(self, relay: Relay, rank: int) -> None:
        """Connect later, in the first wait: the first rank may not listen yet."""
        self._relay = relay
        self._rank = rank
        self._socket: socket.socket | None = None
        self._messages: list[list[bytearray]] = []
        self._closed = False
        self._error: OSError | None = None

    def poll(self, timeout: float | None = None) -> bool:
        """Return whether there is a message, or the first rank is gone, within ``timeout`` milliseconds."""
        if self._error is not None or self._messages:
            return True
        try:
            if self._socket is None:
                self._socket = self._connect()
                if self._closed:  # before it had a socket to close
                    shut_down(self._socket)
            if not _wait([(self._socket, select.POLLIN)], deadline_of(timeout)):
                return False
            self._messages.append(_receive(self._socket))
        except OSError as error:
            self._error = error
        return True

    def recv_multipart(self, copy: bool = True) -> list[bytearray]:
        """Return the parts of the next message. Raises ConnectionError where the first rank is gone, or this is closed.

        ``copy`` is ZeroMQ's, and makes no difference.
        """
        self.poll()
        if self._messages:
            return self._messages.pop()
        raise ConnectionError(
            f"VRA-398: rank {self._relay.first} of this node, which hands on the engine's messages, is gone: "
            f"{self._error}"
        ) from self._error

    def close(self, linger: int | None = None) -> None:
        """Close the connection, which ends a wait in progress and all later ones; from any thread."""
        self._closed = True
        if self._socket is not None:
            shut_down(self._socket)

    def _connect(self) -> socket.socket:
        connection = connect_authenticated(self._relay.address)
        connection.send(_HELLO.pack(self._rank))
        return connection


class _Message:
    """A message as the readers get it. A message in a file has ``file``, its number; it is open until all have it."""

    def __init__(self, data: bytes, size: int, file: int | None = None) -> None:
        self.data = data
        self.size = size
        self.ancillary = [] if file is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", file))]


@contextlib.contextmanager
def _message_of(parts: Sequence[Buffer]) -> Iterator[_Message]:
    pieces = frame(parts)
    size = sum(memoryview(piece).nbytes for piece in pieces)
    if size <= _MAX_INLINE_BYTES:
        yield _Message(bytes(pieces[0]), size)
        return
    file = os.memfd_create("vllm-ray-ascend-relay", os.MFD_CLOEXEC)
    try:
        _write_file(file, pieces)
        yield _Message(_IN_FILE, size, file)
    finally:
        os.close(file)


def _write_file(file: int, pieces: Sequence[Buffer]) -> None:
    for piece in pieces:
        left = memoryview(piece)
        while left:
            left = left[os.write(file, left) :]


class _Reader:
    """One other rank, as the first knows it."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.connection = connection
        self.rank = rank
        self.error: OSError | None = None
        self.awaited_event = select.POLLOUT
        """What makes a further attempt worthwhile, after one that found no room."""
        self._unread: list[int] = []
        """Sizes of the files that it has not read, in order."""

    def send(self, message: _Message) -> bool:
        """Send a message. Return False where there is no room; a reader that is gone has room."""
        try:
            self._drop_read_files()
            if message.ancillary and self._unread and sum(self._unread) + message.size > MAX_UNREAD_BYTES:
                self.awaited_event = select.POLLIN
                return False
            self.connection.sendmsg([message.data], message.ancillary, socket.MSG_DONTWAIT)
            if message.ancillary:
                self._unread.append(message.size)
        except BlockingIOError:
            self.awaited_event = select.POLLOUT
            return False
        except OSError as error:
            self.error = error
        return True

    def _drop_read_files(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._unread:
                if not self.connection.recv(1, socket.MSG_DONTWAIT):
                    raise ConnectionResetError("closed")
                self._unread.pop(0)


def _receive(connection: socket.socket) -> list[bytearray]:
    """Return the next message of the first rank. Raises OSError."""
    data, files, _, _ = socket.recv_fds(connection, _MAX_INLINE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise ConnectionResetError("closed")
    parser = MessageParser()
    if data != _IN_FILE:
        parser.feed(data)
    elif files:
        _read_file(files[0], parser)
        with contextlib.suppress(OSError):  # gone: this message counts all the same
            connection.send(_HAVE_READ, socket.MSG_DONTWAIT)
    else:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return parser.messages.popleft()


def _read_file(file: int, parser: MessageParser) -> None:
    """Read a message from the start of ``file``, large parts right into their place, and close it."""
    offset = 0
    with open(file, "rb", buffering=0) as opened:
        while not parser.messages:
            if (part := parser.unfilled()) is not None:
                size = os.preadv(opened.fileno(), [part], offset)
                parser.filled(size)
            else:
                data = os.pread(opened.fileno(), _CHUNK_BYTES, offset)
                parser.feed(data)
                size = len(data)
            if not size:
                raise ConnectionResetError("a message was cut off")
            offset += size


def _wait(connections: Sequence[tuple[socket.socket, int]], deadline: float | None) -> bool:
    """Return whether one of ``connections`` has its event, or has ended, by ``deadline``."""
    poll = select.poll()
    for connection, event in connections:
        poll.register(connection, event)
    return bool(poll.poll(remaining_ms(deadline)))


def _remaining_s(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
