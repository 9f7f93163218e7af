"""Fused operators of a mixture of experts, as references in aten."""

from __future__ import annotations

import torch
from torch import Tensor

from softnpu.ops.library import KernelRegistry, load_extension

_kernels = KernelRegistry("npu")


@_kernels.add("npu_moe_gating_top_k_softmax")
def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    if finished is not None:
        raise NotImplementedError("the software NPU's npu_moe_gating_top_k_softmax does not take `finished`")
    weights, experts = torch.softmax(x.float(), -1).topk(k, -1)
    rows = torch.arange(x.shape[0] * k, device=x.device, dtype=torch.int32).view(k, -1).t().contiguous()
    return weights.to(x.dtype), experts.int(), rows


@_kernels.add("npu_moe_gating_top_k")
def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights and numbers of each token's k best experts, and all scores (softmax or sigmoid: norm_type)."""
    if group_count != 1 or input_ids is not None or tid2eid is not None:
        raise NotImplementedError(f"the software NPU's moe_gating_top_k has no groups (group_count={group_count})")
    scores = torch.softmax(x.float(), -1) if norm_type == 0 else x.float().sigmoid()
    chosen = scores if bias is None else scores + bias.float()
    experts = chosen.topk(k, -1)[1]
    weights = scores.gather(1, experts)
    if norm_type == 1 or renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), scores


@_kernels.add("npu_moe_init_routing_v2")
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: tuple[int, ...] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows of x sorted by expert, the position of each, and the number of rows of each expert."""
    if quant_mode != -1 or drop_pad_mode != 0:
        raise NotImplementedError(f"the software NPU routes without quantisation and padding (quant_mode={quant_mode})")
    per_token = expert_idx.shape[1]
    experts = expert_idx.flatten().long()
    first, end = active_expert_range[:2] if len(active_expert_range) else (0, expert_num)
    # Rows of experts outside the range go last, as the real operator leaves them.
    order = torch.argsort(torch.where((experts >= first) & (experts < end), experts, expert_num), stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(experts.numel(), device=x.device)
    counts = torch.zeros(expert_num, dtype=torch.long, device=x.device).index_add_(0, experts, torch.ones_like(experts))
    counts = counts[first:end]
    rows = x.index_select(0, order // per_token)
    return (
        rows,
        (places if row_idx_type == 0 else order).int(),
        counts.cumsum(0) if expert_tokens_num_type == 0 else counts,
        torch.zeros(0, device=x.device),
    )


@_kernels.add("npu_grouped_matmul")
def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: torch.dtype | None = None,
    **unused: object,
) -> list[Tensor]:
    """Multiply each group's rows by its matrix. One x, one stack of weights (groups, in, out), sizes on the device."""
    given = [name for name, value in unused.items() if value is not None and not isinstance(value, int)]
    if (
        bias is not None
        or given
        or len(x) != 1
        or len(weight) != 1
        or group_list is None
        or group_list_type not in (0, 1)
    ):
        raise NotImplementedError(
            f"the software NPU's npu_grouped_matmul takes one x and one stack of weights ({given})"
        )
    rows, matrices = x[0], weight[0]
    out = torch.empty(rows.shape[0], matrices.shape[-1], dtype=output_dtype or rows.dtype, device=rows.device)
    load_extension().grouped_matmul(out, rows, matrices, group_list, group_list_type == 1)
    return [out]


@_kernels.add("npu_moe_token_unpermute")
def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    tokens = permuted_tokens.index_select(0, sorted_indices.long().flatten())
    if probs is None:
        return tokens
    weighted = tokens.view(probs.shape[0], probs.shape[1], -1).float() * probs.float().unsqueeze(-1)
    return weighted.sum(1).to(permuted_tokens.dtype)


@_kernels.add("_npu_moe_token_unpermute")
def _npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Undo the permutation outside of inference mode; the second result would serve a backward pass."""
    return npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs), permuted_tokens


NAMES = frozenset(_kernels.names)
