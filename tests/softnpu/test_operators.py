"""Operators of aten against the CPU's, run at once and replayed with other numbers; and those that are not there."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from tests.softnpu.compare import Body, check_eager_and_replayed
from tests.softnpu.processes import check_python


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
    """In a process of its own: where others have run before in one, torch's threads for gradients have aborted it."""
    check_python(
        """
        import torch, torch_npu

        def gradient(x, weight):
            weight.requires_grad_()
            chosen = torch.zeros_like(x, dtype=torch.long)
            (x @ weight).softmax(-1, dtype=torch.float32).gather(1, chosen).sum().backward()
            return weight.grad

        x, weight = torch.randn(3, 4), torch.randn(4, 5)
        torch.testing.assert_close(gradient(x.npu(), weight.npu()).cpu(), gradient(x, weight))
        """
    )


def test_true_is_not_one() -> None:
    x = torch.zeros(2, dtype=torch.int32, device="npu")
    assert [torch.full_like(x, 1, dtype=None).dtype, torch.full((2,), 1, device="npu").dtype] == [
        torch.int32,
        torch.int64,
    ]
    assert torch.full((2,), True, device="npu").dtype == torch.bool
    assert (torch.zeros(2, dtype=torch.bool, device="npu") + True).dtype == torch.bool
    assert (torch.zeros(2, dtype=torch.bool, device="npu") + 1).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integers_are_divided_in_place(dtype: torch.dtype) -> None:
    """As torch_npu averages integers over HCCL (op-plugin, DivKernelNpuOpApi.cpp); the CPU refuses it."""
    x = torch.tensor([7, 8, 9], dtype=dtype, device="npu")
    assert x.div_(2) is x and x.dtype == dtype and x.tolist() == [3, 4, 4]
    assert x.div_(torch.tensor([3, 1, 2], device="npu")).tolist() == [1, 4, 2]


def test_floats_and_bools_are_divided_in_place_as_on_the_cpu() -> None:
    assert torch.ones(2, dtype=torch.bfloat16, device="npu").div_(4).tolist() == [0.25, 0.25]
    with pytest.raises(RuntimeError, match="Bool"):
        torch.ones(1, dtype=torch.bool, device="npu").div_(2)


def test_devices_are_not_mixed() -> None:
    x, there = torch.ones(3, device="npu"), torch.ones(3, device="npu:1")
    for other in (torch.ones(3), there):
        with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device, but aten::add\.Tensor"):
            x + other
    with pytest.raises(RuntimeError, match=r"same device.*'index' on cpu"):
        x.index_select(0, torch.tensor([1]))
    assert (x + torch.tensor(2.0)).tolist() == [3.0] * 3  # a number may come from the host
    assert x[torch.tensor([0, 2])].tolist() == [1.0] * 2  # and an index


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
