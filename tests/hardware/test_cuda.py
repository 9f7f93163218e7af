"""The CUDA accelerator class on a GPU. Skipped where there is none; nothing here was run where this was written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vllm_ray_ascend.accelerators.base import Accelerator
from vllm_ray_ascend.accelerators.choose import get_accelerator
from vllm_ray_ascend.errors import CaptureError

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and torch's CUDA build"),
]


@pytest.fixture
def cuda() -> Iterator[Accelerator]:
    found = get_accelerator("cuda")
    found.bind_thread(0)
    yield found
    found.synchronize()


def test_devices(cuda: Accelerator) -> None:
    assert cuda.device_count() >= 1
    torch.ones(1, device=cuda.torch_device(0))
    assert cuda.get_opened_device() == cuda.current_device() == 0


def test_streams_are_per_thread(cuda: Accelerator) -> None:
    mine, seen = cuda.create_stream(), []

    def body() -> None:
        cuda.bind_thread(0)
        seen.append(cuda.current_stream() == mine)

    with cuda.stream_context(mine):
        assert cuda.current_stream() == mine
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    assert seen == [False] and cuda.current_stream() != mine


def test_events_order_streams(cuda: Accelerator) -> None:
    producer, consumer = cuda.create_stream(), cuda.create_stream()
    x, seen, event = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda"), cuda.create_event()
    cuda.synchronize()
    with cuda.stream_context(producer):
        torch.cuda._sleep(10_000_000)
        x.fill_(3.0)
        event.record()
    with cuda.stream_context(consumer):
        event.wait()
        seen.copy_(x)
    cuda.synchronize()
    assert seen.tolist() == [3.0] * 4


def test_timed_events_measure(cuda: Accelerator) -> None:
    begin, end = cuda.create_event(timed=True), cuda.create_event(timed=True)
    begin.record()
    torch.ones(1000, device="cuda").sum()
    end.record()
    cuda.synchronize()
    assert begin.elapsed_time(end) > 0


def test_device_work_is_refused_during_a_capture(cuda: Accelerator) -> None:
    cuda.watch_captures()
    x, y = torch.ones(4, device="cuda"), torch.ones(4, device="cuda")
    seen: dict[str, Any] = {}

    def other_thread() -> None:
        cuda.bind_thread(0)
        seen["capturing"] = cuda.is_capturing()
        try:
            with cuda.exclude_captures("a receive"):
                y.cpu()
        except CaptureError as error:
            seen["error"] = str(error)

    cuda.synchronize()
    graph = cuda.graph_class()
    with torch.cuda.graph(graph):
        x.add_(1)
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert not cuda.is_capturing()
    graph.replay()
    cuda.synchronize()
    assert x.tolist() == [2.0] * 4
    assert "a receive would touch the device" in seen.pop("error") and seen == {"capturing": True}


def test_a_forbidden_call_in_a_capture_is_explained(cuda: Accelerator) -> None:
    cuda.watch_captures()
    x = torch.ones(4, device="cuda")
    cuda.synchronize()
    with pytest.raises(RuntimeError) as raised, torch.cuda.graph(cuda.graph_class()):
        x.cpu()
    assert not cuda.is_capturing()
    assert cuda.explain_error(raised.value) is not None
    assert (x + 1).tolist() == [2.0] * 4


def test_memory(cuda: Accelerator) -> None:
    before = cuda.get_memory_info()
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    after = cuda.get_memory_info()
    assert after.total == before.total >= after.free
    assert after.allocated - before.allocated >= held.numel()


def test_out_of_memory_is_explained(cuda: Accelerator) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert "the GPU is out of memory" in str(cuda.explain_error(raised.value))
