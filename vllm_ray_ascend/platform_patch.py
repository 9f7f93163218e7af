"""Our members of the NPU platform, set on a class: vllm-ascend's NPUPlatform, or our subclass of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from vllm_ray_ascend import __version__, patches
from vllm_ray_ascend.cluster.node_facts import NOSET
from vllm_ray_ascend.compat.ascend import speculation_obstacle, weight_nz_mode
from vllm_ray_ascend.compat.start_method import force_spawn_after_ray_init
from vllm_ray_ascend.compat.versions import installed, require_ray
from vllm_ray_ascend.devices.numbering import physical_to_visible
from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES, split_entries
from vllm_ray_ascend.elastic_ep import admission
from vllm_ray_ascend.environment.paths import use_absolute_paths
from vllm_ray_ascend.errors import SettingError, SpeculationError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_MARK = "_vllm_ray_ascend"
_V2 = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
_TO_VISIBLE = "vllm.platforms.interface.Platform.logical_device_id_to_visible_device_id"


def patch_platform(platform: type) -> None:
    """Give ``platform`` what Ray needs of it, once.

    - ray_device_key, device_control_env_var, ray_noset_device_env_vars: what Ray calls an NPU, and how it hides them.
      vllm-ascend 0.23 and later have the same values; a worker with any others would run on a wrong NPU.
    - logical_device_id_to_visible_device_id (vLLM 0.24 and later): the same answer, or an error with its remedy.
    - check_and_update_config: vllm-ascend's own, then our checks of an engine over Ray.

    Raises UpstreamChangedError when one of these names is gone from vLLM's platform interface.
    """
    if is_patched(platform):
        return
    noset: list[str] = getattr(platform, "ray_noset_device_env_vars", [])
    values = {
        "vllm_ascend.platform.NPUPlatform.ray_device_key": "NPU",
        "vllm_ascend.platform.NPUPlatform.device_control_env_var": VISIBLE_DEVICES,
        "vllm_ascend.platform.NPUPlatform.ray_noset_device_env_vars": list(dict.fromkeys([*noset, NOSET])),
    }
    for target, value in values.items():
        patches.apply(target, value, platform)
    patches.wrap("vllm_ascend.platform.NPUPlatform.check_and_update_config", _with_checks, platform)
    if hasattr(platform, "logical_device_id_to_visible_device_id"):
        patches.apply(_TO_VISIBLE, classmethod(_logical_to_visible), platform)
    patches.apply("vllm_ascend.platform.NPUPlatform._vllm_ray_ascend", __version__, platform)


def is_patched(platform: type) -> bool:
    """Return whether this very class, not only a parent of it, has our members."""
    return _MARK in vars(platform)


def is_npu() -> bool:
    """Return whether the platform is the NPUs', with our members. It resolves the platform, as `platform_is_ours`."""
    from vllm.platforms import current_platform

    return is_patched(type(current_platform))


def platform_is_ours() -> bool:
    """Return whether vLLM's platform has our members, or is that of CUDA and VLLM_RAY_ASCEND=1 asks for us there.

    It resolves the platform, so it is not for use while plugins load.
    """
    from vllm.platforms import current_platform

    return is_npu() or (current_platform.is_cuda() and load().active == "1")


def workers_are_ours() -> bool:
    """Return whether workers over Ray are ours: as `platform_is_ours`, and vLLM does not use its older executor."""
    return platform_is_ours() and not _uses_older_executor()


def _logical_to_visible(cls: Any, device_id: int) -> int:
    """Return the visible number of the NPU with local rank ``device_id``, as torch_npu opens it.

    Raises DeviceMappingError where the list of visible NPUs lacks it.
    """
    physical: int = cls.device_id_to_physical_device_id(device_id)
    listed = split_entries(os.environ.get(VISIBLE_DEVICES))
    return physical if listed is None else physical_to_visible([int(entry) for entry in listed], physical)


