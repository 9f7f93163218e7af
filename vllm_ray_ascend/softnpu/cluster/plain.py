"""Nodes without namespaces: several raylets on this machine's own address, told apart by SOFTNPU_NODE."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from vllm_ray_ascend.softnpu.cluster import processes
from vllm_ray_ascend.softnpu.cluster.plan import Cluster, plain_state_dir

_SHARED_MEMORY = Path("/dev/shm")
_SEGMENTS = ("psm_*", "torch_*")
"""Names that Python's and PyTorch's shared memory gets."""


def create(cluster: Cluster) -> None:
    """The folder in which the cluster's software NPUs keep their tables."""
    plain_state_dir(cluster).mkdir(mode=0o700)


def destroy(cluster: Cluster, created: float) -> None:
    """Remove that folder, and the shared memory that the cluster's processes left behind.

    Ray kills workers together with the helper processes that would have removed their segments, and nodes of this kind
    have no /dev/shm of their own.  A segment counts as left behind if it is ours to remove, younger than the cluster
    (``created``, in seconds since the epoch), and mapped by no process.
    """
    shutil.rmtree(plain_state_dir(cluster), ignore_errors=True)
    segments = [path for pattern in _SEGMENTS for path in _SHARED_MEMORY.glob(pattern)]
    mapped = processes.mapped_files(_SHARED_MEMORY)
    for path in segments:
        with contextlib.suppress(OSError):  # gone by itself, or another user's
            if path.stat().st_mtime >= created and str(path) not in mapped:
                path.unlink()
