"""How vLLM starts its engine process where the user's own process has joined Ray."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from vllm_ray_ascend.log import get_logger

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
ADDRESS = "RAY_ADDRESS"
PARENTS = "_VLLM_RAY_ASCEND_JOINED"
"""For the children of a process: its id, and the cluster that it has joined. RAY_ADDRESS itself would hold in that
process too, whose next ray.init() may be about another cluster."""

logger = get_logger(__name__)


def spawn_beside_ray() -> None:
    """Have the engine process spawned where this process has joined Ray, also if it has left since; and join the same
    cluster where it has not.

    A forked one hangs for good at its first question to Ray: it has Ray's state, but none of the threads. vLLM 0.23 to
    0.33 think of this in Ray actors only, not in a script that called ray.init. Removable when they do.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        address = ray.get_runtime_context().gcs_address
        os.environ[PARENTS] = f"{os.getpid()} {address}"
        _spawn(f"has joined Ray at {address}")
        return
    os.environ.pop(PARENTS, None)
    if ray is not None and _has_threads_of_grpc():
        _spawn("had joined Ray")


def _spawn(reason: str) -> None:
    if os.environ.get(METHOD) == "spawn":
        return
    os.environ[METHOD] = "spawn"
    logger.info(
        "%s=spawn is set: this process %s, whose state a forked engine process cannot use. "
        "A script needs `if __name__ == '__main__':` round what it runs.",
        METHOD,
        reason,
    )


def _has_threads_of_grpc() -> bool:
    """They stay for as long as the process lives, and are by what a forked one would hang."""
    for file in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            if file.read_text().startswith("grpc"):
                return True
    return False


def cluster_of_parent() -> str:
    """The address of the cluster that this process's parent has joined; empty where it has joined none."""
    process, _, address = os.environ.get(PARENTS, "").partition(" ")
    return address if process == str(os.getppid()) else ""
