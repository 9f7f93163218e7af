"""The processes of a cluster, found through /proc.  Ids are as this process counts them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from softnpu.cluster.plan import MARKER, Cluster
from softnpu.errors import ClusterError


def find_cluster_processes(cluster: Cluster) -> set[int]:
    """Return the ids of all live processes of the cluster.

    They carry its marker in their environment, or (Ray's workers write their title over it) have a file open below
    the cluster's folder, or descend from such a process.
    """
    marker = f"{MARKER}={cluster.token}".encode()
    pids = [pid for pid in _list_pids() if pid != os.getpid() and is_alive(pid)]
    found = {pid for pid in pids if marker in _read_environ(pid) or _has_open_file(pid, cluster.directory)}
    parents = {pid: _read_parent(pid) for pid in pids}
    while descendants := {pid for pid in pids if parents[pid] in found} - found:
        found |= descendants
    return found


def is_alive(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    fields = _read_stat(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def get_process_name(pid: int) -> str:
    """Return the kernel's short name of the process; empty when it is gone."""
    return _read_file(pid, "comm").decode(errors="replace").strip()


def get_variable(pid: int, variable: str) -> str | None:
    """Return the value of an environment variable with which the process was started; None where it had none."""
    prefix = variable.encode() + b"="
    values = (entry[len(prefix) :].decode(errors="replace") for entry in _read_environ(pid) if entry.startswith(prefix))
    return next(values, None)


def list_mapped_files(folder: Path) -> set[str]:
    """Return the files below ``folder`` that are mapped by any process whose maps we may read."""
    prefix = f"{folder}/"
    lines = (line for pid in _list_pids() for line in _read_file(pid, "maps").decode(errors="replace").splitlines())
    return {prefix + line.partition(prefix)[2].removesuffix(" (deleted)") for line in lines if prefix in line}


def kill_cluster_processes(cluster: Cluster, limit: float = 20.0) -> None:
    """Kill every process of the cluster and wait until none is left, at most ``limit`` seconds.

    SIGKILL at once: everything they hold lies in namespaces and folders that are removed with the cluster.
    """
    deadline = time.monotonic() + limit
    while pids := find_cluster_processes(cluster):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"processes {sorted(pids)} of cluster {cluster.name!r} did not end within {limit:g} s of SIGKILL; "
                f"find out what blocks them (ps -o pid,stat,wchan,cmd) and repeat the command."
            )
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _list_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _read_environ(pid: int) -> list[bytes]:
    return _read_file(pid, "environ").split(b"\0")


def _has_open_file(pid: int, directory: str) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        return any(os.readlink(f"{folder}/{entry}").startswith(directory + "/") for entry in os.listdir(folder))
    except OSError:  # the process has exited, or belongs to another user
        return False


def _read_parent(pid: int) -> int:
    fields = _read_stat(pid)
    return int(fields[1]) if fields else 0


def _read_stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the state on; empty when the process is gone."""
    return _read_file(pid, "stat").rpartition(b")")[2].split()


def _read_file(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
