"""Messages of a connection, one line of JSON each."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

_Message = TypeVar("_Message")


class Lines(Generic[_Message]):
    """How the messages of one kind of connection are written and read. ``kinds``: the union of their types."""

    def __init__(self, kinds: Any) -> None:
        self._decoder: msgspec.json.Decoder[_Message] = msgspec.json.Decoder(kinds)

    def line(self, message: _Message) -> bytes:
        """``message`` as it is sent."""
        return msgspec.json.encode(message) + b"\n"

    def parse(self, text: bytes) -> _Message | None:
        """The message of one line; None where it is none."""
        try:
            return self._decoder.decode(text)
        except msgspec.MsgspecError:
            return None
