"""What the two ends of a direct transport's link say, one line of JSON a message; tensors go over HCCL."""

from __future__ import annotations

import msgspec

from vllm_ray_ascend.lifecycle.lines import Lines


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The receiver's first message. ``device`` is the sender's, by its visible number, ``place`` the receiver's own."""

    token: str
    device: int
    who: str
    place: str


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The sender's answer: with ``root``, what HcclGetRootInfo gave, the pair's communicator is made."""

    root: bytes
    who: str


class Want(msgspec.Struct, frozen=True, tag="want"):
    """The receiver wants an object, and receives as soon as it is told that the object comes."""

    object_id: str


class Coming(msgspec.Struct, frozen=True, tag="coming"):
    """The object's tensors are there, and are sent now."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """What was asked for last is not to be had; the link stays."""

    text: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why the other end gives this link up."""

    text: str


Message = Hello | Welcome | Want | Coming | Refused | Failed
_LINES: Lines[Message] = Lines(Message)
line, parse = _LINES.line, _LINES.parse
