"""Replacements of vLLM's functions that assign NPUs to a data parallel rank: over Ray, only Ray assigns them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.devices.kind import GPU, NPU, Kind
from vllm_ray_ascend.devices.owners import reject_device_ids
from vllm_ray_ascend.devices.ranges import RankRequest, physical_ids_of_rank
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES


def replace_functions(modules: Sequence[ModuleType], kind: Kind = NPU) -> None:
    """Replace the functions in vllm.v1.engine.utils and .core, and vllm-ascend's patches of them, in whatever order.

    Engine cores that are processes and use Ray's workers are assigned no NPUs, since Ray assigns them. Other callers
    get a rank's range that never wraps around to another rank's NPUs; on GPUs the range is vLLM's own.
    """
    for module in modules:
        for target, make in (_REPLACEMENTS if kind is NPU else _REPLACEMENTS_ON_GPUS).items():
            holder, _, name = target.rpartition(".")
            if holder == module.__name__ and hasattr(module, name):
                patches.apply(target, make(patches.original(target, module)), module)


def physical_ids_of_dp_rank(
    device_control_env_var: str,
    local_dp_rank: int,
    world_size: int,
    local_world_size: int | None = None,
    user_assigned_gpu_ids: list[int] | None = None,
    ranks_here: int | None = None,
) -> list[int]:
    """Return the physical NPUs of one data parallel rank of this node, from this node's visible list.

    The signature is vLLM's, with ``ranks_here`` added: the number of ranks that this process starts. Where it is 1, the
    list may be that rank's alone. Raises DeviceMappingError where the list does not have enough NPUs.
    """
    request = RankRequest(
        local_dp_rank=local_dp_rank,
        world_size=world_size,
        local_world_size=world_size if local_world_size is None else local_world_size,
        visible_devices=os.environ.get(device_control_env_var) or None,
        requested_physical_ids=user_assigned_gpu_ids,
        ranks_in_process=ranks_here,
    )
    return physical_ids_of_rank(request)


def set_assigned_physical_gpu_ids_for_dp_rank(
    vllm_config: Any, local_dp_rank: int, user_assigned_gpu_ids: list[int] | None = None
) -> None:
    """Assign NPUs to an engine core that is a process, as vLLM's function of this name; over Ray, assign none.

    Upstream's fails there with `local range: [8, 12) base value "0,1,2,3,4,5,6,7"` (vllm-ascend #2879).
    """
    config = vllm_config.parallel_config
    if config.use_ray:
        reject_device_ids(config.assigned_physical_gpu_ids)
        return
    config.assigned_physical_gpu_ids = physical_ids_of_dp_rank(
        VISIBLE_DEVICES,
        local_dp_rank,
        config.world_size,
        config.local_world_size,
        user_assigned_gpu_ids,
        config.data_parallel_size_local,
    )


def skip_isolation_over_ray(upstream_function: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM 0.23's set_device_control_env_var, ``upstream_function``, limited to engines without Ray."""

    def set_device_control_env_var(vllm_config: Any, local_dp_rank: int) -> contextlib.AbstractContextManager[None]:
        if vllm_config.parallel_config.use_ray:
            return contextlib.nullcontext()
        isolated: contextlib.AbstractContextManager[None] = upstream_function(vllm_config, local_dp_rank)
        return isolated

    return set_device_control_env_var


def skip_assignment_over_ray(upstream_function: Callable[..., None]) -> Callable[..., None]:
    """Return vLLM's set_assigned_physical_gpu_ids_for_dp_rank for GPUs, limited to engines without Ray."""

    def set_assigned(vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if vllm_config.parallel_config.use_ray:
            reject_device_ids(vllm_config.parallel_config.assigned_physical_gpu_ids, GPU)
        else:
            upstream_function(vllm_config, *args, **kwargs)

    return set_assigned


def leave_devices_to_ray(module: ModuleType) -> None:
    """Let vLLM's supervisor of data parallel servers, of ``module``, give those over Ray no --device-ids of its own."""
    if hasattr(module, "_build_device_ids"):  # vLLM 0.23 sets the variable, which workers over Ray do not inherit
        patches.wrap(f"{module.__name__}._build_device_ids", _skip_device_ids_over_ray)


def _skip_device_ids_over_ray(build_device_ids: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build_device_ids)
    def build(args: Any, local_rank: int) -> Any:
        over_ray = "ray" in (args.distributed_executor_backend, args.data_parallel_backend)
        return args.device_ids if over_ray else build_device_ids(args, local_rank)

    return build


_REPLACEMENTS: Mapping[str, Callable[[Any], Any]] = {
    "vllm.v1.engine.utils.set_assigned_physical_gpu_ids_for_dp_rank": (
        lambda _: set_assigned_physical_gpu_ids_for_dp_rank
    ),
    "vllm.v1.engine.utils.get_physical_gpu_ids_for_local_dp_rank": lambda _: physical_ids_of_dp_rank,
    "vllm.v1.engine.core.get_physical_gpu_ids_for_local_dp_rank": lambda _: physical_ids_of_dp_rank,
    "vllm.v1.engine.utils.set_device_control_env_var": skip_isolation_over_ray,
}
_REPLACEMENTS_ON_GPUS: Mapping[str, Callable[[Any], Any]] = {
    "vllm.v1.engine.utils.set_assigned_physical_gpu_ids_for_dp_rank": skip_assignment_over_ray,
    "vllm.v1.engine.utils.set_device_control_env_var": skip_isolation_over_ray,
}
