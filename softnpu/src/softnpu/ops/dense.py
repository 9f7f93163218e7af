"""Fused operators of a dense decoder, as references in aten: their parts are queued and captured like any operator."""

from __future__ import annotations

import torch
from torch import Tensor

from softnpu.ops.library import KernelRegistry, load_extension

_kernels = KernelRegistry("npu")


def normalize_rms(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x / RMS(x) * weight over the last dimension, computed in float, and 1 / RMS(x)."""
    wide = x.float()
    inverse = (wide.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * inverse * weight.float()).to(x.dtype), inverse


@_kernels.add("npu_rms_norm")
def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return normalize_rms(x, gamma, epsilon)


@_kernels.add("npu_add_rms_norm")
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    normed, inverse = normalize_rms(total, gamma, epsilon)
    return normed, inverse, total


@_kernels.add("npu_dynamic_quant")
def npu_dynamic_quant(
    input: Tensor,  # noqa: A002  torch_npu's name
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return int8 and one scale for each token. vllm-ascend runs it, quantised model or not, to trace its fusions."""
    if smooth_scales is not None or group_index is not None or dst_type is not None or quant_mode != "pertoken":
        raise NotImplementedError("the software NPU's npu_dynamic_quant gives int8 for each token, not smoothed")
    wide = input.float()
    scale = wide.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scale.unsqueeze(-1)).round().to(torch.int8), scale


@_kernels.add("npu_add_rms_norm_dynamic_quant")
def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: tuple[bool, ...] = (),
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return int8 of the normalised sum, nothing, the sum, the scale of each token, nothing."""
    if smooth_scale1 is not None or smooth_scale2 is not None or y_dtype is not None:
        raise NotImplementedError("the software NPU's npu_add_rms_norm_dynamic_quant gives int8, not smoothed")
    total = x1 + x2
    normed, _ = normalize_rms(total, gamma, epsilon)
    quantised, scale = npu_dynamic_quant(normed if beta is None else normed + beta)
    return quantised, quantised.new_empty(0), total, scale, scale.new_empty(0)


@_kernels.add("npu_swiglu")
def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, head_size: int, half: bool) -> Tensor:
    """Apply rotary embedding to the first cos.shape[-1] * 2 numbers of each head. x: (tokens, heads * head_size)."""
    heads = x.view(x.shape[0], -1, head_size).float()
    width = cos.shape[-1] * 2
    rotated, rest = heads[..., :width], heads[..., width:]
    first, second = rotated.chunk(2, -1) if half else (rotated[..., ::2], rotated[..., 1::2])
    a, b = first * cos - second * sin, second * cos + first * sin
    result = torch.cat([a, b], -1) if half else torch.stack([a, b], -1).flatten(-2)
    return torch.cat([result, rest], -1).reshape(x.shape).to(x.dtype)


@_kernels.add("npu_mrope")
def npu_mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: list[int] | None = None,
    rotary_mode: str = "half",
    cache_mode: str = "default",
) -> tuple[Tensor, Tensor]:
    if mrope_section and any(mrope_section):
        raise NotImplementedError(f"the software NPU's npu_mrope has no mrope_section (given: {mrope_section})")
    tokens = query.shape[0]
    rows = cos_sin_cache.index_select(0, positions.flatten()[:tokens].long()).float()
    cos, sin = rows[:, None].chunk(2, -1)
    half = rotary_mode == "half"
    return _rotate(query, cos, sin, head_size, half), _rotate(key, cos, sin, head_size, half)


@_kernels.add("npu_scatter_pa_kv_cache")
def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str = "PA_NZ",
) -> None:
    if compress_lens is not None or compress_seq_offsets is not None:
        raise NotImplementedError("the software NPU's npu_scatter_pa_kv_cache has no compression")
    slots = slot_mapping.flatten()
    load_extension().write_cache(key[: slots.numel()], key_cache, slots)
    load_extension().write_cache(value[: slots.numel()], value_cache, slots)


# The mask is the causal one that sparse_mode selects already.
_IGNORED = ("atten_mask", "workspace")


def _fused_attention(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    actual_seq_lengths: list[int] | None,
    actual_seq_lengths_kv: list[int] | None,
    block_table: Tensor | None,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    input_layout: str,
    sparse_mode: int,
    block_size: int,
    **unused: object,
) -> None:
    if input_layout != "TND" or actual_seq_lengths is None:
        raise NotImplementedError(
            f"the software NPU's attention needs input_layout TND and lengths, not {input_layout}"
        )
    if sparse_mode not in (0, 2, 3):
        raise NotImplementedError(f"the software NPU's attention has no sparse_mode {sparse_mode}")
    given = [name for name, argument in unused.items() if isinstance(argument, Tensor) and name not in _IGNORED]
    if given:
        raise NotImplementedError(f"the software NPU's attention does not take {', '.join(given)}")
    load_extension().attention(
        out, query, key, value, list(actual_seq_lengths), list(actual_seq_lengths_kv or []), block_table,
        num_heads, num_key_value_heads, scale, sparse_mode != 0, block_size,
    )  # fmt: skip


_ATTENTION_DEFAULTS: dict[str, object] = {
    "actual_seq_lengths": None,
    "actual_seq_lengths_kv": None,
    "block_table": None,
    "num_heads": 1,
    "num_key_value_heads": 0,
    "scale": 1.0,
    "input_layout": "BSH",
    "sparse_mode": 0,
    "block_size": 0,
}


@_kernels.add("npu_fused_infer_attention_score")
def attention(query: Tensor, key: Tensor, value: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query)
    _fused_attention(out, query, key, value, **{**_ATTENTION_DEFAULTS, **options})  # type: ignore[arg-type]
    return out, torch.zeros(1, device=query.device)


@_kernels.add("npu_fused_infer_attention_score.out")
def attention_out(
    query: Tensor, key: Tensor, value: Tensor, *, out: list[Tensor], **options: object
) -> tuple[Tensor, Tensor]:
    _fused_attention(out[0].view(query.shape), query, key, value, **{**_ATTENTION_DEFAULTS, **options})  # type: ignore[arg-type]
    return out[0], out[1]


@_kernels.add("_npu_fused_infer_attention_score_get_max_workspace")
def attention_workspace(query: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty(1, dtype=torch.uint8, device=query.device)


@_kernels.add("npu_format_cast")
def npu_format_cast(
    x: Tensor, acl_format: int, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return x  # the software NPU has a single format


NAMES = frozenset(_kernels.names)
