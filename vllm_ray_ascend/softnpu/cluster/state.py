"""What is remembered of clusters between commands: /tmp/vra-UID/NAME.json, beside the cluster's folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from vllm_ray_ascend.softnpu.cluster.plan import Cluster, ClusterError


def base_dir() -> Path:
    """Folder of this user's clusters. Not TMPDIR: every shell must find it, and socket paths below it must be short."""
    return Path(f"/tmp/vra-{os.getuid()}")


def directory_of(name: str) -> Path:
    """Folder of the cluster's own files."""
    return base_dir() / name


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the user's clusters for a change; creates the base folder and removes it when it is left empty."""
    base = base_dir()
    while True:
        base.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _same_folder(descriptor, base):
            break
        os.close(descriptor)  # removed by another command while we waited for it
    try:
        _check_ours(os.fstat(descriptor), base)
        yield
    finally:
        with contextlib.suppress(OSError):
            base.rmdir()  # refuses while anything is in it
        os.close(descriptor)


def load(name: str) -> Cluster | None:
    """The cluster ``name`` as it was last brought up; None when there is none."""
    path = _file_of(name)
    try:
        return Cluster.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path} is not a cluster's state ({error!r}); another version may have written it: end that cluster "
            f"with that version, or remove the file and the processes that carry SOFTNPU_CLUSTER={os.getuid()}-{name}."
        ) from None


def save(cluster: Cluster) -> None:
    """Remember ``cluster``. Called before anything is made, so that a crash leaves something to clean up by."""
    _file_of(cluster.name).write_text(json.dumps(cluster.to_json(), indent=1) + "\n")
    shutil.rmtree(cluster.directory, ignore_errors=True)
    Path(cluster.directory).mkdir(mode=0o700)


def created(cluster: Cluster) -> float:
    """When the cluster was saved, in seconds since the epoch."""
    return _file_of(cluster.name).stat().st_mtime


def forget(cluster: Cluster) -> None:
    """Remove the cluster's folder and its state file, the latter last."""
    shutil.rmtree(cluster.directory, ignore_errors=True)
    if Path(cluster.directory).exists():
        raise ClusterError(f"{cluster.directory} could not be removed: rm -r {cluster.directory}")
    _file_of(cluster.name).unlink(missing_ok=True)


def _file_of(name: str) -> Path:
    return base_dir() / f"{name}.json"


def _same_folder(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_ours(status: os.stat_result, base: Path) -> None:
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise ClusterError(f"{base} belongs to another user or lets others write: remove it, then repeat the command.")