def _with_checks(upstream: Any) -> classmethod[Any, [Any], None]:
    """Return the platform's check of a configuration with ours after it; ``upstream`` is bound to its class."""
    check: Callable[[Any, Any], None] = upstream.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        if admission.is_elastic(vllm_config):
            _admit_elastic(vllm_config)
        check(cls, vllm_config)
        if vllm_config.parallel_config.distributed_executor_backend == "ray":
            require_ray(installed("ray"))
            _check_speculation(vllm_config)
            _check_multimodal_cache(vllm_config)
            _check_weight_format(vllm_config)
            _warn_of_older_executor()
            force_spawn_after_ray_init()
            use_absolute_paths(vllm_config)

    return classmethod(check_and_update_config)


def _admit_elastic(vllm_config: Any) -> None:
    """Check an engine that can be scaled, and select its worker. Raises ElasticEPError where it cannot work."""
    if vllm_config.parallel_config.worker_cls != admission.WORKER:  # it may be checked again
        admission.check(vllm_config)
        vllm_config.parallel_config.worker_cls = admission.WORKER
    patches.wrap("vllm_ascend.platform._validate_eplb_config", _unless_elastic)


def _unless_elastic(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return vllm-ascend's check of expert load balancing for engines that cannot be scaled."""

    @functools.wraps(validate)
    def validate_unless_elastic(vllm_config: Any) -> None:
        if not admission.is_elastic(vllm_config):
            validate(vllm_config)

    return validate_unless_elastic


def _check_speculation(vllm_config: Any) -> None:
    """Raise SpeculationError where draft tokens in a pipeline would make every request fail."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1 and getattr(vllm_config, "speculative_config", None) and (obstacle := speculation_obstacle()):
        raise SpeculationError(
            "VRA-114",
            f"--speculative-config with --pipeline-parallel-size {stages} fails in every step: {obstacle}. Leave "
            "--speculative-config out, or use --tensor-parallel-size alone.",
        )


def _check_multimodal_cache(vllm_config: Any) -> None:
    """Raise SettingError where vLLM's workers over Ray, which share no lock, would refuse to start one by one."""
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    if multimodal is not None and getattr(multimodal, "mm_processor_cache_type", "") == "shm":
        raise SettingError(
            "VRA-385",
            "--mm-processor-cache-type shm does not work with --distributed-executor-backend ray: the workers are no "
            "children of one process, and vLLM gives them no common lock for that cache. Leave it out, or use "
            "--mm-processor-cache-type lru.",
        )


def _check_weight_format(vllm_config: Any) -> None:
    """Raise SettingError where weights are to change in place, which vllm-ascend refuses as late as then."""
    wanted = {
        "--enable-sleep-mode": vllm_config.model_config.enable_sleep_mode,
        "--weight-transfer-config": vllm_config.weight_transfer_config is not None,
    }
    options = " and ".join(option for option, is_set in wanted.items() if is_set)
    if options and (mode := weight_nz_mode()):
        raise SettingError(
            "VRA-147",
            f"{options} cannot work with weight_nz_mode={mode}: vllm-ascend refuses to wake up and to update weights "
            "in the format FRACTAL_NZ. Add --additional-config '{\"weight_nz_mode\": 0}'.",
        )


def _uses_older_executor() -> bool:
    """Return whether vLLM (up to 0.32) is set to use an executor over Ray that we do not replace."""
    from vllm import envs

    return not getattr(envs, _V2, True)


def _warn_of_older_executor() -> None:
    """Log a warning where workers over Ray are not ours."""
    if load().executor != "upstream" and _uses_older_executor():
        logger.warning(
            "VRA-115: %s=0 selects vLLM's older executor for Ray: no worker of vllm-ray-ascend, no failure detection. "
            "Unset it; VLLM_RAY_ASCEND_EXECUTOR=upstream silences this",
            _V2,
        )
