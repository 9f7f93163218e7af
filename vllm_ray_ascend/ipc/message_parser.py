"""How a message of several parts is written on a TCP connection, and the parser that reads it. Pure.

A message is the number of its parts (4 bytes), the length of each (8 bytes), then the parts; numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence

MAX_PARTS = 0xFFFF
"""As in vLLM's messages over shared memory."""
MAX_MESSAGE_BYTES = 1 << 34
_COUNT = struct.Struct("!I")
_LENGTH = struct.Struct("!Q")
_MAX_JOINED_BYTES = 1 << 16
"""Up to this size, joining the parts of a message is cheaper than several pieces."""

Buffer = bytes | bytearray | memoryview


class InvalidMessageError(ConnectionError):
    """What arrived is not a message of this format."""


def frame(parts: Sequence[Buffer]) -> list[Buffer]:
    """Return the pieces that make up the message of these ``parts``; the pieces of a large message are not copies."""
    lengths = [memoryview(part).nbytes for part in parts]
    header = _COUNT.pack(len(parts)) + b"".join(map(_LENGTH.pack, lengths))
    if sum(lengths) <= _MAX_JOINED_BYTES:
        return [b"".join((header, *parts))]
    return [header, *map(_as_bytes, (part for part, length in zip(parts, lengths, strict=True) if length))]


def _as_bytes(part: Buffer) -> Buffer:
    return part if isinstance(part, bytes) else memoryview(part).cast("B")


class MessageParser:
    """Makes messages of the bytes of one connection, in whatever pieces they arrive."""

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_message_bytes = max_message_bytes
        self._unread = b""
        self._lengths: list[int] | None = None
        """The lengths of the message that is being read; None before its header has arrived."""
        self._parts: list[bytearray] = []
        self._filled = 0
        """Bytes of the last part that have arrived."""
        self.messages: deque[list[bytearray]] = deque()
        """The complete messages, in order."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the connection. Raises InvalidMessageError."""
        self._unread += data
        while self._advance():
            pass

    def unfilled(self) -> memoryview | None:
        """Return the rest of the part that is being read, for bytes to be read right into it (see `filled`).

        None where it is not known how long that is.
        """
        if self._lengths is None or self._unread or not self._parts or self._filled == len(self._parts[-1]):
            return None
        return memoryview(self._parts[-1])[self._filled :]

    def filled(self, size: int) -> None:
        """Note that the first ``size`` bytes of `unfilled` have arrived."""
        self._filled += size
        self.feed(b"")

    def _advance(self) -> bool:
        """Use some of the unread bytes. Return False where more are needed first."""
        if self._lengths is None:
            return self._read_header()
        if self._parts and self._filled < len(self._parts[-1]):
            return self._fill_part()
        if len(self._parts) < len(self._lengths):
            self._parts.append(bytearray(self._lengths[len(self._parts)]))
            self._filled = 0
            return True
        self.messages.append(self._parts)
        self._lengths, self._parts = None, []
        return True

    def _read_header(self) -> bool:
        if len(self._unread) < _COUNT.size:
            return False
        (count,) = _COUNT.unpack_from(self._unread)
        if not 1 <= count <= MAX_PARTS:
            raise InvalidMessageError(f"VRA-591: a message of {count} parts arrived: the connection is not a queue's")
        end = _COUNT.size + _LENGTH.size * count
        if len(self._unread) < end:
            return False
        lengths = [length for (length,) in _LENGTH.iter_unpack(self._unread[_COUNT.size : end])]
        if sum(lengths) > self._max_message_bytes:
            raise InvalidMessageError(
                f"VRA-592: a message of {sum(lengths)} bytes arrived, more than the "
                f"{self._max_message_bytes} that a queue carries"
            )
        self._lengths, self._unread = lengths, self._unread[end:]
        return True

    def _fill_part(self) -> bool:
        part = self._parts[-1]
        used = min(len(self._unread), len(part) - self._filled)
        part[self._filled : self._filled + used] = self._unread[:used]
        self._filled += used
        self._unread = self._unread[used:]
        return used > 0
