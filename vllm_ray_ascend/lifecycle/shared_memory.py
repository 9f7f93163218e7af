"""What outlives a process that is killed: names of Python's shared memory and of the semaphores of Ray's channels, and
the files of ZeroMQ's sockets, which it never removes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path("/dev/shm")
_MAPPED = re.compile(rf"{_FOLDER}/(psm_\w+)")
_SEMAPHORE = re.compile(r"sem\.(?:hdr|obj)\d+-\d+")


def mapped() -> set[str]:
    """Names of the segments that this process has open, its own and others': in a worker, those of its engine."""
    return set(_MAPPED.findall(_maps()))


def channels() -> set[str]:
    """Names of the semaphores of Ray's channels that this process has open; who has them open does not need them.

    Told by their inodes: of a semaphore that it has made itself, a process has mapped the file under another name.
    """
    inodes = {int(line.split()[4]) for line in _maps().splitlines() if f"{_FOLDER}/sem." in line}
    with os.scandir(_FOLDER) as entries:
        return {entry.name for entry in entries if _SEMAPHORE.fullmatch(entry.name) and entry.inode() in inodes}


def _maps() -> str:
    return Path("/proc/self/maps").read_text()


def remove(names: Iterable[str]) -> None:
    """Remove segments, and files by their whole path, as far as they are still there.

    Processes that have them open keep them until they end.
    """
    for name in names:
        with contextlib.suppress(OSError):
            (_FOLDER / name).unlink()
