"""The module vllm_ascend.vllm_ascend_C: vllm-ascend's own operators, as far as Qwen3, LoRA and sleep mode use them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from softnpu.ops import lora
from softnpu.ops.dense import normalize_rms
from softnpu.ops.moe import gating_top_k

_library: torch.library.Library | None = None


def _add_rms_norm_bias(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    normed, inverse = normalize_rms(total, gamma, epsilon)
    return (normed if beta is None else normed + beta), inverse, total


def _add_rms_norm_bias_shapes(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x1), x1.new_empty((*x1.shape[:-1], 1), dtype=torch.float32), torch.empty_like(x1)


def _gating_top_k(
    x: Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return gating_top_k(
        x, k, bias=bias_opt, k_group=k_group, group_count=group_count, renorm=renorm, norm_type=norm_type,
        routed_scaling_factor=routed_scaling_factor, eps=eps,
    )  # fmt: skip


def _gating_top_k_shapes(x: Tensor, k: int, *rest: object, **named: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty((*rows, k)), x.new_empty((*rows, k), dtype=torch.int32), torch.empty_like(x, dtype=torch.float32)


def _add_sleep_mode(module: ModuleType) -> None:
    """Add the functions of csrc/camem. vllm-ascend finds the library by its name among the loaded ones."""
    path = Path(os.environ["SOFTNPU_LIB"]) / "vllm_ascend_C.so"
    spec = importlib.util.spec_from_file_location("vllm_ascend_C", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded. Build it again: softnpu build")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    for name in ("init_module", "python_create_and_map", "python_unmap_and_release"):
        setattr(module, name, getattr(loaded, name))


def install_operators(module: ModuleType) -> None:
    """Define the operators. Calls of any other operator raise with its name, since it stays undefined."""
    global _library
    _add_sleep_mode(module)
    if _library is not None:
        return
    _library = torch.library.Library("_C_ascend", "FRAGMENT")
    _library.define(
        "npu_add_rms_norm_bias(Tensor x1, Tensor x2, Tensor gamma, Tensor? beta=None, float epsilon=1e-6)"
        " -> (Tensor, Tensor, Tensor)"
    )
    _library.impl("npu_add_rms_norm_bias", _add_rms_norm_bias, "PrivateUse1")
    _library.impl("npu_add_rms_norm_bias", _add_rms_norm_bias_shapes, "Meta")
    _library.define(
        "moe_gating_top_k(Tensor x, int k, int k_group, int group_count, int group_select_mode, int renorm,"
        " int norm_type, bool out_flag, float routed_scaling_factor, float eps, Tensor? bias_opt=None)"
        " -> (Tensor, Tensor, Tensor)"
    )
    _library.impl("moe_gating_top_k", _gating_top_k, "PrivateUse1")
    _library.impl("moe_gating_top_k", _gating_top_k_shapes, "Meta")
    lora.define_operators(_library)
