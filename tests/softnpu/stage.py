"""An actor of compiled graphs in tests: it makes tensors on its NPU, and tells what has arrived."""

from __future__ import annotations

import os
import threading
import time
import zlib
from typing import Any, NamedTuple

_DTYPES = ("bfloat16", "float16", "float32", "int64", "bool", "uint8")


class Digest(NamedTuple):
    """What is told of a tensor."""

    device: str
    dtype: str
    shape: tuple[int, ...]
    checksum: int


def made(seed: int, dtype: str, shape: tuple[int, ...]) -> Any:
    """A tensor of the host, from its seed the same everywhere, with bytes of every value."""
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


def spec_of(seed: int) -> list[tuple[int, str, tuple[int, ...]]]:
    """Seeds, types and shapes of the tensors of one message: other ones each time, and empty ones among them."""
    return [
        (seed * 10 + number, _DTYPES[(seed + number) % len(_DTYPES)], ((seed * 7 + number * 13) % 40, 1 + number * 5))
        for number in range(1 + seed % 4)
    ]


def expected(seed: int, device: str) -> list[Digest]:
    return [digest(made(*each))._replace(device=device) for each in spec_of(seed)]


class Stage:
    """With an NPU of its own."""

    def about(self) -> dict[str, Any]:
        from ray.experimental.channel import ChannelContext

        from vllm_ray_ascend.transport.context import host_copies

        return {
            "pid": os.getpid(),
            "device": str(ChannelContext.get_current().torch_device),
            "copies": host_copies().tensors,
            "copied": host_copies().bytes,
        }

    def make(self, seed: int) -> dict[str, Any]:
        """Several tensors, one of them twice, deep in other values."""
        tensors = [made(*each).to("npu") for each in spec_of(seed)]
        return {
            "seed": seed,
            "first": tensors[0],
            "rest": ["x", {"all": (tensors, tensors[0])}],
            "host": made(1, "int64", (2,)),
        }

    def see(self, value: dict[str, Any]) -> tuple[int, list[Digest]]:
        tensors, again = value["rest"][1]["all"]
        assert again is value["first"] or digest(again) == digest(value["first"])
        assert digest(value["host"]) == digest(made(1, "int64", (2,)))
        return value["seed"], [digest(tensor) for tensor in tensors]

    def on(self, value: Any) -> Any:
        """What goes on to the next stage: the same, by way of an operator."""
        import torch

        if isinstance(value, torch.Tensor):
            return value.clone()
        if isinstance(value, dict):
            return {key: self.on(each) for key, each in value.items()}
        return type(value)(map(self.on, value)) if isinstance(value, list | tuple) else value

    def ones(self, count: int) -> Any:
        import torch

        return torch.ones(count, device="npu")

    def counted(self, seed: int) -> Any:
        import torch

        return torch.arange(8, dtype=torch.float32, device="npu") + seed

    def add(self, value: Any, number: float) -> Any:
        return value + number

    def tell(self, value: Any) -> tuple[str, list[float]]:
        return str(value.device), value.float().cpu().tolist()

    def total(self, value: Any) -> float:
        return float(value.float().sum())

    def odd(self, what: str) -> Any:
        """A tensor that cannot go."""
        import torch

        if what == "complex":
            return torch.ones(2, device="npu", dtype=torch.complex64)
        own = torch.device(self.about()["device"]).index
        return torch.ones(2, device=f"npu:{(own + 1) % 6}")

    def hold(self, count: int) -> Any:
        """A tensor whose producer does not run until `let_go`: whoever receives it waits in HCCL."""
        import torch

        from tests.softnpu.device import Gate

        self.gate = Gate(torch.npu.current_stream())
        return torch.ones(count, device="npu")

    def let_go(self) -> None:
        import torch

        torch.npu.set_device(torch.device(self.about()["device"]))
        self.gate.open()
        end = time.monotonic() + 30
        while True:
            try:  # what had been sent fails now, and its stream is gone a little later
                torch.npu.synchronize()
                return
            except RuntimeError:
                assert time.monotonic() < end
                time.sleep(0.1)

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())
