"""vllm-ascend's kernels of low-rank adapters: many adapters in one batch, each token with its own or with none.

Shapes: inputs (tokens, in), weights (adapters, 1, out, in), one adapter index per token or per sequence, -1 for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    "bgmv_shrink": "(Tensor! x, Tensor! weight, Tensor! indices, Tensor! y, float scale) -> ()",
    "bgmv_expand": "(Tensor! x, Tensor! weight, Tensor! indices, Tensor! y, int slice_offset, int slice_size)"
    " -> Tensor",
    "sgmv_shrink": "(Tensor! x, Tensor! weight, Tensor! lora_indices, Tensor! seq_len, Tensor! y, float scale) -> ()",
    "sgmv_expand": "(Tensor! x, Tensor! weight, Tensor! lora_indices, Tensor! seq_len, Tensor! y, int slice_offset,"
    " int slice_size) -> Tensor",
}
"""As vllm-ascend declares them: whatever they are given may change, and what they return is new. torch.compile takes
no operator of others that returns what it was given."""


def _multiply_by_adapter(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Multiply each token by its adapter's weights, in fp32; zero where it has none. No shape depends on data."""
    chosen = weight.flatten(0, -3).index_select(0, indices.clamp(min=0)).float()
    product = torch.bmm(chosen, x.float().unsqueeze(-1)).squeeze(-1)
    return product * (indices >= 0).unsqueeze(-1)


def bgmv_shrink(x: Tensor, weight: Tensor, indices: Tensor, y: Tensor, scale: float) -> None:
    """Compute y = scale * x A^T, with one index per token."""
    y.copy_(_multiply_by_adapter(x, weight, indices) * scale)


def bgmv_expand(x: Tensor, weight: Tensor, indices: Tensor, y: Tensor, slice_offset: int, slice_size: int) -> Tensor:
    """Compute y += x B^T in some of y's columns, with one index per token."""
    y.narrow(1, slice_offset, slice_size).add_(_multiply_by_adapter(x, weight, indices))
    return y.clone()


def _expand_to_tokens(lora_indices: Tensor, seq_len: Tensor, tokens: int) -> Tensor:
    """Return one index per token, -1 behind the last sequence. Lengths are data: a graph reads them at its replay."""
    places = torch.arange(tokens, device=seq_len.device).unsqueeze(1)
    sequence = (places >= seq_len.cumsum(0)).sum(1)
    return torch.cat([lora_indices, torch.full_like(lora_indices[:1], -1)]).index_select(0, sequence)


def sgmv_shrink(x: Tensor, weight: Tensor, lora_indices: Tensor, seq_len: Tensor, y: Tensor, scale: float) -> None:
    """Compute y = scale * x A^T, with one index and one length per sequence."""
    bgmv_shrink(x, weight, _expand_to_tokens(lora_indices, seq_len, x.shape[0]), y, scale)


def sgmv_expand(
    x: Tensor, weight: Tensor, lora_indices: Tensor, seq_len: Tensor, y: Tensor, slice_offset: int, slice_size: int
) -> Tensor:
    """Compute y += x B^T in some of y's columns, with one index and one length per sequence."""
    return bgmv_expand(x, weight, _expand_to_tokens(lora_indices, seq_len, x.shape[0]), y, slice_offset, slice_size)


def _shape_of_sum(x: Tensor, weight: Tensor, indices: Tensor, y: Tensor, *slice_: int) -> Tensor:
    return torch.empty_like(y)


def _shape_of_sums(x: Tensor, weight: Tensor, indices: Tensor, seq_len: Tensor, y: Tensor, *slice_: int) -> Tensor:
    return torch.empty_like(y)


META = {"bgmv_expand": _shape_of_sum, "sgmv_expand": _shape_of_sums}
"""For torch.compile, as vllm_ascend/meta_registration.py has them."""


def define_operators(library: torch.library.Library) -> None:
    """Add the operators to the library of `_C_ascend`."""
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, globals()[name], "PrivateUse1")
    for name, shape in META.items():
        library.impl(name, shape, "Meta")
