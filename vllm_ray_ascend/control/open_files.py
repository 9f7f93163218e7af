"""How many connections and files a control server's process has open, and the limit that the system sets it."""

from __future__ import annotations

import resource

from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.ipc.authentication import MAX_HANDSHAKES

CONNECTIONS_PER_PROCESS = 3
"""The control connection and two exit sentinels."""
FILES_PER_PROCESS = CONNECTIONS_PER_PROCESS + 1
"""Also one connection of a message queue."""
_OTHER_FILES = 256


def simultaneous_connections(processes: int) -> int:
    """Return how many clients may connect simultaneously to the server that ``processes`` connect to, and others."""
    return MAX_HANDSHAKES + CONNECTIONS_PER_PROCESS * processes


def files_needed(processes: int) -> int:
    """Return how many files the owner of ``processes`` has open simultaneously."""
    return _OTHER_FILES + FILES_PER_PROCESS * processes


def raise_file_limit(processes: int) -> None:
    """Let this process open the files that it needs as the owner of ``processes``.

    Raises ClusterResourceError where the system does not let it.
    """
    needed = files_needed(processes)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ClusterResourceError(
            "VRA-333",
            f"{processes} ranks need {needed} open files in the process that owns them, and the limit is {hard}. Raise "
            f"it before `ray start` and before this process: `ulimit -n {needed}` as root, LimitNOFILE={needed} in a "
            f"systemd unit, or `--ulimit nofile={needed}` of a container.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
