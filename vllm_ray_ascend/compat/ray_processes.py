"""Ray's processes on this machine, and the address that Ray would join without being given one; in Ray 2.48 to 2.60."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_GCS_ADDRESS = re.compile(r"--gcs-address=([^\0 ]+)")


class Raylet(NamedTuple):
    """One raylet that runs on this machine, as far as this process sees it."""

    gcs_address: str
    is_near: bool
    """Whether it shares this process's process ids and network: not that of a container, seen from its host."""


def local_raylets(proc: Path = Path("/proc")) -> list[Raylet]:
    """Return the raylets whose processes are visible, ordered by process id."""
    return [raylet for pid in sorted(_process_ids(proc)) for raylet in _read_raylet(proc, pid)]


def recorded_address() -> str | None:
    """Return the address that `ray start` on this machine has recorded, which ray.init() joins; None where it has not.

    It is recorded in /tmp/ray, or below RAY_TMPDIR; not where `ray start` had another --temp-dir.
    """
    from ray._private import services

    found: str | None = services.find_bootstrap_address(None)
    return found


def session_log_folder() -> Path | None:
    """Return the folder with the logs of Ray's processes on this node; None where this process has not joined Ray."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    return None if node is None else Path(node.get_logs_dir_path())


def needs_local_raylet() -> bool:
    """Return whether Ray looks for the processes of raylets to find the node of a driver, as 2.54 and 2.55 do."""
    from ray._private import services

    return hasattr(services, "find_node_ids")


def _process_ids(proc: Path) -> Iterator[int]:
    return (int(entry.name) for entry in proc.iterdir() if entry.name.isdigit())


def _read_raylet(proc: Path, pid: int) -> Iterator[Raylet]:
    with contextlib.suppress(OSError):  # it has just ended, or may not be read
        command = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        if command.partition("\0")[0].endswith("/raylet") and (found := _GCS_ADDRESS.search(command)):
            yield Raylet(found[1], _namespaces(proc, pid) == _namespaces(proc, "self"))


def _namespaces(proc: Path, pid: int | str) -> list[str]:
    """Return which process ids and network a process has; of another user's this process may not know: its own then."""
    try:
        return [os.readlink(proc / str(pid) / "ns" / kind) for kind in ("pid", "net")]
    except PermissionError:
        return _namespaces(proc, "self")
