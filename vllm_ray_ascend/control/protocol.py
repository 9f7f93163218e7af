"""Messages of the control connection between a process and the process that owns it: one line of JSON each, both ways.

Both ends have proven that they know the server's token before the first of them (ipc/authentication.py).

A client sends facts about itself (`Hello`, `DeviceOpened`, ...), the server sends commands. Both send `Extension`s,
which are for the code that uses the connection.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from vllm_ray_ascend.ipc.sockets import JsonLines


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first message of a client: its rank and process, the address of its node, and the file with its output."""

    rank: int
    pid: int
    node: str
    log: str = ""


class SentinelHello(msgspec.Struct, frozen=True, tag="sentinel"):
    """The only message of an exit sentinel: its connection ends with the process that sent Hello as ``rank``."""

    rank: int
    pid: int


class DeviceOpened(msgspec.Struct, frozen=True, tag="device_opened"):
    """The physical number of the device that the client opens. ``device`` is its kind: NPU or GPU."""

    physical: int
    device: str = "NPU"


class PhaseStarted(msgspec.Struct, frozen=True, tag="phase_started"):
    """A phase of the client's startup begins. An empty name: the last phase is over."""

    phase: str


class IpcResource(msgspec.Struct, frozen=True, tag="ipc_resource"):
    """A shared memory segment, or a socket's path, that has to be removed once the client is gone.

    The server accepts names of the forms in control/ipc_resources.py only.
    """

    name: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The client cannot continue, though its process lives."""

    text: str


class StatusReport(msgspec.Struct, frozen=True, tag="status"):
    """The answer to REQUEST_STATUS: what the client is doing."""

    text: str


class EventReported(msgspec.Struct, frozen=True, tag="event"):
    """An event of the client (observability/events.py), which the server's owner is to log."""

    name: str
    fields: dict[str, str | int | float | None]


class Command(msgspec.Struct, frozen=True, tag="command"):
    """What the server orders a client to do."""

    name: Literal["stop", "terminate", "request_status"]


class Extension(msgspec.Struct, frozen=True, tag="extension"):
    """A message ``name`` that means nothing to client and server: they hand it to their ``on_extension``."""

    name: str


STOP = Command("stop")
"""End gracefully, after the present step."""
TERMINATE = Command("terminate")
"""End immediately: a sibling is gone, and HCCL would wait for it."""
REQUEST_STATUS = Command("request_status")
"""Send a StatusReport."""

MAX_LINE_BYTES = 1 << 20
MAX_HELLO_BYTES = 1 << 12
"""Of the first line of a connection, which is a `Hello` or a `SentinelHello`."""

Message = (
    Hello
    | SentinelHello
    | DeviceOpened
    | PhaseStarted
    | IpcResource
    | Failed
    | StatusReport
    | EventReported
    | Command
    | Extension
)
_LINES: JsonLines[Message] = JsonLines(Message)
encode_message, decode_message = _LINES.encode, _LINES.decode
