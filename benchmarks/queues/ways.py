"""The ways that are compared. Each has a writer and a reader with the calls that vLLM's message queue makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import zmq

from vllm_ray_ascend.ipc.message_parser import Buffer, frame
from vllm_ray_ascend.ipc.sockets import Address
from vllm_ray_ascend.ipc.tcp_queue import TcpQueueReader, TcpQueueWriter

_JOINED_BYTES = 1 << 20


class BlockingWriter(TcpQueueWriter):
    """Ours until November 2026: `sendall` to one reader after another, in the writing thread."""

    def send_multipart(self, parts: Sequence[Buffer], copy: bool = True) -> None:
        """Send a message to all readers."""
        pieces = frame(parts)
        if sum(memoryview(piece).nbytes for piece in pieces) < _JOINED_BYTES:
            pieces = [b"".join(pieces)]
        for reader in self._outbox._readers:
            for piece in pieces:
                reader.connection.sendall(piece)


class PendingWriter(TcpQueueWriter):
    """Ours, as `CancellableQueue.enqueue` uses it."""

    def send_multipart(self, parts: Sequence[Buffer], copy: bool = True) -> None:
        """Send a message to all readers."""
        self.wait_for_space(None)
        super().send_multipart(parts, copy)


class ZmqWriter:
    """vLLM's own socket, with its options."""

    def __init__(self, host: str, readers: int) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, True)
        self._socket.bind(f"tcp://{host}:0")
        self.address = Address(host, int(self._socket.getsockopt(zmq.LAST_ENDPOINT).decode().rsplit(":", 1)[1]), "")

    def recv(self) -> Any:
        """Wait for the next reader."""
        return self._socket.recv()

    def send_multipart(self, parts: Sequence[Buffer], copy: bool = True) -> None:
        """Send a message to all readers."""
        self._socket.send_multipart(parts, copy=False)


class ZmqReader:
    """vLLM's own socket, polled."""

    def __init__(self, address: Address) -> None:
        self._socket = zmq.Context().socket(zmq.SUB)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, "")
        self._socket.connect(f"tcp://{address}")

    def recv_multipart(self) -> Any:
        """Return the next message."""
        self._socket.poll()
        return self._socket.recv_multipart(copy=False)


WAYS: dict[str, tuple[Callable[[str, int], Any], Callable[[Address], Any]]] = {
    "blocking": (BlockingWriter, TcpQueueReader),
    "pending": (PendingWriter, TcpQueueReader),
    "zeromq": (ZmqWriter, ZmqReader),
}
