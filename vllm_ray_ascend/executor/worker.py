"""The worker of RayAscendExecutor, a Ray actor. Imported by name on every node."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

from vllm_ray_ascend.augment import platform_is_ours
from vllm_ray_ascend.devices.visible import VARIABLE, complaint
from vllm_ray_ascend.errors import NotActiveError, VisibleDevicesError


class RayAscendWorkerProc(RayWorkerProc):
    """vLLM's worker for Ray, which refuses a node that cannot work and explains a start that failed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not platform_is_ours():
            raise NotActiveError(_not_active())
        super().__init__(*args, **kwargs)

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        """Open the NPU and make the worker. Arguments are the parent's, which differ between vLLM 0.23 and 0.33.

        Raises VisibleDevicesError where a failure is that of the node's ASCEND_RT_VISIBLE_DEVICES.
        """
        try:
            super().initialize_worker(*args, **kwargs)
        except Exception as error:
            import torch

            # Only now: asking before would fix the list before vLLM 0.23 has set it.
            reason = complaint(os.environ.get(VARIABLE), torch.npu.device_count())
            if reason is None:
                raise
            raise VisibleDevicesError(f"{_address()}: {reason}. {_REMEDY}") from error


_REMEDY = (
    f"Stop Ray on that node (`ray stop`), set {VARIABLE} to NPUs that `npu-smi info` lists, or unset it, and start Ray "
    "there again: workers have the variable of their node's `ray start`."
)


def _address() -> str:
    import ray

    return f"node {ray.util.get_node_ip_address()}"


def _not_active() -> str:
    from vllm.platforms import current_platform

    return (
        f"{_address()}: vLLM's platform is {type(current_platform).__qualname__}, not the NPU platform with "
        f"vllm-ray-ascend (VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS', 'unset')}). Install the same vllm-ascend and "
        "vllm-ray-ascend on that node, and start Ray there without VLLM_RAY_ASCEND=0, and without a VLLM_PLUGINS that "
        "lacks `ray_ascend`."
    )
