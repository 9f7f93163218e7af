"""A driver with ray-ascend and this package: its transport and ours, in the same actors. Prints what came by which."""

from __future__ import annotations

import json
from typing import Any

import ray
import torch
from ray.experimental.collective import create_collective_group
from ray_ascend import register_hccl_collective_backend, register_hccl_tensor_transport

from vllm_ray_ascend.ray_transport import direct

LIMIT = 120


def main(first: str) -> None:
    """Both orders of registration are possible: ``first`` is who goes first."""
    ray.init("local", num_cpus=4, resources={"NPU": 2}, include_dashboard=False, log_to_driver=False)
    if first == "theirs":
        register_hccl_tensor_transport()
    name = direct.register()
    if first == "ours":
        register_hccl_tensor_transport()

    class Both:
        def __init__(self) -> None:
            import torch_npu  # noqa: F401

            register_hccl_collective_backend()
            torch.npu.set_device(0)

        @ray.method(tensor_transport=name)  # type: ignore[untyped-decorator]
        def ours(self) -> Any:
            return torch.arange(10.0).npu()

        @ray.method(tensor_transport="HCCL")  # type: ignore[untyped-decorator]
        def theirs(self) -> Any:
            return torch.arange(10.0).npu() + 1

        def total(self, tensor: Any) -> float:
            return float(tensor.sum())

    actor = ray.remote(resources={"NPU": 1}, num_cpus=0)(Both)
    one, other = actor.remote(), actor.remote()
    create_collective_group([one, other], backend="HCCL")
    found = [ray.get(other.total.remote(method.remote()), timeout=LIMIT) for method in (one.ours, one.theirs, one.ours)]
    print(json.dumps({"name": name, "found": found}))


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
