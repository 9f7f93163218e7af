"""Results of a device compared with expected ones: run at once, and replayed by a graph with other inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Inputs = list[Tensor]
Body = Callable[..., object]


def flat(result: object) -> Inputs:
    return [result] if isinstance(result, Tensor) else [tensor for entry in result for tensor in flat(entry)]  # type: ignore[attr-defined]


def check_equal(actual: object, expected: object, dtype: torch.dtype) -> None:
    got, wanted = flat(actual), flat(expected)
    assert [(tensor.dtype, tensor.shape) for tensor in got] == [(tensor.dtype, tensor.shape) for tensor in wanted]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs.cpu(), **close, equal_nan=True)


def check_eager_and_replayed(body: Body, expected: Body, draw: Callable[[], Inputs], dtype: torch.dtype) -> None:
    """Check the body's results, when it runs eagerly and when a graph replays it with new inputs."""
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
