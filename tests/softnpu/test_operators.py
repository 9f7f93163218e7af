"""Operators against the CPU, run at once and replayed with other numbers; fused ones against plain formulas."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from tests.softnpu.processes import check_python

Inputs = list[Tensor]
Body = Callable[..., object]


def rand(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(*shape).to(dtype)


def index(high: int, *shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randint(0, high, shape)


# name: (operator, inputs). Tensors of floats are drawn in each type that is tried.
TABLE: dict[str, tuple[Body, list[Callable[[torch.dtype], Tensor]]]] = {
    "add": (lambda a, b: a + b, [rand(4, 8), rand(8)]),
    "add number": (lambda a: a + 1.5, [rand(4, 8)]),
    "sub alpha": (lambda a, b: torch.sub(a, b, alpha=2), [rand(4, 8), rand(4, 8)]),
    "mul div neg": (lambda a, b: -(a * b) / 3, [rand(4, 8), rand(4, 1)]),
    "pow rsqrt": (lambda a: (a.pow(2) + 1).rsqrt(), [rand(4, 8)]),
    "exp log": (lambda a: (a.exp() + 1).log(), [rand(4, 8)]),
    "sin cos": (lambda a: a.sin() * a.cos(), [rand(4, 8)]),
    "silu": (nnf.silu, [rand(4, 8)]),
    "gelu": (nnf.gelu, [rand(4, 8)]),
    "relu sigmoid tanh": (lambda a: a.relu() + a.sigmoid() + a.tanh(), [rand(4, 8)]),
    "clamp": (lambda a: a.clamp(-0.5, 0.5), [rand(4, 8)]),
    "compare": (lambda a, b: (a > b, a <= 0, a == b, (a > 0) & (b > 0), ~(a != b)), [rand(4, 8), rand(4, 8)]),
    "where": (lambda a, b: torch.where(a > 0, a, b), [rand(4, 8), rand(4, 8)]),
    "masked_fill": (lambda a: a.masked_fill(a > 0, float("-inf")), [rand(4, 8)]),
    "isnan": (lambda a: (a / 0 * 0).isnan().any(), [rand(4)]),
    "matmul": (torch.matmul, [rand(4, 8), rand(8, 5)]),
    "bmm": (torch.bmm, [rand(2, 4, 8), rand(2, 8, 5)]),
    "linear": (nnf.linear, [rand(4, 8), rand(5, 8), rand(5)]),
    "addmm": (torch.addmm, [rand(5), rand(4, 8), rand(8, 5)]),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), [rand(2, 4, 8), rand(2, 3, 8)]),
    "baddbmm": (torch.baddbmm, [rand(2, 4, 5), rand(2, 4, 8), rand(2, 8, 5)]),
    "softmax": (lambda a: (a.softmax(-1), a.log_softmax(0), a.softmax(-1, dtype=torch.float32)), [rand(4, 8)]),
    "layer_norm": (lambda a, w, b: nnf.layer_norm(a, (8,), w, b), [rand(4, 8), rand(8), rand(8)]),
    "rms_norm": (lambda a, w: nnf.rms_norm(a, (8,), w, 1e-6), [rand(4, 8), rand(8)]),
    "embedding": (nnf.embedding, [index(10, 3, 4), rand(10, 8)]),
    "sum mean": (lambda a: (a.sum(-1), a.mean(0), a.sum(), a.mean(-1, keepdim=True)), [rand(4, 8)]),
    "max min": (lambda a: (*a.max(-1), *a.min(0), a.amax(), a.argmax(-1)), [rand(4, 8)]),
    "var norm": (lambda a: (a.var(-1), a.std(0), a.norm(), a.norm(2, -1)), [rand(4, 8)]),
    "cumsum": (lambda a: (a.cumsum(-1), a.cumprod(0)), [rand(4, 8)]),
    "sort topk": (lambda a: (*a.sort(-1, descending=True), *a.topk(3), a.argsort(0)), [rand(4, 8)]),
    "cat stack": (lambda a, b: (torch.cat([a, b]), torch.stack([a, b], 1)), [rand(4, 8), rand(4, 8)]),
    "split chunk": (lambda a: (*a.split([3, 5], -1), *a.chunk(2), *a.unbind(0)), [rand(4, 8)]),
    "views": (
        lambda a: (a.t(), a.view(8, 4), a.transpose(0, 1).contiguous(), a[1:, ::2], a[:, None], a.permute(1, 0)[2]),
        [rand(4, 8)],
    ),
    "flatten expand": (lambda a: (a.flatten(), a[:1].expand(3, 8) + 1, a.unflatten(1, (2, 4)).squeeze()), [rand(4, 8)]),
    "repeat": (lambda a: (a.repeat(2, 3), a.repeat_interleave(2, 0), a.tile(2), a.roll(1, 0)), [rand(4, 8)]),
    "flip tril pad": (lambda a: (a.flip(0), a.tril(), a.triu(1), nnf.pad(a, (1, 2))), [rand(4, 8)]),
    "gather scatter": (
        lambda a, i: (a.gather(1, i), torch.zeros_like(a).scatter(1, i, 1.0), a.scatter_add(1, i, a[:, :3])),
        [rand(4, 8), index(8, 4, 3)],
    ),
    "index": (lambda a, i: (a[i], a[:, i], a.index_select(0, i), a.take(i)), [rand(6, 8), index(6, 3)]),
    "index_add": (lambda a, i: a.index_add(0, i, a[:3] * 2), [rand(6, 8), index(6, 3)]),
    "index_copy": (lambda a, i: a.clone().index_copy_(0, i[:1], a[:1]), [rand(6, 8), index(6, 3)]),
    "bincount by one_hot": (lambda i: nnf.one_hot(i, 6).sum(0), [index(6, 9)]),
    "searchsorted": (lambda a, b: torch.searchsorted(a.float().cumsum(0), b.float()), [rand(8), rand(3)]),
    "integers": (lambda i: (i // 3, i % 3, i + 2, i.to(torch.int32) << 1, i / 2, i.float().mean()), [index(50, 9)]),
    "make": (
        lambda a: (
            torch.zeros_like(a), torch.full_like(a, 3), a.new_ones(3), a.new_full((2,), 7), a.new_full((2,), True),
            torch.arange(5, device=a.device), torch.arange(0.0, 1.0, 0.25, device=a.device),
            torch.linspace(0, 1, 5, device=a.device), torch.eye(3, device=a.device),
        ),
        [rand(4)],
    ),
    "casts": (lambda a: (a.half(), a.long(), a.bool(), a.to(torch.bfloat16), a.float()), [rand(4, 8)]),
    "lerp addcmul": (lambda a, b: (a.lerp(b, 0.3), a.addcmul(a, b, value=2), a.addcdiv(a, b.abs() + 1)), [rand(9)] * 2),
    "attention": (
        lambda q, k: (
            nnf.scaled_dot_product_attention(q, k, k * 2), nnf.scaled_dot_product_attention(q, q, q, is_causal=True)
        ),
        [rand(1, 2, 4, 8), rand(1, 2, 6, 8)],
    ),
    "conv pool": (lambda a, w: nnf.avg_pool1d(nnf.conv1d(a, w, padding=1), 2), [rand(1, 3, 8), rand(4, 3, 3)]),
    "cross_entropy": (lambda a, i: nnf.cross_entropy(a.float(), i), [rand(4, 8), index(8, 4)]),
    "in place": (lambda a, b: a.clone().mul_(b).add_(1).clamp_(min=0).copy_(b * 2).sub_(a), [rand(4, 8), rand(4, 8)]),
    "strided in place": (lambda a: a.clone().t().mul_(2)[1:3].add_(1), [rand(4, 8)]),
    "out": (lambda a, b: torch.mul(a, b, out=torch.empty_like(a)), [rand(4, 8), rand(4, 8)]),
    "out resized": (lambda a, b: torch.add(a, b, out=a.new_empty(0)), [rand(4, 8), rand(4, 8)]),
    "foreach": (lambda a, b: torch._foreach_mul([a, b], 2.0), [rand(4), rand(3)]),
    "complex": (lambda a: torch.view_as_real(torch.view_as_complex(a.float()) * 1j), [rand(4, 2)]),
}  # fmt: skip


def flat(result: object) -> Inputs:
    return [result] if isinstance(result, Tensor) else [tensor for entry in result for tensor in flat(entry)]  # type: ignore[attr-defined]


def check_equal(actual: object, expected: object, dtype: torch.dtype) -> None:
    got, wanted = flat(actual), flat(expected)
    assert [(tensor.dtype, tensor.shape) for tensor in got] == [(tensor.dtype, tensor.shape) for tensor in wanted]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs.cpu(), **close, equal_nan=True)


def check_eager_and_replayed(body: Body, expected: Body, draw: Callable[[], Inputs], dtype: torch.dtype) -> None:
    """The body's results equal the expected ones, when it runs at once, and when a graph replays it with new inputs."""
    first = draw()
    placed = [tensor.npu() for tensor in first]
    check_equal(body(*placed), expected(*first), dtype)
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.inference_mode(), torch.npu.graph(graph):  # as vLLM runs; torch_npu dispatches some operators otherwise
        result = body(*placed)
    for _ in range(2):
        fresh = draw()
        for target, source in zip(placed, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        torch.npu.synchronize()
        check_equal(result, expected(*fresh), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TABLE)
def test_operator_equals_the_cpus(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    body, inputs = TABLE[name]
    check_eager_and_replayed(body, body, lambda: [make(dtype) for make in inputs], dtype)


def test_operators_whose_shapes_depend_on_data() -> None:
    x = torch.tensor([3, 0, 3, 1])
    for call in (torch.nonzero, torch.unique, torch.bincount, lambda t: t[t > 0], lambda t: t.masked_select(t > 1)):
        assert call(x.npu()).tolist() == call(x).tolist()
    assert torch.repeat_interleave(x.npu()).tolist() == torch.repeat_interleave(x).tolist()
    assert torch.equal(x.npu(), x.npu())
    assert x.npu().sum().item() == 7


def test_results_follow_the_default_type() -> None:
    whole = torch.arange(4, device="npu")
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            assert (whole / 2).dtype == torch.arange(0, 1, 0.5, device="npu").dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients() -> None:
    def gradient(x: Tensor, weight: Tensor) -> Tensor:
        weight.requires_grad_()
        (x @ weight).softmax(-1, dtype=torch.float32).gather(1, torch.zeros_like(x, dtype=torch.long)).sum().backward()
        assert weight.grad is not None
        return weight.grad

    x, weight = torch.randn(3, 4), torch.randn(4, 5)
    check_equal(gradient(x.npu(), weight.npu()), gradient(x, weight), torch.float32)


def test_true_is_not_one() -> None:
    x = torch.zeros(2, dtype=torch.int32, device="npu")
    assert [torch.full_like(x, 1, dtype=None).dtype, torch.full((2,), 1, device="npu").dtype] == [
        torch.int32,
        torch.int64,
    ]
    assert torch.full((2,), True, device="npu").dtype == torch.bool
    assert (torch.zeros(2, dtype=torch.bool, device="npu") + True).dtype == torch.bool
    assert (torch.zeros(2, dtype=torch.bool, device="npu") + 1).dtype == torch.int64


def test_devices_are_not_mixed() -> None:
    x, there = torch.ones(3, device="npu"), torch.ones(3, device="npu:1")
    for other in (torch.ones(3), there):
        with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device, but aten::add\.Tensor"):
            x + other
    with pytest.raises(RuntimeError, match=r"same device.*'index' on cpu"):
        x.index_select(0, torch.tensor([1]))
    assert (x + torch.tensor(2.0)).tolist() == [3.0] * 3  # a number may come from the host
    assert x[torch.tensor([0, 2])].tolist() == [1.0] * 2  # and an index


# ---- fused operators

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
            heads_first = [tensor.float().transpose(0, 1) for tensor in (query[begin : begin + count], *rows)]
            outputs.append(
                nnf.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(
                    0, 1
                )
            )
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


# ---- what is not there

x4 = pytest.fixture(lambda: torch.randn(2, 4, 1, 8, device="npu"))

UNKNOWN: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "an operator of torch_npu": (lambda x: torch.ops.npu.npu_rotary_mul(x, x, x), "npu::npu_rotary_mul"),
    "an operator of aten without CPU kernel": (
        lambda x: torch.ops.aten._scaled_dot_product_efficient_attention(x, x, x, None, False),
        "aten::_scaled_dot_product_efficient_attention",
    ),
    "an operator of vllm-ascend": (lambda x: torch.ops._C_ascend.bgmv_shrink(x, x), "bgmv_shrink"),
}


@pytest.mark.parametrize(("call", "name"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_operator_raises_at_once_with_its_name(call: Callable[[Tensor], object], name: str, x4: Tensor) -> None:
    with pytest.raises((NotImplementedError, AttributeError, RuntimeError), match=re.escape(name)):
        call(x4)
    assert (x4 - x4).abs().sum().item() == 0  # and nothing else is harmed


# ---- random numbers


def drawn(generator: torch.Generator | None = None) -> list[list[float]]:
    x = torch.empty(6, device="npu")
    probabilities = torch.rand(3, 5, device="npu", generator=generator)
    results = [
        x.uniform_(generator=generator).clone(),
        x.normal_(generator=generator).clone(),
        x.exponential_(generator=generator).clone(),
        probabilities,
        torch.randn(6, device="npu", generator=generator),
        torch.randint(0, 1000, (6,), device="npu", generator=generator),
        torch.randperm(20, device="npu", generator=generator),
        torch.multinomial(probabilities, 3, generator=generator),
        torch.bernoulli(torch.full((20,), 0.5, device="npu"), generator=generator),
    ]
    return [tensor.flatten().tolist() for tensor in results]


def test_same_seed_same_numbers() -> None:
    torch.npu.manual_seed_all(7)
    first, second = drawn(), drawn()
    torch.npu.manual_seed_all(7)
    again = drawn()
    torch.npu.manual_seed_all(8)
    other = drawn()
    assert first == again
    for a, b in zip(first, second, strict=True):
        assert a != b  # the generator moved on
    for a, b in zip(first, other, strict=True):
        assert a != b


def test_generator_of_ones_own() -> None:
    torch.npu.manual_seed(3)
    mine = [drawn(torch.Generator("npu").manual_seed(seed)) for seed in (1, 1, 2)]
    assert mine[0] == mine[1] != mine[2]
    untouched = drawn()
    torch.npu.manual_seed(3)
    assert drawn() == untouched  # the default generator was not used


def test_state_of_the_generator_can_be_kept() -> None:
    torch.npu.manual_seed(5)
    drawn()
    state = torch.npu.get_rng_state()
    first = drawn()
    torch.npu.set_rng_state(state)
    assert drawn() == first


def test_cpu_numbers_are_not_moved_by_the_npus() -> None:
    torch.manual_seed(11)
    first = torch.rand(4).tolist()
    torch.manual_seed(11)
    drawn()
    nnf.dropout(torch.ones(64, device="npu"), 0.5)
    assert torch.rand(4).tolist() == first


def test_numbers_are_distributed_as_they_should() -> None:
    torch.npu.manual_seed(1)
    x = torch.empty(20_000, device="npu")
    assert abs(x.uniform_().mean().item() - 0.5) < 0.02
    assert abs(x.normal_().std().item() - 1) < 0.03
    assert abs(x.exponential_().mean().item() - 1) < 0.04
    assert 0.45 < (nnf.dropout(torch.ones(20_000, device="npu"), 0.5) == 0).float().mean().item() < 0.55
    weights = torch.tensor([0.1, 0.0, 0.9], device="npu")
    counts = torch.multinomial(weights, 5000, replacement=True).bincount(minlength=3)
    assert counts[1].item() == 0
    assert 400 < counts[0].item() < 600
    assert sorted(torch.randperm(100, device="npu").tolist()) == list(range(100))


def test_devices_have_generators_of_their_own() -> None:
    torch.npu.manual_seed_all(2)
    first = torch.rand(4, device="npu:0")
    assert (
        torch.rand(4, device="npu:1").tolist() == first.tolist()
    )  # same seed; device 0's draw did not move device 1's


def test_operator_that_the_graph_engine_would_compile() -> None:
    check_python("""
        import ctypes, os, torch, torch_npu
        stream = torch.npu.Stream()
        library = ctypes.CDLL(os.path.join(os.environ["SOFTNPU_LIB"], "libacl_op_compiler.so"))
        arguments = [ctypes.c_char_p(b"Cholesky"), 0, None, None, 0, None, None, None, 0, 0, None]
        assert library.aclopCompileAndExecute(*arguments, ctypes.c_void_p(stream.npu_stream)) == 100024
        try:
            stream.synchronize()
        except RuntimeError as error:
            assert "no operator Cholesky" in str(error), error
        else:
            raise SystemExit("the stream went on")
        os._exit(0)
    """)
