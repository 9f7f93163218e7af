"""An actor that gives and takes tensors of its NPU as Ray objects, in tests of the direct transport."""

from __future__ import annotations

import os
import threading
from typing import Any


class Trader:
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
        """Where this is; device numbers are the runtime's."""
        from vllm_ray_ascend.accelerators.choose import accelerator

        return {
            "pid": os.getpid(),
            "device": f"npu:{self.device}",
            "physical": accelerator("npu").physical(self.device),
            "one_thread": self.made_in == threading.get_native_id(),
        }

    def give(self, seed: int, shapes: list[tuple[int, ...]]) -> Any:
        """A nested value with a tensor of each shape."""
        return {"seed": seed, "tensors": [self.made(seed + n, shape) for n, shape in enumerate(shapes)]}

    def give_host(self) -> Any:
        """What this transport does not take."""
        return self.torch.ones(3)

    def put(self, seed: int, transport: str) -> list[Any]:
        """A reference in a list, so that Ray passes it on as it is."""
        import ray

        return [ray.put(self.made(seed, (7, 9)), _tensor_transport=transport)]

    def get(self, refs: list[Any]) -> tuple[str, float]:
        """What a reference stands for, by ray.get in the actor."""
        import ray

        tensor = ray.get(refs[0])
        return str(tensor.device), float(tensor.cpu().double().sum())

    def take(self, value: Any) -> tuple[list[str], list[float]]:
        """Devices and sums of what came, as the argument of a call."""
        tensors = value["tensors"]
        return [str(tensor.device) for tensor in tensors], [float(tensor.cpu().double().sum()) for tensor in tensors]

    def threads(self) -> list[str]:
        """Names of the transport's threads that are alive."""
        return sorted(each.name for each in threading.enumerate() if each.name.startswith("RayAscendDirect"))

    def made(self, seed: int, shape: tuple[int, ...]) -> Any:
        """The same everywhere."""
        self.torch.npu.set_device(self.device)  # Ray runs methods in another thread than __init__
        count = self.torch.Size(shape).numel()
        return self.torch.arange(count, dtype=self.torch.float32).reshape(shape).npu() + seed


def naming(transport: str) -> type[Trader]:
    """The class whose gifts go by ``transport``."""
    import ray

    class Named(Trader):
        @ray.method(tensor_transport=transport)  # type: ignore[untyped-decorator]
        def give(self, seed: int, shapes: list[tuple[int, ...]]) -> Any:
            return Trader.give(self, seed, shapes)

        @ray.method(tensor_transport=transport)  # type: ignore[untyped-decorator]
        def give_host(self) -> Any:
            return Trader.give_host(self)

    return Named
