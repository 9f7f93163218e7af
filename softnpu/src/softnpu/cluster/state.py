"""The state of clusters between commands: /tmp/snpu-UID/NAME.json, beside the cluster's folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from softnpu.cluster.plan import Cluster
from softnpu.errors import ClusterError


def base_dir() -> Path:
    """Return the folder of this user's clusters.

    Not below TMPDIR: every shell must find it, and socket paths in it must be short.
    """
    return Path(f"/tmp/snpu-{os.getuid()}")


def cluster_directory(name: str) -> Path:
    """Return the folder of the cluster's own files."""
    return base_dir() / name


@contextlib.contextmanager
def lock_clusters() -> Iterator[None]:
    """Lock the user's clusters for a change; creates the base folder and removes it when it is left empty."""
    base = base_dir()
    while True:
        base.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_same_folder(descriptor, base):
            break
        os.close(descriptor)  # removed by another command while we waited for it
    try:
        _check_owner(os.fstat(descriptor), base)
        yield
    finally:
        with contextlib.suppress(OSError):
            base.rmdir()  # fails while anything is in it
        os.close(descriptor)


def load_cluster(name: str) -> Cluster | None:
    """Return the cluster ``name`` as it was last brought up; None when there is none."""
    path = _state_file(name)
    try:
        return Cluster.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path} is not a cluster's state ({error!r}); another version may have written it: take that cluster down "
            f"with that version, or remove the file and the processes that carry SOFTNPU_CLUSTER={os.getuid()}-{name}."
        ) from None


def save_cluster(cluster: Cluster) -> None:
    """Write the state file of ``cluster``. Called before anything is made, so that a crash can be cleaned up."""
    _state_file(cluster.name).write_text(json.dumps(cluster.to_json(), indent=1) + "\n")
    shutil.rmtree(cluster.directory, ignore_errors=True)
    Path(cluster.directory).mkdir(mode=0o700)


def creation_time(cluster: Cluster) -> float:
    """Return when the cluster was saved, in seconds since the epoch."""
    return _state_file(cluster.name).stat().st_mtime


def remove_cluster(cluster: Cluster) -> None:
    """Remove the cluster's folder, then its state file."""
    shutil.rmtree(cluster.directory, ignore_errors=True)
    if Path(cluster.directory).exists():
        raise ClusterError(f"{cluster.directory} could not be removed: rm -r {cluster.directory}")
    _state_file(cluster.name).unlink(missing_ok=True)


def _state_file(name: str) -> Path:
    return base_dir() / f"{name}.json"


def _is_same_folder(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_owner(status: os.stat_result, base: Path) -> None:
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise ClusterError(f"{base} belongs to another user or lets others write: remove it, then repeat the command.")
