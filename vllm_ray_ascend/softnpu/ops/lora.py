"""vllm-ascend's kernels of low-rank adapters: many adapters in one batch, each token with its own or with none.

Shapes: inputs (tokens, in), weights (adapters, 1, out, in), an adapter's index a token or a sequence, -1 for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    "bgmv_shrink": "(Tensor x, Tensor weight, Tensor indices, Tensor(a!) y, float scale) -> ()",
    "bgmv_expand": "(Tensor x, Tensor weight, Tensor indices, Tensor(a!) y, int slice_offset, int slice_size)"
    " -> Tensor(a!)",
    "sgmv_shrink": "(Tensor x, Tensor weight, Tensor lora_indices, Tensor seq_len, Tensor(a!) y, float scale) -> ()",
    "sgmv_expand": "(Tensor x, Tensor weight, Tensor lora_indices, Tensor seq_len, Tensor(a!) y, int slice_offset,"
    " int slice_size) -> Tensor(a!)",
}


def _product(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Each token times its adapter's weights, in fp32; zero where it has none. All shapes are known beforehand."""
    chosen = weight.flatten(0, -3).index_select(0, indices.clamp(min=0)).float()
    product = torch.bmm(chosen, x.float().unsqueeze(-1)).squeeze(-1)
    return product * (indices >= 0).unsqueeze(-1)


def bgmv_shrink(x: Tensor, weight: Tensor, indices: Tensor, y: Tensor, scale: float) -> None:
    """y = scale * x A^T, an index a token."""
    y.copy_(_product(x, weight, indices) * scale)


def bgmv_expand(x: Tensor, weight: Tensor, indices: Tensor, y: Tensor, slice_offset: int, slice_size: int) -> Tensor:
    """y += x B^T in some of y's columns, an index a token."""
    y.narrow(1, slice_offset, slice_size).add_(_product(x, weight, indices))
    return y


def _per_token(lora_indices: Tensor, seq_len: Tensor, tokens: int) -> Tensor:
    """An index a token, -1 for those behind the last sequence. Lengths are data: a graph has them at its replay."""
    places = torch.arange(tokens, device=seq_len.device).unsqueeze(1)
    sequence = (places >= seq_len.cumsum(0)).sum(1)
    return torch.cat([lora_indices, torch.full_like(lora_indices[:1], -1)]).index_select(0, sequence)


def sgmv_shrink(x: Tensor, weight: Tensor, lora_indices: Tensor, seq_len: Tensor, y: Tensor, scale: float) -> None:
    """y = scale * x A^T, an index and a length a sequence."""
    bgmv_shrink(x, weight, _per_token(lora_indices, seq_len, x.shape[0]), y, scale)


def sgmv_expand(
    x: Tensor, weight: Tensor, lora_indices: Tensor, seq_len: Tensor, y: Tensor, slice_offset: int, slice_size: int
) -> Tensor:
    """y += x B^T in some of y's columns, an index and a length a sequence."""
    return bgmv_expand(x, weight, _per_token(lora_indices, seq_len, x.shape[0]), y, slice_offset, slice_size)


def define(library: torch.library.Library) -> None:
    """Add the operators to the library of `_C_ascend`."""
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, globals()[name], "PrivateUse1")
