"""vllm-ascend's LoRA kernels against the plain formula: an adapter for each token or sequence, or none."""

from __future__ import annotations

import pytest
import torch
import vllm_ascend.vllm_ascend_C  # noqa: F401 - defines the operators
from torch import Tensor

from tests.softnpu.compare import Inputs, check_eager_and_replayed

TOKENS, HIDDEN, RANK, OUT = 6, 16, 4, 12
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def plain(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    rows = [
        torch.zeros(weight.shape[-2]) if at < 0 else weight[at, 0].float() @ row.float()
        for row, at in zip(x, indices.tolist(), strict=True)
    ]
    return torch.stack(rows)


def drawn(dtype: torch.dtype) -> Inputs:
    """Return inputs: tokens, both halves of three adapters, an adapter for each token."""
    down, up = torch.randn(3, 1, RANK, HIDDEN), torch.randn(3, 1, 5, RANK)
    return [torch.randn(TOKENS, HIDDEN).to(dtype), down.to(dtype), up.to(dtype), torch.randint(-1, 3, (TOKENS,))]


@DTYPES
def test_one_adapter_for_each_token(dtype: torch.dtype) -> None:
    def fused(x: Tensor, down: Tensor, up: Tensor, indices: Tensor) -> Inputs:
        low = torch.zeros(TOKENS, RANK, device=x.device)
        torch.ops._C_ascend.bgmv_shrink(x, down, indices, low, 0.5)
        out = torch.ones(TOKENS, OUT, dtype=dtype, device=x.device)
        return [low, torch.ops._C_ascend.bgmv_expand(low, up, indices, out, 3, 5)]

    def wanted(x: Tensor, down: Tensor, up: Tensor, indices: Tensor) -> Inputs:
        low = plain(x, down, indices) * 0.5
        out = torch.ones(TOKENS, OUT)
        out[:, 3:8] += plain(low, up, indices)
        return [low, out.to(dtype)]

    check_eager_and_replayed(fused, wanted, lambda: drawn(dtype), dtype)


@DTYPES
def test_one_adapter_for_each_sequence(dtype: torch.dtype) -> None:
    """It is also replayed, as vllm-ascend does, with other lengths and adapters than those of the capture."""

    def fused(x: Tensor, down: Tensor, up: Tensor, adapters: Tensor, lengths: Tensor) -> Inputs:
        low = torch.zeros(TOKENS, RANK, device=x.device)
        torch.ops._C_ascend.sgmv_shrink(x, down, adapters, lengths, low, 2.0)
        out = torch.ones(TOKENS, OUT, dtype=dtype, device=x.device)
        return [low, torch.ops._C_ascend.sgmv_expand(low, up, adapters, lengths, out, 7, 5)]

    def wanted(x: Tensor, down: Tensor, up: Tensor, adapters: Tensor, lengths: Tensor) -> Inputs:
        indices = torch.repeat_interleave(adapters, lengths)
        indices = torch.cat([indices, torch.full((TOKENS - len(indices),), -1)])  # tokens of no sequence
        low = plain(x, down, indices) * 2
        out = torch.ones(TOKENS, OUT)
        out[:, 7:] += plain(low, up, indices)
        return [low, out.to(dtype)]

    def inputs() -> Inputs:
        return [*drawn(dtype)[:3], torch.randint(-1, 3, (3,)), torch.randint(1, 3, (3,))]

    check_eager_and_replayed(fused, wanted, inputs, dtype)


def test_torch_compile_traces_all_operators_of_vllm_ascend() -> None:
    """Those that return something have shapes for it, and none returns what it was given."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("_C_ascend::")]
    assert len(names) >= 6
    for name in names:
        schema = torch._C._get_schema(*(name.split(".") if "." in name else (name, "")))
        assert all(output.alias_info is None for output in schema.returns), schema
        assert not schema.returns or torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), schema


def test_compiled_like_eager() -> None:
    def layer(x: Tensor, down: Tensor, up: Tensor, indices: Tensor) -> Tensor:
        low, out = torch.zeros(TOKENS, RANK, device=x.device), torch.ones(TOKENS, OUT, device=x.device)
        torch.ops._C_ascend.bgmv_shrink(x, down, indices, low, 0.5)
        torch.ops._C_ascend.bgmv_expand(low, up, indices, out, 3, 5)
        return out * 2  # of the tensor that was given: vllm-ascend takes no other

    inputs = [each.to("npu") for each in drawn(torch.float32)]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs).cpu(), layer(*inputs).cpu())
