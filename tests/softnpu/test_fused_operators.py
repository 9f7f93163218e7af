"""Fused operators against plain formulas, in the shapes of Qwen3 and Qwen3-MoE."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from tests.softnpu.compare import Inputs, check_eager_and_replayed

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).to(x.dtype)


@DTYPES
def test_rms_norms(dtype: torch.dtype) -> None:
    def draw() -> Inputs:
        return [torch.randn(3, 16).to(dtype), torch.randn(3, 16).to(dtype), torch.randn(16).to(dtype)]

    def fused(x: Tensor, y: Tensor, weight: Tensor) -> Inputs:
        normed, _, total = torch.ops.npu.npu_add_rms_norm(x, y, weight, 1e-6)
        return [torch.ops.npu.npu_rms_norm(x, weight, 1e-6)[0], normed, total]

    def plain(x: Tensor, y: Tensor, weight: Tensor) -> Inputs:
        return [plain_rms_norm(x, weight), plain_rms_norm(x + y, weight), x + y]

    check_eager_and_replayed(fused, plain, draw, dtype)


def check_quantised(quantised: Tensor, scale: Tensor, wanted: Tensor) -> None:
    """Each token's largest number is 127 or -127, and each number is right to half a step and float's rounding."""
    assert quantised.dtype == torch.int8 and scale.shape == wanted.shape[:-1]
    assert quantised.abs().amax(-1).tolist() == [127] * len(wanted)
    step = scale.cpu().double().unsqueeze(-1)
    assert ((quantised.cpu() * step - wanted.double()).abs() <= 0.5001 * step).all()


@DTYPES
def test_quantisation_of_each_token(dtype: torch.dtype) -> None:
    x, y, weight = torch.randn(3, 16).to(dtype), torch.randn(3, 16).to(dtype), torch.randn(16).to(dtype)
    quantised, scale = torch.ops.npu.npu_dynamic_quant(x.npu())
    check_quantised(quantised, scale, x)
    assert torch.ops.npu.npu_dynamic_quant(torch.zeros(2, 4, device="npu"))[0].tolist() == [[0] * 4] * 2
    quantised, _, total, scale, _ = torch.ops.npu.npu_add_rms_norm_dynamic_quant(x.npu(), y.npu(), weight.npu())
    normed = torch.ops.npu.npu_add_rms_norm(x.npu(), y.npu(), weight.npu(), 1e-6)[0].cpu()
    check_quantised(quantised, scale, normed)
    assert torch.equal(total.cpu(), x + y)


@DTYPES
def test_swiglu(dtype: torch.dtype) -> None:
    def plain(x: Tensor) -> Tensor:
        gate, up = x.double()[:, :8], x.double()[:, 8:]
        return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)

    check_eager_and_replayed(torch.ops.npu.npu_swiglu, plain, lambda: [torch.randn(3, 16).to(dtype)], dtype)


@DTYPES
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("rotary", [8, 4], ids=["whole head", "half of the head"])
def test_rotary_embedding(dtype: torch.dtype, mode: str, rotary: int) -> None:
    heads, size, positions = 2, 8, 32
    angle = torch.arange(positions)[:, None] / 100.0 ** (torch.arange(0, rotary, 2) / rotary)
    cache = torch.cat([angle.cos(), angle.sin()], -1).to(dtype)
    cache_on_npu = cache.npu()

    def draw() -> Inputs:
        return [
            torch.randint(0, positions, (5,)),
            torch.randn(5, heads * size).to(dtype),
            torch.randn(5, size).to(dtype),
        ]

    def rotated(at: Tensor, x: Tensor) -> Tensor:
        out = x.float().view(5, -1, size).clone()
        for token in range(5):
            for pair in range(rotary // 2):
                a, b = (pair, pair + rotary // 2) if mode == "half" else (2 * pair, 2 * pair + 1)
                turn = torch.complex(*cache[at[token]].float().view(2, -1)[:, pair])
                both = torch.complex(out[token, :, a], out[token, :, b]) * turn
                out[token, :, a], out[token, :, b] = both.real, both.imag
        return out.view(x.shape).to(x.dtype)

    def fused(at: Tensor, query: Tensor, key: Tensor) -> object:
        return torch.ops.npu.npu_mrope(at, query, key, cache_on_npu, size, rotary_mode=mode)

    check_eager_and_replayed(fused, lambda at, query, key: [rotated(at, query), rotated(at, key)], draw, dtype)


def test_key_value_cache_is_written_where_the_slots_say() -> None:
    pages, block, heads, size = 3, 4, 2, 5
    store = torch.zeros(pages, 2, block, heads, size, device="npu")  # strided, as vLLM lays it out
    keys, values = store[:, 0], store[:, 1]
    slots = torch.zeros(4, dtype=torch.int32, device="npu")
    key, value = torch.randn(4, heads, size, device="npu"), torch.randn(4, heads, size, device="npu")
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        torch.ops.npu.npu_scatter_pa_kv_cache(key, value, keys, values, slots, cache_mode="Norm")
    for chosen in ([7, 0, -1, 11], [1, 2, 3, -1]):
        slots.copy_(torch.tensor(chosen, dtype=torch.int32))
        store.zero_()
        graph.replay()
        for cache, rows in ((keys, key), (values, value)):
            expected = torch.zeros(pages * block, heads, size)
            for row, slot in enumerate(chosen):
                if slot >= 0:
                    expected[slot] = rows[row].cpu()
            assert torch.equal(cache.cpu(), expected.view(pages, block, heads, size))


@DTYPES
@pytest.mark.parametrize("paged", [True, False], ids=["pages", "packed"])
def test_attention_of_several_sequences(dtype: torch.dtype, paged: bool) -> None:
    heads, key_heads, size, block = 4, 2, 8, 4
    queries, keys = [3, 1, 2], [3, 7, 6]  # a prefill, a decode, a prefill behind a prefix
    ends = torch.tensor(queries).cumsum(0).tolist()
    table = torch.tensor([[5, 0], [2, 4], [1, 3]], dtype=torch.int32)
    lengths = keys if paged else torch.tensor(keys).cumsum(0).tolist()
    shape = (6, block, key_heads, size) if paged else (sum(keys), key_heads, size)

    def draw() -> Inputs:
        return [
            torch.randn(sum(queries), heads, size).to(dtype),
            torch.randn(shape).to(dtype),
            torch.randn(shape).to(dtype),
        ]

    table_on_npu = table.npu() if paged else None

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if paged:
            key, value = key.flatten(2), value.flatten(2)
        return torch.ops.npu.npu_fused_infer_attention_score(
            query, key, value, num_heads=heads, num_key_value_heads=key_heads, input_layout="TND", scale=0.3,
            actual_seq_lengths=ends, actual_seq_lengths_kv=lengths, block_table=table_on_npu,
            block_size=block if paged else 0, sparse_mode=3,
        )[0]  # fmt: skip

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs, packed = [], 0
        for number, (count, length) in enumerate(zip(queries, keys, strict=True)):
            rows = [
                tensor[table[number].long()].flatten(0, 1)[:length] if paged else tensor[packed : packed + length]
                for tensor in (key, value)
            ]
            packed += length
            begin = ends[number] - count
            mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            q, k, v = (tensor.float().transpose(0, 1) for tensor in (query[begin : begin + count], *rows))
            attended = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
            outputs.append(attended.transpose(0, 1))
        return torch.cat(outputs).to(query.dtype)

    check_eager_and_replayed(fused, plain, draw, dtype)


def test_attention_refuses_what_it_does_not_compute() -> None:
    x = torch.randn(2, 2, 8, device="npu")
    score = torch.ops.npu.npu_fused_infer_attention_score
    with pytest.raises(NotImplementedError, match="input_layout TND"):
        score(x, x, x, num_heads=2, input_layout="BSH")
    with pytest.raises(NotImplementedError, match="pse_shift"):
        score(x, x, x, num_heads=2, input_layout="TND", actual_seq_lengths=[2], pse_shift=x)


@DTYPES
@pytest.mark.parametrize("renorm", [0, 1])
def test_gating(dtype: torch.dtype, renorm: int) -> None:
    def plain(logits: Tensor) -> Inputs:
        weights, experts = logits.double().softmax(-1).sort(-1, descending=True)
        weights = weights[:, :3]
        return [(weights / weights.sum(-1, keepdim=True) if renorm else weights).to(logits.dtype), experts[:, :3].int()]

    def fused(logits: Tensor) -> Inputs:
        return list(torch.ops.npu.npu_moe_gating_top_k(logits, 3, norm_type=0, renorm=renorm)[:2])

    # Distinct in bf16 as well, so that the order of equal experts does not matter.
    check_eager_and_replayed(
        fused, plain, lambda: [torch.stack([torch.randperm(8) for _ in range(4)]).to(dtype) / 4], dtype
    )


@DTYPES
@pytest.mark.parametrize("local", [(0, 6), (2, 4), (3, 6)], ids=["all experts", "middle", "upper half"])
def test_mixture_of_experts(dtype: torch.dtype, local: tuple[int, int]) -> None:
    """Routing, grouped products and un-permuting together are a plain sum over each token's experts of this rank."""
    tokens, experts, chosen, hidden, inner = 5, 6, 2, 8, 4
    first, end = local
    up, down = torch.randn(experts, hidden, 2 * inner).to(dtype), torch.randn(experts, inner, hidden).to(dtype)
    up_here, down_here = up[first:end].npu(), down[first:end].npu()

    def draw() -> Inputs:
        ids = torch.stack([torch.randperm(experts)[:chosen] for _ in range(tokens)]).int()
        return [torch.randn(tokens, hidden).to(dtype), ids, torch.rand(tokens, chosen).to(dtype)]

    def fused(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows, places, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
            x, ids, active_num=tokens * chosen, expert_num=experts, expert_tokens_num_type=1,
            expert_tokens_num_flag=True, active_expert_range=[first, end], quant_mode=-1,
        )  # fmt: skip
        options = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 2}
        middle = torch.ops.npu.npu_grouped_matmul([rows], [up_here], **options)[0]
        out = torch.ops.npu.npu_grouped_matmul([torch.ops.npu.npu_swiglu(middle)], [down_here], **options)[0]
        return torch.ops.npu.npu_moe_token_unpermute(out, places, weights)

    def plain(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros(tokens, hidden)
        for token in range(tokens):
            for expert, weight in zip(ids[token].tolist(), weights[token].float(), strict=True):
                if first <= expert < end:
                    gate, upper = (x[token] @ up[expert]).float().chunk(2)
                    result[token] += weight * ((nnf.silu(gate) * upper).to(dtype) @ down[expert]).float()
        return result.to(dtype)

    torch.manual_seed(1)
    check_eager_and_replayed(fused, plain, draw, dtype)
