"""The NPU platform where VLLM_PLUGINS selects `ray_ascend` and not `ascend`. Loaded late: it needs vllm-ascend."""

from __future__ import annotations

from vllm_ascend.platform import NPUPlatform

from vllm_ray_ascend.platform_patch import patch_platform


class RayAscendPlatform(NPUPlatform):
    """vllm-ascend's platform with our members; NPUPlatform itself stays as it is."""


patch_platform(RayAscendPlatform)
