"""The two kinds of accelerators, as Ray, their drivers and our messages name them."""

from __future__ import annotations

from typing import NamedTuple

from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES

SHARE_VARIABLE = "VLLM_RAY_PER_WORKER_GPUS"
"""vLLM's variable for the part of a device that each worker takes."""


class Kind(NamedTuple):
    """One kind: ``key`` is Ray's resource and the word in messages, ``variable`` the list of visible devices."""

    key: str
    variable: str
    list_command: str
    """The command that lists a node's devices of this kind."""

    def ray_start_option(self, number: float | str) -> str:
        """Return the option of `ray start` that declares ``number`` devices."""
        if self.key == "GPU":
            return f"--num-gpus={number}"
        return f"""--resources='{{"{self.key}": {number}}}'"""

    @property
    def with_article(self) -> str:
        """One device in words: "an NPU"."""
        return f"{'a' if self.key == 'GPU' else 'an'} {self.key}"

    def format_count(self, number: float) -> str:
        """Return ``number`` devices in words: "2 NPUs"."""
        return f"{number:g} {self.key}{'' if number == 1 else 's'}"


NPU = Kind("NPU", VISIBLE_DEVICES, "npu-smi info")
GPU = Kind("GPU", "CUDA_VISIBLE_DEVICES", "nvidia-smi -L")
KINDS = {kind.key: kind for kind in (NPU, GPU)}
