"""Registration with Ray, in the driver: from then on compiled graphs move NPU tensors by HCCL."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ray
from ray.experimental.channel.accelerator_context import AcceleratorContext

from vllm_ray_ascend import patches
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.ray_transport.accelerator_context import NpuContext
from vllm_ray_ascend.ray_transport.communicator import HcclCommunicator

NAMES = ("hccl", "accelerator")
"""What with_tensor_transport takes for HCCL. In Ray 2.48 its own "accelerator" raises by mistake, "nccl" does not."""

_RAY_NAME = "nccl"


def register() -> None:
    """Let the compiled graphs of this process, the driver, move tensors between NPUs by HCCL.

    Then ``with_tensor_transport("hccl")`` uses HCCL ("accelerator" and "nccl" mean the same), "auto" does between
    actors that have an NPU each, and Ray creates an HcclCommunicator for each graph. May be called several times.
    """
    AcceleratorContext.set(NpuContext(HcclCommunicator))
    patches.wrap("ray.dag.dag_node.DAGNode.with_tensor_transport", _with_transport_names)
    patches.apply("ray.dag.compiled_dag_node.CompiledDAG._get_gpu_ids", staticmethod(_get_accelerator_ids))


def _with_transport_names(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def with_tensor_transport(self: Any, transport: Any = "auto", *args: Any, **kwargs: Any) -> Any:
        return original(self, _RAY_NAME if transport in NAMES else transport, *args, **kwargs)

    return with_tensor_transport


def _get_accelerator_ids(actor: Any) -> list[str]:
    """Return the GPUs of an actor, else its NPUs: "auto" asks Ray for GPUs only."""
    ids = ray.get(actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_accelerator_ids()))
    return list(ids.get("GPU", []) or ids.get(NPU.key, []))
