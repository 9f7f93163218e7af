"""The record of an engine's failure: first cause, and what each rank did last. A file in Ray's log folder.

It is for `vllm-ray-ascend bundle` and for people: written without a call to Ray, whose head may be what is gone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vllm_ray_ascend import __version__
from vllm_ray_ascend.compat.ray_processes import session_log_folder
from vllm_ray_ascend.compat.versions import stack
from vllm_ray_ascend.control.server import Peer
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import EVENTS

logger = get_logger(__name__)

FOLDER = "vllm_ray_ascend"
"""In Ray's log folder of the engine core's node."""
KEPT = 10
"""Records of a node, the latest ones."""


class RankState(msgspec.Struct, frozen=True):
    """One rank at the failure: ``phase`` of the startup, if it was in one, and what it reported last."""

    rank: int
    pid: int
    location: str
    phase: str
    report: str | None
    log: str


class FailureRecord(msgspec.Struct, frozen=True):
    """One failure. ``time`` in seconds since 1970; ``engine``: model and data parallel rank."""

    time: float
    engine: str
    code: str
    cause: str
    detection_seconds: float
    ranks: list[RankState]
    versions: dict[str, str]


def create_record(code: str, cause: str, detection_s: float, peers: Sequence[Peer]) -> FailureRecord:
    """Return the record of a failure of this process's engine."""
    ranks = [RankState(peer.rank, peer.pid, peer.location(), peer.phase, peer.report, peer.log) for peer in peers]
    versions = {"vllm-ray-ascend": __version__, **stack()}
    return FailureRecord(time.time(), EVENTS.engine, code, cause, detection_s, ranks, versions)


def write_record(record: FailureRecord) -> Path | None:
    """Write a record into Ray's log folder, and remove old ones; return its file, None where there is no folder."""
    folder = session_log_folder()
    return None if folder is None else write_to_folder(record, folder / FOLDER)


def write_to_folder(record: FailureRecord, folder: Path) -> Path | None:
    """Write a record into ``folder``, and remove the oldest ones; return its file, None where that is not possible."""
    path = folder / f"failure-{record.time:.3f}.json"
    try:
        folder.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    except OSError as error:
        logger.info("no record of the failure was written: %s", error)
        return None
    for old in sorted(folder.glob("failure-*.json"))[:-KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path
