"""What the two ends of a lifeline say to each other: single bytes down, one line of JSON a message up."""

from __future__ import annotations

import msgspec

from vllm_ray_ascend.lifecycle.lines import Lines

STOP = b"S"
"""End in order, after the present step."""
DIE = b"D"
"""End at once: a sibling is gone, and HCCL would wait for it."""
ASK = b"A"
"""Say what you are doing."""
READ = b"R"
"""What you sent last to the next stage, or to the executor, was read."""


class Address(msgspec.Struct, frozen=True):
    """Where the hub listens, and the word by which it knows its own."""

    host: str
    port: int
    token: str


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first message: who has connected, from the node with which address."""

    token: str
    rank: int
    pid: int
    node: str


class Witness(msgspec.Struct, frozen=True, tag="witness"):
    """The only message of a connection that ends with the process which said hello as ``rank``."""

    token: str
    rank: int
    pid: int


class Holds(msgspec.Struct, frozen=True, tag="holds"):
    """The physical NPU, or what else ``device`` says, that the sender opens."""

    physical: int
    device: str = "NPU"


class Doing(msgspec.Struct, frozen=True, tag="doing"):
    """A part of the start begins; empty: the last one is over."""

    what: str


class Segment(msgspec.Struct, frozen=True, tag="segment"):
    """A shared memory segment, or the path of a socket's file, that has to be removed when the sender is gone."""

    name: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The sender cannot go on, though its process lives."""

    text: str


class HasRead(msgspec.Struct, frozen=True, tag="read"):
    """The sender has read the message of a step, and everything that belongs to it."""


class Report(msgspec.Struct, frozen=True, tag="report"):
    """The answer to ASK."""

    text: str


Message = Hello | Witness | Holds | Doing | Segment | Failed | HasRead | Report
_LINES: Lines[Message] = Lines(Message)
line, parse = _LINES.line, _LINES.parse
