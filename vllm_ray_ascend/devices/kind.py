"""The two kinds of accelerators, as Ray, their drivers and our messages call them."""

from __future__ import annotations

from typing import NamedTuple

from vllm_ray_ascend.devices.visible import VARIABLE


class Kind(NamedTuple):
    """One kind: ``key`` is Ray's resource and the word in messages, ``variable`` the list of visible ones."""

    key: str
    variable: str
    list_command: str
    """What lists those of a node."""

    def ray_start(self, number: float | str) -> str:
        """The option of `ray start` that declares so many."""
        if self.key == "GPU":
            return f"--num-gpus={number}"
        return f"""--resources='{{"{self.key}": {number}}}'"""

    @property
    def one(self) -> str:
        """One of them, in words."""
        return f"{'a' if self.key == 'GPU' else 'an'} {self.key}"

    def counted(self, number: float) -> str:
        """So many of them, in words."""
        return f"{number:g} {self.key}{'' if number == 1 else 's'}"


NPU = Kind("NPU", VARIABLE, "npu-smi info")
GPU = Kind("GPU", "CUDA_VISIBLE_DEVICES", "nvidia-smi -L")
KINDS = {kind.key: kind for kind in (NPU, GPU)}
