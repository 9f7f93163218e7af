"""The accelerator of this process, by vLLM's platform."""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.cuda import Cuda
from vllm_ray_ascend.accelerators.npu import Npu
from vllm_ray_ascend.errors import NotActiveError
from vllm_ray_ascend.settings import PREFIX

NAMES = ("npu", "cuda")


def current() -> Accelerator:
    """The accelerator of vLLM's platform; resolves the platform, so it is not for use while plugins load.

    Raises NotActiveError where that is neither vllm-ascend's nor vLLM's own for CUDA.
    """
    from vllm.platforms import current_platform

    name = name_of(current_platform)
    if name is None:
        raise NotActiveError(unsupported(current_platform))
    return accelerator(name)


def name_of(platform: Any) -> str | None:
    """Which of ours a vLLM platform is; None for others. ROCm calls its devices cuda as well, and was never tried."""
    if platform.device_type == "npu":
        return "npu"
    return "cuda" if platform.is_cuda() else None


@cache
def accelerator(name: str) -> Accelerator:
    """The one object of this process with this name: it knows the process's captures."""
    return {"npu": Npu, "cuda": Cuda}[name]()


def unsupported(platform: Any) -> str:
    """Why our executor cannot run on a vLLM platform."""
    return (
        f"vLLM's platform is {type(platform).__qualname__}, and vllm-ray-ascend runs on vllm-ascend's NPUPlatform "
        f"(Ascend NPUs) or vLLM's CudaPlatform (NVIDIA GPUs, with {PREFIX}=1). On NPUs `pip install vllm-ascend`, "
        "unset VLLM_TARGET_DEVICE, and see that VLLM_PLUGINS is unset or names `ascend`; on GPUs install vLLM's CUDA "
        f"build and see that `nvidia-smi` lists them; elsewhere unset {PREFIX}."
    )
