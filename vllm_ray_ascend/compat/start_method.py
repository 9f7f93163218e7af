"""How vLLM starts its engine process where the user's own process has joined Ray."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from vllm_ray_ascend.log import get_logger

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
RAY_ADDRESS = "RAY_ADDRESS"
PARENT_CLUSTER = "_VLLM_RAY_ASCEND_JOINED"
"""For child processes: the id of their parent, and the cluster that it has joined. RAY_ADDRESS itself would apply to
the parent too, whose next ray.init() may be about another cluster."""

logger = get_logger(__name__)


def force_spawn_after_ray_init() -> None:
    """Have the engine process spawned where this process has joined Ray, even if it has left since.

    The engine process then joins the same cluster. A forked one hangs forever at its first call to Ray: it has Ray's
    state, but none of the threads. vLLM 0.23 to 0.33 spawn it in Ray actors only, not in a script that called ray.init.
    Removable when they do.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        address = ray.get_runtime_context().gcs_address
        os.environ[PARENT_CLUSTER] = f"{os.getpid()} {address}"
        _set_spawn(f"has joined Ray at {address}")
        return
    os.environ.pop(PARENT_CLUSTER, None)
    if ray is not None and _has_grpc_threads():
        _set_spawn("had joined Ray")


def _set_spawn(reason: str) -> None:
    if os.environ.get(START_METHOD) == "spawn":
        return
    os.environ[START_METHOD] = "spawn"
    logger.info(
        "%s=spawn is set: this process %s, whose state a forked engine process cannot use. "
        "A script needs `if __name__ == '__main__':` around what it runs.",
        START_METHOD,
        reason,
    )


def _has_grpc_threads() -> bool:
    """Return whether Ray's threads are there, which last as long as the process: a forked one waits for them."""
    for file in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has just ended
            if file.read_text().startswith("grpc"):
                return True
    return False


def parent_cluster_address() -> str:
    """Return the address of the cluster that this process's parent has joined; empty where it has joined none."""
    process, _, address = os.environ.get(PARENT_CLUSTER, "").partition(" ")
    return address if process == str(os.getppid()) else ""
