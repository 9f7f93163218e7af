"""Messages between the two ends of a direct transport's link, one line of JSON each; the tensors go over HCCL.

Both ends have proven that they know the sender's token before the first of them (ipc/authentication.py).
"""

from __future__ import annotations

import msgspec

from vllm_ray_ascend.ipc.sockets import JsonLines


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The receiver's first message. ``device`` is the sender's, by its visible index; ``npu`` names the receiver's."""

    device: int
    process: str
    npu: str


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The sender's answer: ``root_info``, from HcclGetRootInfo, is what the pair's communicator is created with."""

    root_info: bytes
    process: str


class FetchRequest(msgspec.Struct, frozen=True, tag="fetch"):
    """The receiver requests an object, and receives its tensors after `SendReady`."""

    object_id: str


class SendReady(msgspec.Struct, frozen=True, tag="send_ready"):
    """The object's tensors are computed, and are sent now."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The last request cannot be served; the link stays usable."""

    text: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why the other end closes this link."""

    text: str


Message = Hello | Welcome | FetchRequest | SendReady | Refused | Failed
_LINES: JsonLines[Message] = JsonLines(Message)
encode_message, decode_message = _LINES.encode, _LINES.decode
