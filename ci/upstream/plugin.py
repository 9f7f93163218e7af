"""pytest plugin for vLLM's tests: our classes under vLLM's names, and NPUs where a test says GPU.

Nothing of the tests themselves is changed. With VLLM_RAY_ASCEND_EXECUTOR=upstream vLLM's own classes stay, on the same
NPUs: what fails then as well is not ours.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from vllm_ray_ascend.settings import load


def pytest_configure() -> None:
    """Bind the names before any test module is imported, since those import them."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    _replace_gpu_with_npu_resources()
    if load().executor == "ours":
        _bind_ours()


def _bind_ours() -> None:
    """Bind the names that our plugin replaces only inside of its own code; it binds the executor's name itself."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.v1.executor import ray_executor_v2

    from vllm_ray_ascend.executor.executor import RayAscendExecutor
    from vllm_ray_ascend.executor.worker import RayAscendWorkerProc
    from vllm_ray_ascend.ipc.message_queue import CancellableQueue

    if ray_executor_v2.RayExecutorV2 is not RayAscendExecutor:
        raise pytest.UsageError("RayExecutorV2 is not ours: is VLLM_RAY_ASCEND=0 or VLLM_PLUGINS set?")
    ray_executor_v2.RayWorkerProc = RayAscendWorkerProc
    shm_broadcast.MessageQueue = CancellableQueue


def _replace_gpu_with_npu_resources() -> None:
    """Let a placement group's ``{"GPU": 1}``, written out in the tests, mean the resource of the platform."""
    import ray
    from vllm.platforms import current_platform

    make = ray.util.placement_group

    @functools.wraps(make)
    def placement_group(bundles: list[dict[str, float]], *args: Any, **kwargs: Any) -> Any:
        names = {"GPU": current_platform.ray_device_key}
        return make([{names.get(name, name): n for name, n in b.items()} for b in bundles], *args, **kwargs)

    ray.util.placement_group = placement_group


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let no test of the queue pass because its processes were killed after 60 s, as `distributed_run` does
    silently. One that hangs runs into the limit of its group."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        if run := getattr(module, "distributed_run", None):
            run.__defaults__ = (float("inf"),)
