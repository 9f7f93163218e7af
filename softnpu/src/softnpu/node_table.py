"""The node's table of software NPUs: what each process holds, as the device layer itself counts it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from softnpu.build import build_libraries


@dataclass(frozen=True)
class DeviceUsage:
    """One device that a process has open.

    ``physical`` is the device's number on its node, ``memory`` is in bytes; ``communicators`` are those of the process
    on all its devices.
    """

    pid: int
    communicators: int
    physical: int
    memory: int
    streams: int


def parse_node_table(text: str) -> list[DeviceUsage]:
    """Parse the lines of `softnpu_node_table` (csrc/runtime/node_table.cpp)."""
    return [DeviceUsage(*map(int, line.split())) for line in text.splitlines()]


def read_node_table(libraries: Path | None = None) -> list[DeviceUsage]:
    """Return all open devices of all live processes of this node, without entering this process in the table."""
    library = ctypes.CDLL(str((libraries or build_libraries()) / "libascendcl.so"))
    library.softnpu_node_table.restype = ctypes.c_size_t
    size = 1 << 12
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = int(library.softnpu_node_table(buffer, ctypes.c_size_t(size)))
        if needed < size:
            return parse_node_table(buffer.value.decode())
        size = 2 * needed
