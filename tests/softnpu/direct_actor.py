"""An actor that sends and receives tensors of its NPU as Ray objects, in tests of the direct transport."""

from __future__ import annotations

import os
import threading
from typing import Any


class DirectActor:
    """With an NPU of its own, which its main thread uses. torch is imported once Ray has set the visible list."""

    def __init__(self) -> None:
        import ray
        import torch
        import torch_npu  # noqa: F401

        self.torch = torch
        (number,) = ray.get_runtime_context().get_accelerator_ids()["NPU"]
        self.device = 0 if os.environ.get("ASCEND_RT_VISIBLE_DEVICES") == number else int(number)
        self.made_in = threading.get_native_id()

    def facts(self) -> dict[str, Any]:
        """Process and device of this actor; device numbers are the runtime's."""
        from vllm_ray_ascend.accelerators.choose import get_accelerator

        return {
            "pid": os.getpid(),
            "device": f"npu:{self.device}",
            "physical": get_accelerator("npu").physical_device_id(self.device),
            "one_thread": self.made_in == threading.get_native_id(),
        }

    def make_tensors(self, seed: int, shapes: list[tuple[int, ...]]) -> Any:
        """Return a nested value with a tensor of each shape."""
        return {"seed": seed, "tensors": [self.make_tensor(seed + n, shape) for n, shape in enumerate(shapes)]}

    def make_host_tensor(self) -> Any:
        """Return a tensor that this transport does not send."""
        return self.torch.ones(3)

    def put(self, seed: int, transport: str) -> list[Any]:
        """Return a reference in a list, so that Ray passes it on as it is."""
        import ray

        return [ray.put(self.make_tensor(seed, (7, 9)), _tensor_transport=transport)]

    def get(self, refs: list[Any]) -> tuple[str, float]:
        """Return device and sum of the object of a reference, by ray.get in the actor."""
        import ray

        tensor = ray.get(refs[0])
        return str(tensor.device), float(tensor.cpu().double().sum())

    def receive(self, value: Any) -> tuple[list[str], list[float]]:
        """Devices and sums of what was received as the argument of a call."""
        tensors = value["tensors"]
        return [str(tensor.device) for tensor in tensors], [float(tensor.cpu().double().sum()) for tensor in tensors]

    def threads(self) -> list[str]:
        """Names of the transport's threads that are alive."""
        return sorted(each.name for each in threading.enumerate() if each.name.startswith("RayAscendDirect"))

    def make_tensor(self, seed: int, shape: tuple[int, ...]) -> Any:
        """Return the same tensor in every process."""
        self.torch.npu.set_device(self.device)  # Ray runs methods in another thread than __init__
        count = self.torch.Size(shape).numel()
        return self.torch.arange(count, dtype=self.torch.float32).reshape(shape).npu() + seed


def direct_actor_class(transport: str) -> type[DirectActor]:
    """Return the class whose results are sent by ``transport``."""
    import ray

    class Named(DirectActor):
        @ray.method(tensor_transport=transport)  # type: ignore[untyped-decorator]
        def make_tensors(self, seed: int, shapes: list[tuple[int, ...]]) -> Any:
            return DirectActor.make_tensors(self, seed, shapes)

        @ray.method(tensor_transport=transport)  # type: ignore[untyped-decorator]
        def make_host_tensor(self) -> Any:
            return DirectActor.make_host_tensor(self)

    return Named
