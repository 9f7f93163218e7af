"""The worker of RayAscendExecutor, a Ray actor. Imported by name on every node."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

from vllm_ray_ascend.augment import platform_is_ours
from vllm_ray_ascend.compat.ascend import has_port_ranges
from vllm_ray_ascend.devices.numbering import physical_of_logical
from vllm_ray_ascend.devices.owners import check_assigned
from vllm_ray_ascend.devices.visible import VARIABLE, complaint, entries
from vllm_ray_ascend.engine.process import prepare_process
from vllm_ray_ascend.environment.ports import port_variables
from vllm_ray_ascend.errors import NotActiveError, VisibleDevicesError
from vllm_ray_ascend.settings import load


class RayAscendWorkerProc(RayWorkerProc):
    """vLLM's worker for Ray, which refuses a node that cannot work and explains a start that failed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not platform_is_ours():
            raise NotActiveError(_not_active())
        super().__init__(*args, **kwargs)

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """The node's id and the physical NPU that Ray assigned to this worker (vLLM 0.24 and later)."""
        return self._checked(super().get_node_and_physical_gpu_ids)

    def get_node_and_gpu_ids(self) -> tuple[str, list[int]]:
        """The same under the name that vLLM 0.23 has for it."""
        return self._checked(super().get_node_and_gpu_ids)

    def _checked(self, ask: Callable[[], tuple[str, list[int]]]) -> tuple[str, list[int]]:
        node_id, ids = ask()
        listed = entries(os.environ.get(VARIABLE))
        usable = None if listed is None else [int(entry) for entry in listed if entry.isdigit()]
        owner = f"rank {self._init_kwargs['rank']}"
        return node_id, check_assigned(owner, ids, envs.VLLM_RAY_PER_WORKER_GPUS, usable, _address())

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        """Open the NPU and make the worker. Arguments are the parent's, which differ between vLLM 0.23 and 0.33.

        Raises VisibleDevicesError where a failure is that of the node's ASCEND_RT_VISIBLE_DEVICES.
        """
        given = inspect.signature(super().initialize_worker).bind(*args, **kwargs).arguments
        _prepare(given)
        try:
            super().initialize_worker(*args, **kwargs)
        except Exception as error:
            import torch

            # Only now: asking before would fix the list before vLLM 0.23 has set it.
            reason = complaint(os.environ.get(VARIABLE), torch.npu.device_count())
            if reason is None:
                raise
            raise VisibleDevicesError(f"node {_address()}: {reason}. {_REMEDY}") from error


_REMEDY = (
    f"Stop Ray on that node (`ray stop`), set {VARIABLE} to NPUs that `npu-smi info` lists, or unset it, and start Ray "
    "there again: workers have the variable of their node's `ray start`."
)


def _prepare(given: dict[str, Any]) -> None:
    """Have this node's variables, not the driver's, before HCCL or gloo read them."""
    prepare_process()
    if load().node_env != "off":
        copied: dict[str, str] = given.get("driver_env_vars") or {}
        share = float(copied.get("VLLM_RAY_PER_WORKER_GPUS", envs.VLLM_RAY_PER_WORKER_GPUS))
        os.environ.update(port_variables(_own_npu(given), share, os.environ, ranges=has_port_ranges()))


def _own_npu(given: dict[str, Any]) -> int:
    """Physical NPU of this worker: of the engine's on this node (vLLM 0.23: a variable) the one at its local rank."""
    assigned = given.get("assigned_physical_gpu_ids") or entries(given["env_vars"].get(VARIABLE)) or []
    return physical_of_logical([int(physical) for physical in assigned], given["local_rank"])


def _address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _not_active() -> str:
    from vllm.platforms import current_platform

    return (
        f"node {_address()}: vLLM's platform is {type(current_platform).__qualname__}, not the NPU platform with "
        f"vllm-ray-ascend (VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS', 'unset')}). Install the same vllm-ascend and "
        "vllm-ray-ascend on that node, and start Ray there without VLLM_RAY_ASCEND=0, and without a VLLM_PLUGINS that "
        "lacks `ray_ascend`."
    )
