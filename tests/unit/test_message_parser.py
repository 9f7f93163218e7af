"""Framing of messages on a TCP connection: any message in any pieces, and bytes that are no message."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ray_ascend.ipc.message_parser import MAX_MESSAGE_BYTES, InvalidMessageError, MessageParser, frame

pytestmark = pytest.mark.unit

PARTS = st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 90_000).map(bytes)), min_size=1, max_size=5)


def bytes_of(messages: list[list[bytes]]) -> bytes:
    return b"".join(bytes(piece) for message in messages for piece in frame(message))


@settings(max_examples=200, deadline=None)
@given(messages=st.lists(PARTS, max_size=4), cuts=st.lists(st.integers(0, 1 << 18), max_size=8), direct=st.booleans())
def test_messages_arrive_as_they_were_sent(messages: list[list[bytes]], cuts: list[int], direct: bool) -> None:
    """In whatever pieces their bytes arrive, read right into their place where that is known, or not."""
    stream = bytes_of(messages)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = MessageParser()
    for start, end in itertools.pairwise(edges):
        piece = stream[start:end]
        while piece:
            place = parser.unfilled() if direct else None
            if place is None:
                parser.feed(piece[:10_000])
                piece = piece[10_000:]
            else:
                used = min(len(place), len(piece))
                place[:used] = piece[:used]
                parser.filled(used)
                piece = piece[used:]
    assert list(parser.messages) == messages


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=8))
def test_bytes_that_are_no_message_are_refused_or_incomplete(pieces: list[bytes]) -> None:
    """They raise nothing else, and take no more memory than a message may."""
    parser = MessageParser(max_message_bytes=1 << 20)
    try:
        for piece in pieces:
            parser.feed(piece)
    except InvalidMessageError:
        return
    for message in parser.messages:
        assert message and all(isinstance(part, bytearray) for part in message)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (struct.pack("!I", 0), "VRA-591"),
        (struct.pack("!I", 0x47455420), "VRA-591"),  # "GET "
        (struct.pack("!IQ", 1, MAX_MESSAGE_BYTES + 1), "VRA-592"),
        (struct.pack("!IQQ", 2, MAX_MESSAGE_BYTES, 1), "VRA-592"),
    ],
)
def test_impossible_headers_are_refused_before_memory_is_taken(header: bytes, code: str) -> None:
    with pytest.raises(InvalidMessageError, match=code):
        MessageParser().feed(header)


def test_parts_of_any_buffer() -> None:
    parts: list[Any] = [bytearray(b"a"), memoryview(b"bcd")[1:], memoryview(bytes(80_000)).cast("d"), b""]
    parser = MessageParser()
    parser.feed(b"".join(map(bytes, frame(parts))))
    assert [bytes(part) for part in parser.messages[0]] == [b"a", b"cd", bytes(80_000), b""]
