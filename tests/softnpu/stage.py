"""An actor of compiled graphs in tests: it creates tensors on its NPU, and returns digests of what it received."""

from __future__ import annotations

import os
import threading
import zlib
from typing import Any, NamedTuple

_DTYPES = ("bfloat16", "float16", "float32", "int64", "bool", "uint8")


class Digest(NamedTuple):
    """What identifies a tensor in the results."""

    device: str
    dtype: str
    shape: tuple[int, ...]
    checksum: int


def make_tensor(seed: int, dtype: str, shape: tuple[int, ...]) -> Any:
    """Return a tensor of the host, the same for a seed in every process, with bytes of every value."""
    import torch

    kind = getattr(torch, dtype)
    count = 1
    for each in shape:
        count *= each
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (count * kind.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(kind).reshape(shape)


def digest(tensor: Any) -> Digest:
    import torch

    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return Digest(str(tensor.device), str(tensor.dtype), tuple(tensor.shape), zlib.crc32(raw))


def tensor_specs(seed: int) -> list[tuple[int, str, tuple[int, ...]]]:
    """Seeds, types and shapes of the tensors of one message: different ones for each seed, some of them empty."""
    return [
        (seed * 10 + number, _DTYPES[(seed + number) % len(_DTYPES)], ((seed * 7 + number * 13) % 40, 1 + number * 5))
        for number in range(1 + seed % 4)
    ]


def expected(seed: int, device: str) -> list[Digest]:
    return [digest(make_tensor(*each))._replace(device=device) for each in tensor_specs(seed)]


class Stage:
    """With an NPU of its own."""

    def about(self) -> dict[str, Any]:
        from ray.experimental.channel import ChannelContext

        from vllm_ray_ascend.ray_transport.accelerator_context import host_copies

        return {
            "pid": os.getpid(),
            "device": str(ChannelContext.get_current().torch_device),
            "copies": host_copies().tensors,
            "copied": host_copies().bytes,
        }

    def make(self, seed: int) -> dict[str, Any]:
        """Several tensors, one of them twice, nested in other values."""
        tensors = [make_tensor(*each).to("npu") for each in tensor_specs(seed)]
        return {
            "seed": seed,
            "first": tensors[0],
            "rest": ["x", {"all": (tensors, tensors[0])}],
            "host": make_tensor(1, "int64", (2,)),
        }

    def digest_all(self, value: dict[str, Any]) -> tuple[int, list[Digest]]:
        tensors, again = value["rest"][1]["all"]
        assert again is value["first"] or digest(again) == digest(value["first"])
        assert digest(value["host"]) == digest(make_tensor(1, "int64", (2,)))
        return value["seed"], [digest(tensor) for tensor in tensors]

    def forward(self, value: Any) -> Any:
        """Return the same value for the next stage, with each tensor copied by an operator."""
        import torch

        if isinstance(value, torch.Tensor):
            return value.clone()
        if isinstance(value, dict):
            return {key: self.forward(each) for key, each in value.items()}
        return type(value)(map(self.forward, value)) if isinstance(value, list | tuple) else value

    def ones(self, count: int) -> Any:
        import torch

        return torch.ones(count, device="npu")

    def counted(self, seed: int) -> Any:
        import torch

        return torch.arange(8, dtype=torch.float32, device="npu") + seed

    def add(self, value: Any, number: float) -> Any:
        return value + number

    def read_values(self, value: Any) -> tuple[str, list[float]]:
        return str(value.device), value.float().cpu().tolist()

    def total(self, value: Any) -> float:
        return float(value.float().sum())

    def make_invalid(self, what: str) -> Any:
        """Return a tensor that cannot be sent."""
        import torch

        if what == "complex":
            return torch.ones(2, device="npu", dtype=torch.complex64)
        own = torch.device(self.about()["device"]).index
        return torch.ones(2, device=f"npu:{(own + 1) % 6}")

    def block_producer(self, count: int) -> Any:
        """Return a tensor whose producer never runs: its receiver waits in HCCL."""
        import torch

        from tests.softnpu.device import Gate

        self.gate = Gate(torch.npu.current_stream())
        return torch.ones(count, device="npu")

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())
