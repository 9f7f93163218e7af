"""vLLM's functions that say which NPUs a data parallel rank has, without guesses that Ray contradicts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from vllm_ray_ascend.compat.rebind import replace, upstream
from vllm_ray_ascend.devices.kind import GPU, NPU, Kind
from vllm_ray_ascend.devices.ranges import RankRequest, local_range
from vllm_ray_ascend.devices.visible import VARIABLE
from vllm_ray_ascend.errors import DeviceMappingError


def refuse_device_ids(parallel_config: Any, kind: Kind = NPU) -> None:
    """Raise DeviceMappingError where --device-ids is given: over Ray it cannot be had, and vLLM only warns of it."""
    ids = getattr(parallel_config, "assigned_physical_gpu_ids", None)
    if ids is not None:
        listed = ",".join(map(str, ids))
        raise DeviceMappingError(
            f"--device-ids ({kind.key}s {listed}) cannot choose {kind.key}s over Ray, which assigns them itself. "
            f"Leave --device-ids out, give Ray the list on that node: `ray stop`, then "
            f"`{kind.variable}={listed} ray start ...`."
        )


def select(modules: Sequence[ModuleType], kind: Kind = NPU) -> None:
    """Put our functions into vllm.v1.engine.utils and .core, over vllm-ascend's patch of them, whichever came first.

    Engine cores that are processes and use Ray's workers are assigned nothing, since Ray does that; whoever else asks
    for a rank's range gets one that never wraps round to NPUs of another rank. On GPUs that one is vLLM's own.
    """
    for module in modules:
        for name, make in (_REPLACEMENTS if kind is NPU else _REPLACEMENTS_ON_GPUS).items():
            if hasattr(module, name):
                replace(module, name, make(upstream(module, name)))


def physical_ids_of_dp_rank(
    device_control_env_var: str,
    local_dp_rank: int,
    world_size: int,
    local_world_size: int | None = None,
    user_assigned_gpu_ids: list[int] | None = None,
    ranks_here: int | None = None,
) -> list[int]:
    """Physical NPUs of one data parallel rank of this node, by this node's list; all but the last is vLLM's signature.

    ``ranks_here`` is the number of ranks that this process has: where it is 1, the list may have been cut for that one.
    Raises DeviceMappingError where the list does not have them.
    """
    request = RankRequest(
        local_dp_rank=local_dp_rank,
        world_size=world_size,
        local_world_size=world_size if local_world_size is None else local_world_size,
        visible=os.environ.get(device_control_env_var) or None,
        device_ids=user_assigned_gpu_ids,
        ranks_here=ranks_here,
    )
    return local_range(request)


def set_assigned_physical_gpu_ids_for_dp_rank(
    vllm_config: Any, local_dp_rank: int, user_assigned_gpu_ids: list[int] | None = None
) -> None:
    """vLLM's function of this name for engine cores that are processes: over Ray, nothing is assigned.

    Upstream's fails there with `local range: [8, 12) base value "0,1,2,3,4,5,6,7"` (vllm-ascend #2879).
    """
    config = vllm_config.parallel_config
    if config.use_ray:
        refuse_device_ids(config)
        return
    config.assigned_physical_gpu_ids = physical_ids_of_dp_rank(
        VARIABLE,
        local_dp_rank,
        config.world_size,
        config.local_world_size,
        user_assigned_gpu_ids,
        config.data_parallel_size_local,
    )


def isolating_nothing_over_ray(own: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM 0.23's set_device_control_env_var, ``own``, for whatever does not run over Ray."""

    def set_device_control_env_var(vllm_config: Any, local_dp_rank: int) -> contextlib.AbstractContextManager[None]:
        if vllm_config.parallel_config.use_ray:
            return contextlib.nullcontext()
        isolated: contextlib.AbstractContextManager[None] = own(vllm_config, local_dp_rank)
        return isolated

    return set_device_control_env_var


def assigning_nothing_over_ray(own: Callable[..., None]) -> Callable[..., None]:
    """vLLM's set_assigned_physical_gpu_ids_for_dp_rank, ``own``, on GPUs for whatever does not run over Ray."""

    def set_assigned(vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if vllm_config.parallel_config.use_ray:
            refuse_device_ids(vllm_config.parallel_config, GPU)
        else:
            own(vllm_config, *args, **kwargs)

    return set_assigned


_REPLACEMENTS: Mapping[str, Callable[[Any], Any]] = {
    "set_assigned_physical_gpu_ids_for_dp_rank": lambda _: set_assigned_physical_gpu_ids_for_dp_rank,  # vLLM 0.24 on
    "get_physical_gpu_ids_for_local_dp_rank": lambda _: physical_ids_of_dp_rank,  # vLLM 0.24 and later
    "set_device_control_env_var": isolating_nothing_over_ray,  # vLLM 0.23
}
_REPLACEMENTS_ON_GPUS: Mapping[str, Callable[[Any], Any]] = {
    "set_assigned_physical_gpu_ids_for_dp_rank": assigning_nothing_over_ray,
    "set_device_control_env_var": isolating_nothing_over_ray,
}
