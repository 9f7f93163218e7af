"""A starting worker's wait for device memory that a process before it, on its way out, still holds.

The kernel closes the connections of a process before the driver has its device memory back, so that the workers of a
restart, or of an engine that starts right after another one, may find too little free.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.compat.import_hook import when_imported
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_POLL_S = 0.2
_GIB = 1 << 30
_NPU_WORKER, _GPU_WORKER = "vllm_ascend.worker.worker", "vllm.v1.worker.gpu_worker"


def install() -> None:
    """Have the platform's worker wait before it measures whether the free memory suffices. May be called again."""
    module = _NPU_WORKER if current_accelerator().kind is NPU else _GPU_WORKER
    when_imported(module, _wrap_snapshot)


def _wrap_snapshot(module: ModuleType) -> None:
    patches.wrap(f"{module.__name__}.MemorySnapshot", with_memory_wait)


def with_memory_wait(take_snapshot: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's ``MemorySnapshot`` as a worker that starts calls it: it waits until the memory is free."""

    @functools.wraps(take_snapshot, updated=())
    def take_snapshot_of_free_memory(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        share = get_current_vllm_config().cache_config.gpu_memory_utilization
        return wait_for_free_memory(lambda: take_snapshot(*args, **kwargs), share, load().npu_wait_s)

    return take_snapshot_of_free_memory


def wait_for_free_memory(take_snapshot: Callable[[], Any], share: float, limit_s: float) -> Any:
    """Return a snapshot with ``share`` of the device's memory free, or the last one within ``limit_s`` seconds."""
    deadline = time.monotonic() + limit_s
    snapshot = take_snapshot()
    if _lacks_memory(snapshot, share) and limit_s:
        logger.warning(
            "VRA-372: %.2f of %.2f GiB of this worker's device are free, and %.2f GiB are requested "
            "(--gpu-memory-utilization %g): waiting up to %g s (VLLM_RAY_ASCEND_NPU_WAIT_S) for the process that holds "
            "the rest, such as a worker that has just ended.",
            snapshot.free_memory / _GIB,
            snapshot.total_memory / _GIB,
            snapshot.total_memory * share / _GIB,
            share,
            limit_s,
        )
    while _lacks_memory(snapshot, share) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        snapshot = take_snapshot()
    return snapshot


def _lacks_memory(snapshot: Any, share: float) -> bool:
    return bool(snapshot.free_memory < snapshot.total_memory * share)
