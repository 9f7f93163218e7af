"""Names in shared memory, of Python's segments and of the semaphores of Ray's channels, which outlive a process that is
killed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path("/dev/shm")
_MAPPED = re.compile(rf"{_FOLDER}/(psm_\w+)")
_SEMAPHORE = re.compile(rf"{_FOLDER}/(sem\.(?:hdr|obj)\d+-\d+)")


def mapped() -> set[str]:
    """Names of the segments that this process has open, its own and others': in a worker, those of its engine."""
    return set(_MAPPED.findall(_maps()))


def channels() -> set[str]:
    """Names of the semaphores of Ray's channels that this process has open, which need no name any more then."""
    return set(_SEMAPHORE.findall(_maps()))


def _maps() -> str:
    return Path("/proc/self/maps").read_text()


def remove(names: Iterable[str]) -> None:
    """Remove segments, as far as they are still there. Processes that have them open keep them until they end."""
    for name in names:
        with contextlib.suppress(OSError):
            (_FOLDER / name).unlink()
