"""NVIDIA GPUs, through torch.cuda and vLLM's CUDA platform, so that the same engine can be compared on both."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend.accelerators import cuda_errors
from vllm_ray_ascend.accelerators.base import Accelerator, explain_with_causes
from vllm_ray_ascend.devices.kind import GPU


class CudaAccelerator(Accelerator):
    """The GPUs of this process."""

    kind = GPU
    name = "cuda"
    dist_backend = "nccl"
    graph_target = "torch.cuda.graphs.CUDAGraph"

    @property
    def torch_module(self) -> Any:
        """torch.cuda."""
        import torch

        return torch.cuda

    @property
    def graph_class(self) -> Any:
        """torch's CUDA graphs."""
        return self.torch_module.CUDAGraph

    def explain_error(self, error: BaseException | str) -> str | None:
        """Explain by the texts of torch, CUDA and NCCL."""
        return explain_with_causes(error, cuda_errors.explain_text)

    def get_opened_device(self) -> int:
        """Return torch's current device: for CUDA itself, a thread that has opened nothing is on device 0."""
        if not self.torch_module.is_initialized():
            raise RuntimeError(
                "VRA-409: torch.cuda is not initialised: this worker process has no GPU open. The reason is in its "
                "log, just before this; `nvidia-smi` shows whether the GPU is healthy."
            )
        return self.current_device()

    def physical_device_id(self, index: int) -> int:
        """Return what vLLM's platform does, which also reads lists of UUIDs."""
        from vllm.platforms import current_platform

        # The first name is that of vLLM 0.24 and later.
        translate = getattr(current_platform, "visible_device_id_to_physical_device_id", None)
        return int((translate or current_platform.device_id_to_physical_device_id)(index))

    def destroy_platform_groups(self) -> None:
        """Do nothing: there are no groups besides vLLM's."""

    def _clear_graphs(self, model_runner: Any) -> None:
        """Clear vLLM's wrappers, and the second model runner's graph manager (vllm/v1/worker/gpu/)."""
        from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
        from vllm.compilation.cuda_graph import CUDAGraphWrapper

        CUDAGraphWrapper.clear_all_graphs()
        BreakableCUDAGraphWrapper.clear_all_graphs()
        graphs = getattr(getattr(model_runner, "cudagraph_manager", None), "graphs", None)
        if graphs:
            graphs.clear()
