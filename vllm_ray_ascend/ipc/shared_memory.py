"""Find and remove what outlives a killed process: the names of Python's shared memory segments, the semaphores of
Ray's channels, and the files of ZeroMQ's IPC sockets, which ZeroMQ never removes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from vllm_ray_ascend.errors import ClusterResourceError

_SHM_DIR = Path("/dev/shm")
_LEAST_SPACE = 2**20
_MAPPED_SEGMENT = re.compile(rf"{_SHM_DIR}/(psm_\w+)")
_CHANNEL_SEMAPHORE = re.compile(r"sem\.(?:hdr|obj)\d+-\d+")


def mapped_segments() -> set[str]:
    """Return the names of the segments that this process has mapped, whoever created them.

    In a worker these are the segments of its engine.
    """
    return set(_MAPPED_SEGMENT.findall(_read_memory_maps()))


def open_channel_semaphores() -> set[str]:
    """Return the file names of the semaphores of Ray's channels that this process has open.

    An open semaphore works without its name. They are compared by inode: a semaphore that this process created is
    mapped under another file name.
    """
    inodes = {int(line.split()[4]) for line in _read_memory_maps().splitlines() if f"{_SHM_DIR}/sem." in line}
    with os.scandir(_SHM_DIR) as entries:
        return {entry.name for entry in entries if _CHANNEL_SEMAPHORE.fullmatch(entry.name) and entry.inode() in inodes}


def check_space(free: int, total: int, queue_bytes: int) -> str | None:
    """Return a warning where a message queue of ``queue_bytes`` can outgrow what is ``free`` of ``total`` in /dev/shm.

    The queue takes memory as messages fill it: where none is left, the process that writes ends by SIGBUS.
    Raises ClusterResourceError where not even the first messages fit.
    """
    remedy = "`--shm-size=16g` for docker, an `emptyDir` with `medium: Memory` at /dev/shm for Kubernetes"
    if free < _LEAST_SPACE:
        raise ClusterResourceError(
            "VRA-359",
            f"{_SHM_DIR} has {_format_mib(free)} free of {_format_mib(total)}: no room for the queue between engine "
            f"and workers. Remove what fills it (`ls -l {_SHM_DIR}`), or make it larger: {remedy}.",
        )
    if free >= queue_bytes:
        return None
    return (
        f"VRA-358: {_SHM_DIR} has {_format_mib(free)} free of {_format_mib(total)}, less than the queue between engine "
        f"and workers may take ({_format_mib(queue_bytes)}): large messages end the engine with a bus error. Make it "
        f"larger: {remedy}; or lower VLLM_MQ_MAX_CHUNK_BYTES_MB."
    )


def free_space() -> tuple[int, int]:
    """Return how many bytes of /dev/shm are free, and how many there are."""
    usage = shutil.disk_usage(_SHM_DIR)
    return usage.free, usage.total


def _format_mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def remove_files(names: Iterable[str]) -> None:
    """Remove segments by name, and files by absolute path; those that are already gone are skipped.

    Processes that have them open keep them until they exit.
    """
    for name in names:
        with contextlib.suppress(OSError):
            (_SHM_DIR / name).unlink()


def _read_memory_maps() -> str:
    return Path("/proc/self/maps").read_text()
