"""A worker extension class that reports what each worker is and does, through collective_rpc."""

from __future__ import annotations

import ctypes
import os
from typing import Any


def physical_device(visible: int) -> int:
    """Return the driver's number of a visible device, from CANN."""
    library = ctypes.CDLL("libascendcl.so")
    physical = ctypes.c_int32(-1)
    code = library.aclrtGetLogicDevIdByUserDevId(ctypes.c_int32(visible), ctypes.byref(physical))
    if code:
        raise RuntimeError(f"aclrtGetLogicDevIdByUserDevId({visible}) failed with {code}")
    return physical.value


def point_to_point() -> list[int]:
    """Return messages and bytes that this process sent over HCCL to single peers, and those that it received."""
    counted = (ctypes.c_uint64 * 4)()
    ctypes.CDLL("libhccl.so").softnpu_hccl_point_to_point(counted)
    return list(counted)


class WorkerFacts:
    """Mixed into vllm-ascend's worker by `worker_extension_cls`. Counts the graph replays of its process."""

    def count_replays(self) -> None:
        """Start counting."""
        import torch

        replay = torch.npu.NPUGraph.replay

        def counted(graph: Any) -> Any:
            self.replays += 1
            return replay(graph)

        self.replays = 0
        torch.npu.NPUGraph.replay = counted

    def facts(self) -> dict[str, Any]:
        """Return classes, devices, groups and replays of this worker."""
        import torch
        import torch.distributed as dist
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        from vllm_ray_ascend.ray_transport.accelerator_context import host_copies

        groups = {"tp": get_tp_group(), "pp": get_pp_group()}
        runner = self.model_runner  # type: ignore[attr-defined]
        caches = runner.kv_caches if isinstance(runner.kv_caches, list) else list(runner.kv_caches.values())
        tensors = [tensor for cache in caches for tensor in (cache if isinstance(cache, (list, tuple)) else [cache])]
        return {
            "classes": [f"{kind.__module__}.{kind.__qualname__}" for kind in type(self).__mro__],
            "rank": self.rank,  # type: ignore[attr-defined]
            "pid": os.getpid(),
            "node": os.environ.get("SOFTNPU_NODE", ""),
            "physical": physical_device(torch.npu.current_device()),
            "parameter_devices": sorted({p.device.type for p in runner.model.parameters()}),
            "cache_devices": sorted({tensor.device.type for tensor in tensors}),
            "backends": {name: dist.get_backend(group.device_group) for name, group in groups.items()},
            "group_sizes": {name: group.world_size for name, group in groups.items()},
            "replays": getattr(self, "replays", 0),
            "host_copies": host_copies().tensors,
            "point_to_point": point_to_point(),
        }
