"""What torch_npu's collectives do with integers before and after HCCL, where the CPU has no kernel for it."""

from __future__ import annotations

import torch
from torch import Tensor

from softnpu.ops.library import KernelRegistry

_aten = KernelRegistry("aten")
_npu = KernelRegistry("npu")


@_aten.add("div_.Scalar")
@_aten.add("div_.Tensor")
def div_(self: Tensor, other: Tensor | float) -> Tensor:
    """Divide in place; integers are truncated, as ``ReduceOp.AVG`` needs: torch_npu gives them to aclnnInplaceDivs
    unchecked (op-plugin, DivKernelNpuOpApi.cpp)."""
    if self.dtype == torch.bool:
        raise RuntimeError("result type Float can't be cast to the desired output type Bool")
    return self.copy_(torch.div(self, other))


@_npu.add("_npu_dtype_cast")
def cast(input: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: A002  torch_npu's name
    """Return a copy in another type: HCCL reduces uint8 and bool as int32."""
    return torch.empty_like(input, dtype=dtype).copy_(input)


NAMES = frozenset(_npu.names)
