"""An actor of compiled graphs in tests: it makes tensors on its NPU, and tells what has arrived."""

from __future__ import annotations

from typing import Any

Spec = list[tuple[str, tuple[int, ...]]]


class Stage:
    """With an NPU of its own. Every value is made anew from its seed wherever it is needed."""

    def make(self, spec: Spec) -> list[Any]:
        import torch

        return [torch.ones(shape, dtype=getattr(torch, dtype), device="npu") for dtype, shape in spec]

    def see(self, tensors: list[Any]) -> list[tuple[str, str, list[int], float]]:
        return [(str(t.device), str(t.dtype), list(t.shape), float(t.float().sum())) for t in tensors]
