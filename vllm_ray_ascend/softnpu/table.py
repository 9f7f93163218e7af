"""What the processes of this node hold of its software NPUs, as the device layer itself counts it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from vllm_ray_ascend.softnpu.build import build


@dataclass(frozen=True)
class Holding:
    """One device that a process has open. `memory` in bytes; `communicators` are the process's, of all devices."""

    pid: int
    communicators: int
    physical: int
    memory: int
    streams: int


def parse(text: str) -> list[Holding]:
    """The lines of `softnpu_node_table` (csrc/runtime/node_table.cpp)."""
    return [Holding(*map(int, line.split())) for line in text.splitlines()]


def holdings(libraries: Path | None = None) -> list[Holding]:
    """All open devices of all live processes of this node, without taking part in the table."""
    library = ctypes.CDLL(str((libraries or build()) / "libascendcl.so"))
    library.softnpu_node_table.restype = ctypes.c_size_t
    size = 1 << 12
    while True:
        buffer = ctypes.create_string_buffer(size)
        needed = int(library.softnpu_node_table(buffer, ctypes.c_size_t(size)))
        if needed < size:
            return parse(buffer.value.decode())
        size = 2 * needed
