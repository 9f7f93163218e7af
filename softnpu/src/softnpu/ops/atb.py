"""Operators of ATB (Ascend Transformer Boost) that vllm-ascend calls: torch_npu defines them at their first use."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

_library: torch.library.Library | None = None


def _matmul_add_fp32(x: Tensor, weight: Tensor, c: Tensor) -> None:
    left = x.float().t() if x.shape[0] == weight.shape[0] else x.float()
    c.add_(left @ weight.float())


def install_after_registration(module: ModuleType) -> None:
    """Wrap torch_npu.op_plugin.atb._atb_ops._register_atb_extensions, which defines the operators."""
    register = module._register_atb_extensions

    def register_and_install(*args: object, **kwargs: object) -> object:
        global _library
        result = register(*args, **kwargs)
        if _library is None:
            from softnpu.ops.library import load_extension

            load_extension().refuse("atb", {"_npu_matmul_add_fp32"})
            _library = torch.library.Library("atb", "IMPL")
            _library.impl("_npu_matmul_add_fp32", _matmul_add_fp32, "PrivateUse1", allow_override=True)
        return result

    module._register_atb_extensions = register_and_install  # type: ignore[attr-defined]
