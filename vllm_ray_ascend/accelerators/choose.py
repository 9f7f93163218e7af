"""Selection of this process's accelerator, by vLLM's platform."""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.cuda import CudaAccelerator
from vllm_ray_ascend.accelerators.npu import NpuAccelerator
from vllm_ray_ascend.errors import NotActiveError
from vllm_ray_ascend.settings import PREFIX

NAMES = ("npu", "cuda")


def current_accelerator() -> Accelerator:
    """Return the accelerator of vLLM's platform. It resolves the platform, so do not call it while plugins load.

    Raises NotActiveError where the platform is neither vllm-ascend's nor vLLM's own for CUDA.
    """
    from vllm.platforms import current_platform

    name = accelerator_name(current_platform)
    if name is None:
        raise NotActiveError("VRA-408", unsupported_platform_message(current_platform))
    return get_accelerator(name)


def accelerator_name(platform: Any) -> str | None:
    """Return which of NAMES a vLLM platform is; None for others.

    ROCm calls its devices cuda as well, and was never tried.
    """
    if platform.device_type == "npu":
        return "npu"
    return "cuda" if platform.is_cuda() else None


@cache
def get_accelerator(name: str) -> Accelerator:
    """Return the accelerator with this name: one object for the process, since it tracks the process's captures."""
    return {"npu": NpuAccelerator, "cuda": CudaAccelerator}[name]()


def unsupported_platform_message(platform: Any) -> str:
    """Return why our executor cannot run on a vLLM platform, and what to do."""
    return (
        f"vLLM's platform is {type(platform).__qualname__}, and vllm-ray-ascend runs on vllm-ascend's NPUPlatform "
        f"(Ascend NPUs) or vLLM's CudaPlatform (NVIDIA GPUs, with {PREFIX}=1). On NPUs `pip install vllm-ascend`, "
        "unset VLLM_TARGET_DEVICE, and see that VLLM_PLUGINS is unset or names `ascend`; on GPUs install vLLM's CUDA "
        f"build and see that `nvidia-smi` lists them; elsewhere unset {PREFIX}."
    )
