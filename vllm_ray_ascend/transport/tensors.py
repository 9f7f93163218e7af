"""Registration with Ray, in the driver: from then on compiled graphs move NPU tensors by HCCL."""

from __future__ import annotations

import functools
from typing import Any

import ray
from ray.dag.compiled_dag_node import CompiledDAG
from ray.dag.dag_node import DAGNode
from ray.experimental.channel.accelerator_context import AcceleratorContext

from vllm_ray_ascend.compat.rebind import replace, upstream
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.transport.communicator import HcclCommunicator
from vllm_ray_ascend.transport.context import NpuContext

NAMES = ("hccl", "accelerator")
"""What with_tensor_transport takes for HCCL. In Ray 2.48 its own "accelerator" raises by mistake, "nccl" does not."""

_RAYS_NAME = "nccl"


def register() -> None:
    """Let the compiled graphs of this process, the driver, move tensors between NPUs by HCCL.

    Then ``with_tensor_transport("hccl")`` does so ("accelerator" and "nccl" mean the same), "auto" does between actors
    that have an NPU each, and Ray makes an HcclCommunicator for each graph. May be called again.
    """
    AcceleratorContext.set(NpuContext(HcclCommunicator))
    before = upstream(DAGNode, "with_tensor_transport")

    @functools.wraps(before)
    def with_tensor_transport(self: Any, transport: Any = "auto", *args: Any, **kwargs: Any) -> Any:
        return before(self, _RAYS_NAME if transport in NAMES else transport, *args, **kwargs)

    replace(DAGNode, "with_tensor_transport", with_tensor_transport)
    replace(CompiledDAG, "_get_gpu_ids", staticmethod(_accelerator_ids))


def _accelerator_ids(actor: Any) -> list[str]:
    """For "auto", which asks for GPUs only: the NPUs of an actor that has no GPU."""
    found = ray.get(actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_accelerator_ids()))
    return list(found.get("GPU", []) or found.get(NPU.key, []))
