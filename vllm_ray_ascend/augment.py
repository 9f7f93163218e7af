"""Our members of the NPU platform, put on a class: vllm-ascend's NPUPlatform, or our subclass of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vllm_ray_ascend import __version__
from vllm_ray_ascend.cluster.node_facts import NOSET
from vllm_ray_ascend.compat.versions import installed, require_ray
from vllm_ray_ascend.devices.numbering import visible_of_physical
from vllm_ray_ascend.devices.visible import VARIABLE, entries
from vllm_ray_ascend.errors import UpstreamChangedError
from vllm_ray_ascend.settings import load

_MARK = "_vllm_ray_ascend"
_TO_VISIBLE = "logical_device_id_to_visible_device_id"


def augment(platform: type) -> None:
    """Give ``platform`` what Ray needs of it, once.

    - ray_device_key, device_control_env_var, ray_noset_device_env_vars: what Ray calls an NPU, and how it hides them.
      vllm-ascend 0.23 and later say the same; a worker that believed anything else would run on a wrong card.
    - logical_device_id_to_visible_device_id (vLLM 0.24 and later): the same answer, or an error that says what helps.
    - check_and_update_config: vllm-ascend's own, then our checks of an engine over Ray.

    Raises UpstreamChangedError when one of these names is gone from vLLM's platform interface.
    """
    if is_augmented(platform):
        return
    names = ("ray_device_key", "device_control_env_var", "ray_noset_device_env_vars", "check_and_update_config")
    gone = [name for name in names if not hasattr(platform, name)]
    if gone:
        raise UpstreamChangedError(
            f"{platform.__module__}.{platform.__qualname__} has no {', '.join(gone)}, which vllm-ray-ascend replaces. "
            "Install vllm-ascend 0.23 to 0.33, a newer vllm-ray-ascend, or set VLLM_RAY_ASCEND=0."
        )
    noset: list[str] = platform.ray_noset_device_env_vars  # type: ignore[attr-defined]
    members = {
        "ray_device_key": "NPU",
        "device_control_env_var": VARIABLE,
        "ray_noset_device_env_vars": list(dict.fromkeys([*noset, NOSET])),
        "check_and_update_config": _checked(platform.check_and_update_config.__func__),  # type: ignore[attr-defined]
        _MARK: __version__,
    }
    if hasattr(platform, _TO_VISIBLE):
        members[_TO_VISIBLE] = classmethod(_logical_to_visible)
    for name, value in members.items():
        setattr(platform, name, value)


def is_augmented(platform: type) -> bool:
    """Whether this very class, not only a parent of it, has our members."""
    return _MARK in vars(platform)


def platform_is_ours() -> bool:
    """Whether vLLM's platform has our members, or is that of CUDA and VLLM_RAY_ASCEND=1 asks for us there.

    It resolves the platform, so it is not for use while plugins load.
    """
    from vllm.platforms import current_platform

    return is_augmented(type(current_platform)) or (current_platform.is_cuda() and load().active == "1")


def _logical_to_visible(cls: Any, device_id: int) -> int:
    """Visible number of the NPU with local rank ``device_id``, what torch_npu opens. Raises DeviceMappingError."""
    physical: int = cls.device_id_to_physical_device_id(device_id)
    listed = entries(os.environ.get(VARIABLE))
    return physical if listed is None else visible_of_physical([int(entry) for entry in listed], physical)


def _checked(upstream: Callable[[Any, Any], None]) -> classmethod[Any, [Any], None]:
    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        upstream(cls, vllm_config)
        if vllm_config.parallel_config.distributed_executor_backend == "ray":
            require_ray(installed("ray"))

    return classmethod(check_and_update_config)
