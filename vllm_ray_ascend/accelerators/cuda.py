"""NVIDIA GPUs, through torch.cuda and vLLM's CUDA platform, so that the same engine can be compared on both."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend.accelerators import cuda_errors
from vllm_ray_ascend.accelerators.base import Accelerator, explained
from vllm_ray_ascend.devices.kind import GPU


class Cuda(Accelerator):
    """The GPUs of this process."""

    kind = GPU
    name = "cuda"
    communicator = "nccl"

    @property
    def torch_module(self) -> Any:
        """torch.cuda."""
        import torch

        return torch.cuda

    @property
    def graph_class(self) -> Any:
        """CUDA graphs."""
        return self.torch_module.CUDAGraph

    def explain(self, error: BaseException | str) -> str | None:
        """By the texts of torch, CUDA and NCCL."""
        return explained(error, cuda_errors.explain)

    def opened_device(self) -> int:
        """What torch says: CUDA itself counts a thread that has opened nothing as on device 0."""
        if not self.torch_module.is_initialized():
            raise RuntimeError(
                "torch.cuda is not initialised: this worker process has no GPU open. Its log says why, just before "
                "this; `nvidia-smi` shows whether the GPU is healthy."
            )
        return self.current_device()

    def physical(self, index: int) -> int:
        """As vLLM's platform says, which also reads lists of UUIDs; the first name is that of vLLM 0.24 and later."""
        from vllm.platforms import current_platform

        ask = getattr(current_platform, "visible_device_id_to_physical_device_id", None)
        return int((ask or current_platform.device_id_to_physical_device_id)(index))

    def leave_groups(self) -> None:
        """There are none besides vLLM's."""

    def _drop_graphs(self, model_runner: Any) -> None:
        """Those of vLLM's wrappers, and of the second model runner's manager (vllm/v1/worker/gpu/)."""
        from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
        from vllm.compilation.cuda_graph import CUDAGraphWrapper

        CUDAGraphWrapper.clear_all_graphs()
        BreakableCUDAGraphWrapper.clear_all_graphs()
        graphs = getattr(getattr(model_runner, "cudagraph_manager", None), "graphs", None)
        if graphs:
            graphs.clear()
