"""Nodes without namespaces: several raylets on this machine's own address, distinguished by SOFTNPU_NODE."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from softnpu.cluster import processes
from softnpu.cluster.plan import Cluster, plain_state_dir

_SHARED_MEMORY = Path("/dev/shm")
_SEGMENTS = ("psm_*", "torch_*")
"""Names of the shared memory segments of Python and PyTorch."""


def create_nodes(cluster: Cluster) -> None:
    """Make the folder in which the cluster's software NPUs keep their tables."""
    plain_state_dir(cluster).mkdir(mode=0o700)


def remove_nodes(cluster: Cluster, created: float) -> None:
    """Remove that folder, and the shared memory that the cluster's processes leaked.

    Ray kills workers together with the helper processes that would have removed their segments, and nodes of this kind
    have no /dev/shm of their own.  A segment counts as leaked if we may remove it, it is younger than the cluster
    (``created``, in seconds since the epoch), and no process has mapped it.
    """
    shutil.rmtree(plain_state_dir(cluster), ignore_errors=True)
    segments = [path for pattern in _SEGMENTS for path in _SHARED_MEMORY.glob(pattern)]
    mapped = processes.list_mapped_files(_SHARED_MEMORY)
    for path in segments:
        with contextlib.suppress(OSError):  # removed meanwhile, or another user's
            if path.stat().st_mtime >= created and str(path) not in mapped:
                path.unlink()
