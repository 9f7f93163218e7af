"""The processes of a cluster, found through /proc.  Ids are as this process counts them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from vllm_ray_ascend.softnpu.cluster.plan import MARKER, Cluster, ClusterError


def of_cluster(cluster: Cluster) -> set[int]:
    """All live processes of the cluster.

    They carry its marker in their environment, or (Ray's workers write their title over it) have a file open below
    the cluster's folder, or descend from such a process.
    """
    marker = f"{MARKER}={cluster.token}".encode()
    pids = [pid for pid in _all_pids() if pid != os.getpid() and is_alive(pid)]
    found = {pid for pid in pids if marker in _environ(pid) or _opens_below(pid, cluster.directory)}
    parents = {pid: _parent(pid) for pid in pids}
    while grown := {pid for pid in pids if parents[pid] in found} - found:
        found |= grown
    return found


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def name_of(pid: int) -> str:
    """The kernel's short name of the process; empty when it is gone."""
    return _read(pid, "comm").decode(errors="replace").strip()


def variable_of(pid: int, variable: str) -> str | None:
    """Value of an environment variable with which the process was started."""
    prefix = variable.encode() + b"="
    values = (entry[len(prefix) :].decode(errors="replace") for entry in _environ(pid) if entry.startswith(prefix))
    return next(values, None)


def mapped_files(folder: Path) -> set[str]:
    """Paths of the files below ``folder`` that any process whose maps we may read has mapped."""
    prefix = f"{folder}/"
    lines = (line for pid in _all_pids() for line in _read(pid, "maps").decode(errors="replace").splitlines())
    return {prefix + line.partition(prefix)[2].removesuffix(" (deleted)") for line in lines if prefix in line}


def kill_cluster(cluster: Cluster, limit: float = 20.0) -> None:
    """End every process of the cluster and wait until none is left (``limit`` in seconds).

    They are killed outright: whatever they hold lies in namespaces and folders that go with them.
    """
    deadline = time.monotonic() + limit
    while pids := of_cluster(cluster):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"processes {sorted(pids)} of cluster {cluster.name!r} did not end within {limit:g} s of SIGKILL; "
                f"see what holds them (ps -o pid,stat,wchan,cmd) and repeat the command."
            )
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _all_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _environ(pid: int) -> list[bytes]:
    return _read(pid, "environ").split(b"\0")


def _opens_below(pid: int, directory: str) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        return any(os.readlink(f"{folder}/{entry}").startswith(directory + "/") for entry in os.listdir(folder))
    except OSError:  # the process ended meanwhile, or is another user's
        return False


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from the state on; empty when the process is gone."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
